"""Prompts that are scored (ORPO), two prompts in one example (SSO), judged answers without a partner (APO-zero, BCO)."""

import json

import numpy as np
import pytest

from aligner.data import formatters, loader, templates
from aligner.data.layout import lay_out
from aligner.data.samples import Bad, TwoSided, as_two_sided
from aligner.data.templates import Encoded
from aligner.likelihood import answer_lengths
from tests.data import tiny

IMAGE = 3
PAIRS = [
    {"prompt": "what is this", "chosen": "a cat in the house", "rejected": "no"},
    {"prompt": "USER: what is the answer", "chosen": "one two", "rejected": "the answer is three"},
]


def scored(row: dict, role: int) -> list[tuple[int, int]]:
    """(token that predicts, token predicted) of each scored position of a role."""
    here = (row["score_segment"] > 0) & (row["score_role"] == role)
    return [(int(row["tokens"][a]), int(b)) for a, b in zip(row["score_from"][here], row["score_token"][here])]


@pytest.mark.parametrize("shared", [True, False])
def test_a_scored_prompt_is_scored_once(shared):
    examples = [
        Encoded(np.array([5, IMAGE, IMAGE, 6, 7], np.int32), (np.array([8, 9], np.int32), np.array([10], np.int32)), (("image", "picture"),)),
        Encoded(np.array([11, 12], np.int32), (np.array([13], np.int32), np.array([14, 15], np.int32))),
    ]
    media = tiny.Media(IMAGE, 2, 4, 4)
    row = lay_out(examples, [4, 7], 30, 20, 1, media, shared, prompt=True)
    assert scored(row, 0) == [(IMAGE, 6), (6, 7), (11, 12)]  # not the first token, not the pictures
    assert scored(row, 1) == [(7, 8), (8, 9), (12, 13)] and scored(row, 2) == [(7, 10), (12, 14), (14, 15)]
    batch = {name: x[None] for name, x in row.items()}
    np.testing.assert_array_equal(answer_lengths(batch, 2)[0], [[2, 1], [1, 2]])  # prompts belong to no answer
    plain = lay_out(examples, [4, 7], 30, 20, 1, media, shared)
    assert not scored(plain, 0) and scored(plain, 1) == scored(row, 1) and scored(plain, 2) == scored(row, 2)


def test_the_loader_makes_room_for_scored_prompts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    model = tiny.text_model()
    load = lambda needs: loader.load_dataset(tiny.config(path, pad_to_multiple=1), "train", model, needs)
    plain, whole = load("preference"), load("preference_prompt")
    for number in range(2):
        short, long = plain.row(number), whole.row(number)
        prompt = int((long["role"] == 0)[long["segment_ids"] > 0].sum())
        assert len(scored(long, 0)) == prompt - 1
        assert scored(long, 1) == scored(short, 1) and scored(long, 2) == scored(short, 2)


SSO = {
    "p_system": "the answer is a house", "n_system": "the answer is no", "system": None, "uuid": "1",
    "chosen": [{"from": "human", "value": "what is this"}, {"from": "gpt", "value": "a cat"}],
    "rejected": [{"from": "human", "value": "what is this"}, {"from": "gpt", "value": "a dog"}],
    "raw": [{"from": "human", "value": "what is this"}, {"from": "gpt", "value": "no"}],
}  # fmt: skip


def test_sso_rows_are_two_pairs():
    name, to_sample = formatters.find_formatter("auto", list(SSO), "data.train", (TwoSided,))
    sample = to_sample(SSO)
    last = lambda answer: answer[-1]["content"]
    assert name == "sso"
    assert sample.good.prompt[0] == {"role": "system", "content": SSO["p_system"]} and sample.bad.prompt[0]["content"] == SSO["n_system"]
    assert sample.good.prompt[1:] == sample.bad.prompt[1:] == [{"role": "user", "content": "what is this"}]
    assert (last(sample.good.chosen), last(sample.good.rejected)) == ("a cat", "a dog")
    assert (last(sample.bad.chosen), last(sample.bad.rejected)) == ("no", "a cat")


def test_each_answer_of_two_sides_follows_its_own_prompt():
    model = tiny.text_model()
    sample = formatters.find_formatter("sso", list(SSO), "data.train", (TwoSided,))[1](SSO)
    encoded = templates.encode_two_sided(sample, model.assets)
    sides = [templates.encode_preference(pair, model.assets) for pair in (sample.good, sample.bad)]
    for role, (answer, mask) in enumerate(zip(encoded.answers, encoded.scored)):
        side = sides[role // 2]
        np.testing.assert_array_equal(np.concatenate([encoded.prompt, answer]), np.concatenate([side.prompt, side.answers[role % 2]]))
        np.testing.assert_array_equal(answer[mask], side.answers[role % 2])
    row = lay_out([encoded], [0], 200, 60, 0)
    for role in range(1, 5):
        side, answer = sides[(role - 1) // 2], sides[(role - 1) // 2].answers[(role - 1) % 2]
        before = [int(side.prompt[-1]), *answer[:-1].tolist()]
        assert scored(row, role) == list(zip(before, answer.tolist()))
        own = (row["role"] == 0) | (row["role"] == role)
        np.testing.assert_array_equal(row["positions"][own & (row["segment_ids"] > 0)], np.arange(len(side.prompt) + len(answer)))


def test_pictures_of_two_sides_are_the_same_ones():
    """Each answer's own part of the prompt shows the row's pictures from the first on."""
    model = tiny.image_model()
    row = {**SSO, "images": ["a.png"]}
    sample = formatters.find_formatter("sso", list(row), "data.train", (TwoSided,))[1](row)
    encoded = templates.encode_two_sided(sample, model.assets, model.media)
    assert encoded.media == (("image", "a.png"),)
    laid = lay_out([encoded], [0], 300, 60, 1, model.media)
    for role in range(1, 5):
        own = (laid["segment_ids"] > 0) & ((laid["role"] == 0) | (laid["role"] == role)) & (laid["tokens"] == model.media.placeholder)
        np.testing.assert_array_equal(laid["media_index"][own], np.arange(model.media.features))


def test_two_sides_that_are_none():
    sample = formatters.find_formatter("sso", list(SSO), "data.train", (TwoSided,))[1](SSO)
    with pytest.raises(Bad, match="not a TwoSided"):
        as_two_sided(sample.good)
    with pytest.raises(Bad, match="answers are equal"):
        as_two_sided(TwoSided(sample.good, sample.good.__class__(sample.bad.prompt, sample.bad.chosen, sample.bad.chosen)))


def test_a_judged_answer_may_stand_alone(tmp_path):
    path = tmp_path / "judged.jsonl"
    rows = [{"prompt": "what is", "completion": "a cat", "label": True}, {"prompt": "what is", "completion": "a dog", "label": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = loader.load_dataset(tiny.config(path), "train", tiny.text_model(), "unpaired_alone")
    beside = loader.load_dataset(tiny.config(path), "train", tiny.text_model(), "unpaired")
    assert (alone.answers, beside.answers) == (1, 2)
    for number, row in enumerate(rows):
        assert alone.row(number)["label"] == row["label"]
        assert scored(alone.row(number), 1) == scored(beside.row(number), 1) and not scored(alone.row(number), 2)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(rows[0]) + "\n")
    assert loader.load_dataset(tiny.config(one), "train", tiny.text_model(), "unpaired_alone").size == 1  # no other row is needed
