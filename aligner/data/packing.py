"""Which examples stand together in a row: a plan made once from the lengths that the census found, the same on every host.

Rows of a plan are what batches count and what is shuffled every epoch; so every example comes exactly once an epoch, and the content of
batch k stays a function of (seed, k) alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_OPEN_ROWS = 1024  # rows that may still take an example; a full search would be quadratic and hardly fuller


class Plan(NamedTuple):
    """Rows of examples, flat.

    Attributes:
        members: [M,3] int64: place in the census, first token, end; an end of -1 is the whole example.
        starts: [rows + 1] int64: members starts[r]..starts[r+1] stand in row r.
    """

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        """Members of a row, [g,3]."""
        return self.members[self.starts[number] : self.starts[number + 1]]

    def lengths(self, columns: np.ndarray) -> np.ndarray:
        """How many columns of each row are filled, where whole examples take `columns` [N]."""
        first, end = self.members[:, 1], self.members[:, 2]
        return np.add.reduceat(np.where(end < 0, columns[self.members[:, 0]], end - first), self.starts[:-1])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """What `values` [N] of whole examples add up to in each row."""
        return np.add.reduceat(values[self.members[:, 0]], self.starts[:-1])


def one_per_row(count: int) -> Plan:
    """Every example in a row of its own, in the order of the source."""
    return _plan(np.arange(count), np.arange(count + 1))


def first_fit(lengths: np.ndarray, capacity: int, seed: int | None) -> Plan:
    """Each example goes into the first row that has room for it; where none has, the fullest of the open rows makes way for a new one.

    Args:
        lengths: [N] columns that the examples take, none above `capacity`.
        capacity: columns of a row.
        seed: of the order in which examples are placed, so that neighbours in the source do not stay together; None keeps the source's.
    """
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    room = np.zeros(_OPEN_ROWS, np.int64)
    row_at = np.zeros(_OPEN_ROWS, np.int64)
    rows: list[list[int]] = []
    for number in order:
        place = int(np.argmax(room >= lengths[number]))
        if room[place] < lengths[number]:
            place = int(np.argmin(room))
            row_at[place], room[place] = len(rows), capacity
            rows.append([])
        rows[row_at[place]].append(int(number))
        room[place] -= lengths[number]
    return _plan(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def cut_stream(lengths: np.ndarray, capacity: int) -> Plan:
    """All documents one after another, cut into rows of `capacity` tokens; only the last row may be shorter.

    Args:
        lengths: [N] tokens of the documents.
        capacity: tokens of a row.
    """
    ends = np.cumsum(lengths)
    cuts = np.union1d(ends, np.arange(capacity, ends[-1] + 1, capacity))  # where a member ends
    begins = np.concatenate([[0], cuts[:-1]])
    document = np.searchsorted(ends, begins, side="right")
    offset = ends[document] - lengths[document]
    members = np.stack([document, begins - offset, cuts - offset], axis=1)
    rows = -(-int(ends[-1]) // capacity)
    return Plan(members, np.searchsorted(begins, np.arange(rows + 1) * capacity))


def derangement(row_ids: np.ndarray, seed: int) -> np.ndarray:
    """For every example another one, chosen by chance once and for all: one cycle through all of them, so none is its own.

    Args:
        row_ids: [N] kept rows, N >= 2.
        seed: of the cycle.

    Returns:
        [N] places in `row_ids`.
    """
    cycle = np.random.default_rng([seed, 1]).permutation(len(row_ids))
    partner = np.empty_like(cycle)
    partner[cycle] = np.roll(cycle, -1)
    return partner


def _plan(order: np.ndarray, starts: np.ndarray) -> Plan:
    """Whole examples."""
    return Plan(np.stack([order, np.zeros_like(order), np.full_like(order, -1)], axis=1), starts)
