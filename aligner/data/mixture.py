"""One dataset or several as one: which rows stand in an epoch and how often, each with the formatter and template arguments of its own.

    config.data.train.mixture = (
        dict(path="chat.jsonl", weight=3.0),
        dict(path="org/maths", formatter="GSM8K", weight=1.0, template=dict(enable_thinking=False)),
    )

A dict may hold every key of `configs.common.data_source`. `fraction` says how much of its rows stand in an epoch (0.25: a random quarter,
always the same; 2: all of them twice); `weight` its share of the epoch, which is then as long as all datasets together. Rows of all
datasets are shuffled together, and who reads which is decided after that, so no process repeats or misses one.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data import formatters, samples, sources
from aligner.data.census import source_code
from aligner.data.kinds import Kind
from aligner.data.samples import Bad, Preference, Ranked
from aligner.types import UserError


@dataclasses.dataclass(frozen=True)
class Samples:
    """Random access to the samples of one or several datasets.

    Attributes:
        read: number -> sample; raises Bad for a row that cannot be used.
        size: how many.
        folder: number -> where the media that the row names are looked up.
        raw: number -> the row as the dataset has it.
        name: number -> what people call the row: its number, in a mixture with its file.
        repeats: number -> how often it stands in an epoch (where that is not once).
        description: what was opened, for people.
        formatter: the formatters' names.
        identity: changes when rows, formatters or their choice do.
        pairs: pairs that were made two samples each.
    """

    read: Callable[[int], Any]
    raw: Callable[[int], dict[str, Any]]
    size: int
    folder: Callable[[int], Path]
    name: Callable[[int], str]
    repeats: np.ndarray | None
    description: str
    formatter: str
    identity: Any
    pairs: bool = False

    def __len__(self) -> int:
        return self.size


def is_set(section: Any) -> bool:
    """Whether a section of the config names a dataset."""
    return bool(section.path or section.get("mixture", ()))


def open_samples(section: Any, name: str, kind: Kind, seed: int, unpaired: bool = False) -> Samples:
    """Open the dataset, or all datasets, of a section.

    Args:
        section: of the config, with `path` or `mixture`.
        name: what errors call it, e.g. "data.train".
        kind: what the algorithm takes.
        seed: of the choice of rows where a dataset has none of its own.
        unpaired: a pair is two samples, its answers.

    Raises:
        UserError: a file that is missing or cannot be read, columns that are missing, weights that make no sense.
    """
    if not section.get("mixture", ()):
        share = (section.get("fraction", None), None)
        return _all([_open(section, name, kind, unpaired)], [_checked(share, name)], [_seed(section, seed)], name)
    if section.path:
        raise UserError(f"config.{name}.path and config.{name}.mixture are both set; put the path into the mixture.")
    sections = [_section(entry, section, f"{name}.mixture[{i}]") for i, entry in enumerate(section.mixture)]
    names = [f"{name}.mixture[{i}]" for i in range(len(sections))]
    shares = [_checked((one.get("fraction", None), one.get("weight", None)), where) for one, where in zip(sections, names)]
    if len({weight is None for _, weight in shares}) > 1:
        raise UserError(f"config.{name}.mixture: some datasets have a weight and some have none; give all of them one, or none.")
    parts = [_open(one, where, kind, unpaired) for one, where in zip(sections, names)]
    seeds = [_seed(one, seed + i) for i, one in enumerate(sections)]
    return _all(parts, shares, seeds, name)


def _section(entry: Any, default: Any, where: str) -> Any:
    """A dict of the mixture as a whole section: what it does not say is as in `default`."""
    from ml_collections import ConfigDict

    known = {*default.keys(), "weight"} - {"mixture"}
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"config.{where} has no key {key!r}; {hint}there is {', '.join(sorted(known))}.")
    if not entry.get("path"):
        raise UserError(f"config.{where} has no path; every dataset of a mixture needs one.")
    whole = {key: value for key, value in default.to_dict().items() if key != "mixture"}
    return ConfigDict({**whole, "weight": None, **entry}, type_safe=False)


def _seed(section: Any, default: int) -> int:
    """The section's own seed, 0 included, else the default."""
    return default if section.get("seed", None) is None else section.seed


