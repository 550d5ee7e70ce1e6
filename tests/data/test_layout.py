"""Every array of a row, by hand."""

import numpy as np
import pytest

from aligner.data.layout import empty_row, lay_out, pair_row, round_up, shape_of
from aligner.data.templates import Encoded
from aligner.types import Media

MEDIA = Media(placeholder=99, features=2, height=4, width=4)


def ids(*values):
    return np.array(values, np.int32)


PAIR = Encoded(ids(5, 6, 7), (ids(11, 12), ids(21, 22, 23)))
SEEN = Encoded(ids(5, 99, 99, 6, 99, 99), (ids(11), ids(21, 22)), (("image", "a.png"), ("image", "b.png")))


def check(row, **expected):
    for name, values in expected.items():
        assert row[name].tolist() == values, name
        assert row[name].dtype == (np.bool_ if name == "image_mask" else np.int32), name


def test_shared_prompt():
    assert shape_of(PAIR) == (8, 5, 0)
    check(
        pair_row(PAIR, T=10, S=6, I=0, example_id=4),
        tokens=[5, 6, 7, 11, 12, 21, 22, 23, 0, 0],
        positions=[0, 1, 2, 3, 4, 3, 4, 5, 0, 0],
        segment_ids=[1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        role=[0, 0, 0, 1, 1, 2, 2, 2, 0, 0],
        score_from=[2, 3, 2, 5, 6, 0],
        score_token=[11, 12, 21, 22, 23, 0],
        score_segment=[1, 1, 1, 1, 1, 0],
        score_role=[1, 1, 2, 2, 2, 0],
        example_id=[4],
    )


def test_duplicated_prompt():
    assert shape_of(PAIR, shared=False) == (11, 5, 0)
    check(
        pair_row(PAIR, T=12, S=5, I=0, shared=False),
        tokens=[5, 6, 7, 11, 12, 5, 6, 7, 21, 22, 23, 0],
        positions=[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0],
        segment_ids=[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0],
        role=[0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 0],
        score_from=[2, 3, 7, 8, 9],
        score_token=[11, 12, 21, 22, 23],
        score_segment=[1, 1, 1, 1, 1],
        score_role=[1, 1, 2, 2, 2],
        example_id=[0],
    )


@pytest.mark.parametrize("shared", [True, False])
def test_images(shared):
    T, S, I = shape_of(SEEN, shared)
    row = pair_row(SEEN, T + 1, S, I + 1, MEDIA, shared)
    copy = [-1, 0, 1, -1, 2, 3]
    index = [*copy, -1, -1, -1, -1] if shared else [*copy, -1, *copy, -1, -1, -1]
    check(row, media_index=index, image_mask=[True, True, False])
    assert row["pixel_values"].shape == (3, 4, 4, 3) and row["pixel_values"].dtype == np.float32
    assert (row["tokens"][row["media_index"] >= 0] == MEDIA.placeholder).all()


def test_several_examples_in_a_row():
    one = Encoded(ids(1, 2), (ids(3),))
    row = lay_out([SEEN, one, SEEN], [7, 8, 9], T=24, S=8, I=4, media=MEDIA)
    check(
        row,
        example_id=[7, 8, 9],
        segment_ids=[1] * 9 + [2] * 3 + [3] * 9 + [0] * 3,
        positions=[0, 1, 2, 3, 4, 5, 6, 6, 7, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 6, 7, 0, 0, 0],
        score_segment=[1, 1, 1, 2, 3, 3, 3, 0],
        score_from=[5, 5, 7, 10, 17, 17, 19, 0],
        media_index=[-1, 0, 1, -1, 2, 3] + [-1] * 7 + [4, 5, -1, 6, 7] + [-1] * 6,
        image_mask=[True] * 4,
    )


@pytest.mark.parametrize("shared", [True, False])
def test_scored_tokens_follow_their_sources(shared):
    """Whatever the layout: the scored token is the next of its own answer, and its source sees the whole prompt."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        answers = tuple(rng.integers(1, 50, rng.integers(1, 6)).astype(np.int32) for _ in range(rng.integers(1, 4)))
        encoded = Encoded(rng.integers(1, 50, rng.integers(1, 6)).astype(np.int32), answers)
        T, S, _ = shape_of(encoded, shared)
        row = pair_row(encoded, T + 3, S + 2, 0, shared=shared)
        for r, answer in enumerate(answers, start=1):
            mine = row["score_role"] == r
            assert row["score_token"][mine].tolist() == answer.tolist()
            sources = row["score_from"][mine]
            assert row["positions"][sources].tolist() == list(range(len(encoded.prompt) - 1, len(encoded.prompt) + len(answer) - 1))
            assert row["tokens"][sources].tolist() == [encoded.prompt[-1], *answer[:-1]]
            assert set(row["role"][sources[1:]]) <= {r} and row["role"][sources[0]] == 0


def test_empty_row_has_the_same_arrays():
    full, empty = pair_row(SEEN, 12, 4, 2, MEDIA), empty_row(12, 4, 2, MEDIA)
    assert {name: (a.shape, a.dtype) for name, a in full.items()} == {name: (a.shape, a.dtype) for name, a in empty.items()}
    assert not empty["score_segment"].any() and not empty["segment_ids"].any() and not empty["image_mask"].any()
    assert empty["example_id"].tolist() == [-1] and (empty["media_index"] == -1).all()


def test_round_up():
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
