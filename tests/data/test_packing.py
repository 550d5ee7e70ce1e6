"""Plans: every example once, no row too full, the same everywhere."""

import numpy as np
import pytest

from aligner.data.packing import cut_stream, derangement, first_fit, one_per_row


@pytest.mark.parametrize("seed", [0, 1, None])
@pytest.mark.parametrize("count", [1, 7, 5000])
def test_first_fit(count, seed):
    lengths = np.random.default_rng(3).integers(1, 101, count)
    plan = first_fit(lengths, 128, seed)
    assert np.sort(plan.members[:, 0]).tolist() == list(range(count)), "every example once"
    filled = plan.sums(lengths)
    assert len(filled) == len(plan) and filled.max() <= 128 and filled.sum() == lengths.sum()
    assert (np.diff(plan.starts) > 0).all()
    again = first_fit(lengths, 128, seed)
    assert np.array_equal(plan.members, again.members) and np.array_equal(plan.starts, again.starts)
    if count == 5000:
        assert lengths.sum() / (128 * len(plan)) > 0.95


def test_first_fit_by_hand():
    plan = first_fit(np.array([6, 5, 4, 5, 10, 1]), 10, None)
    assert [plan.row(number)[:, 0].tolist() for number in range(len(plan))] == [[0, 2], [1, 3], [4], [5]]


def test_another_seed_packs_otherwise():
    lengths = np.random.default_rng(3).integers(1, 50, 100)
    assert not np.array_equal(first_fit(lengths, 64, 0).members, first_fit(lengths, 64, 1).members)


def test_one_per_row():
    plan = one_per_row(3)
    assert len(plan) == 3 and plan.row(2).tolist() == [[2, 0, -1]] and plan.sums(np.array([4, 5, 6])).tolist() == [4, 5, 6]


@pytest.mark.parametrize(("lengths", "capacity"), [([3, 5, 2, 20, 1, 1], 8), ([8, 8], 8), ([5], 8), ([16, 1], 8), ([1] * 30, 7)])
def test_cut_stream(lengths, capacity):
    plan = cut_stream(np.array(lengths), capacity)
    rows = [plan.row(number) for number in range(len(plan))]
    filled = [int((row[:, 2] - row[:, 1]).sum()) for row in rows]
    assert filled[:-1] == [capacity] * (len(rows) - 1) and sum(filled) == sum(lengths), "all rows full but the last"
    stream = [(document, token) for row in rows for document, start, end in row for token in range(start, end)]
    assert stream == [(document, token) for document, length in enumerate(lengths) for token in range(length)]


def test_derangement():
    ids = np.sort(np.random.default_rng(0).choice(10_000, 997, replace=False))
    partner = derangement(ids, seed=5)
    assert (partner != np.arange(997)).all() and np.sort(partner).tolist() == list(range(997))
    assert np.array_equal(partner, derangement(ids, seed=5)) and not np.array_equal(partner, derangement(ids, seed=6))
    assert derangement(ids[:2], 0).tolist() == [1, 0]