def _checked(share: tuple[float | None, float | None], where: str) -> tuple[float | None, float | None]:
    for key, value in zip(("fraction", "weight"), share):
        if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise UserError(f"config.{where}.{key} is {value!r}; it must be a number above 0.")
    if None not in share:
        raise UserError(f"config.{where} has a fraction and a weight; one of them says how many rows are taken.")
    return share


@dataclasses.dataclass(frozen=True)
class _Part:
    rows: sources.Rows
    read: Callable[[int], Any]
    size: int
    formatter: str
    key: Any
    pairs: bool


def _open(section: Any, name: str, kind: Kind, unpaired: bool) -> _Part:
    rows = sources.open_rows(section, name)
    template = section.template.to_dict() if section.get("template", None) else {}
    formatter, to_sample = formatters.find_formatter(section.formatter, rows.columns(), name, kind.takes, template)
    read, size, key = lambda index: to_sample(rows[index]), len(rows), [formatter, source_code(to_sample), template]
    if not (unpaired and _makes_pairs(read, size)):
        return _Part(rows, read, size, formatter, key, False)
    return _Part(rows, lambda index: samples.unpair(read(index // 2), index % 2), 2 * size, formatter, [*key, "halves"], True)


def _makes_pairs(read: Callable[[int], Any], size: int) -> bool:
    """Whether the first row that can be read is a pair or a ranking."""
    for index in range(min(20, size)):
        with contextlib.suppress(Bad):
            return isinstance(read(index), (Preference, Ranked))
    return False


def _all(parts: Sequence[_Part], shares: Sequence[tuple], seeds: Sequence[int], name: str) -> Samples:
    """The parts one after another; of each the rows that an epoch holds."""
    chosen, repeats = zip(*map(choose, (part.size for part in parts), counts([part.size for part in parts], shares), seeds))
    ends = [*itertools.accumulate(len(rows) for rows in chosen)]

    def find(index: int) -> tuple[_Part, int]:
        which = bisect.bisect_right(ends, index)
        return parts[which], int(chosen[which][index - (ends[which - 1] if which else 0)])

    def read(index: int) -> Any:
        part, row = find(index)
        return part.read(row)

    def raw(index: int) -> dict[str, Any]:
        part, row = find(index)
        return part.rows[row // 2 if part.pairs else row]

    def called(index: int) -> str:
        part, row = find(index)
        return str(row) if len(parts) == 1 else f"{row} of {Path(part.rows.description).name}"

    describe = lambda part, rows, times: f"{part.rows.description} ({times.sum()} of {part.size} rows an epoch)"
    mixed = " + ".join(map(describe, parts, chosen, repeats))
    whole = all(times.sum() == part.size and times.max() == 1 for part, times in zip(parts, repeats))
    return Samples(
        read=read,
        raw=raw,
        size=ends[-1],
        folder=lambda index: find(index)[0].rows.folder,
        name=called,
        repeats=None if all(times.max() == 1 for times in repeats) else np.concatenate(repeats),
        description=parts[0].rows.description if len(parts) == 1 and whole else mixed,
        formatter=", ".join(dict.fromkeys(part.formatter for part in parts)),
        identity=[[part.rows.identity, part.size, os.path.abspath(part.rows.folder), part.key, None if whole else [seed, int(times.sum())]]
                  for part, times, seed in zip(parts, repeats, seeds)],
        pairs=any(part.pairs for part in parts),
    )  # fmt: skip


def counts(sizes: Sequence[int], shares: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """How many rows of each dataset, of `sizes`, stand in an epoch; at least one of each.

    Args:
        sizes: rows of each dataset.
        shares: (fraction, weight) of each, one of them None or both.
    """
    weights = [weight for _, weight in shares]
    if None in weights:
        return [max(1, round(size * (1.0 if fraction is None else fraction))) for size, (fraction, _) in zip(sizes, shares)]
    exact = np.array(weights, float) / sum(weights) * sum(sizes)
    found = np.floor(exact).astype(int)
    found[np.argsort(found - exact, kind="stable")[: sum(sizes) - found.sum()]] += 1  # the largest remainders round up
    return np.maximum(found, 1).tolist()


def choose(size: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, how often each stands in an epoch): all of them where `count` is at least `size`, else a random choice, ascending."""
    times, rest = divmod(count, size)
    extra = np.sort(np.random.default_rng([seed, 2]).permutation(size)[:rest])
    if not times:
        return extra, np.ones(rest, np.int64)
    repeats = np.full(size, times)
    repeats[extra] += 1
    return np.arange(size), repeats
