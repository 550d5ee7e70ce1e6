"""Rows that nobody here wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from aligner.data.loader import batches, eval_batches, load_dataset
from aligner.types import UserError
from tests.data import tiny

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data, ../shared/data, is not here")


def load(path, model=None, **options):
    options = dict(max_length=1 << 20) | options
    return load_dataset(tiny.config(path, **options), "train", model or tiny.text_model(), progress=False)


@pytest.mark.parametrize(
    ("name", "size", "formatter"),
    [
        ("hh_rlhf_harmless.jsonl", 200, "trl"),
        ("dpo_en_demo.json", 100, "sharegpt"),
        ("autoalign_ultra_binary.jsonl", None, "trl"),
        ("autoalign_dummy_dpo.json", None, "sharegpt"),
    ],
)
def test_text_pairs(name, size, formatter):
    dataset = load(SHARED / "text" / name, size=size)
    assert f"formatter {formatter}:" in dataset.report[0]
    lost = {"answers are equal", "empty answer"}  # rows of hh-rlhf whose answers are the same, or where one has none
    assert set(dataset.dropped) <= lost and dataset.size > 0.95 * dataset.rows_total
    batch = next(batches(dataset, 2, seed=0, shuffle=True))
    assert (batch["score_segment"] > 0).any(axis=1).all()


@pytest.mark.parametrize(
    ("name", "needs", "options", "formatter", "fill"),
    [
        ("alpaca_en_demo.json", "supervised", dict(size=300, max_length=1024), "alpaca", 0.93),
        ("gsm8k.jsonl", "supervised", dict(size=300, max_length=1024), "question_answer", 0.9),
        ("autoalign_dummy_sft.json", "supervised", {}, "conversations", None),
        ("kto_en_demo.json", "unpaired", dict(size=100), "labelled_messages", None),
        ("dpo_en_demo.json", "unpaired", dict(size=50), "sharegpt", None),
        ("hh_rlhf_harmless.jsonl", "preference", dict(size=200, max_length=2048), "trl", 0.9),
        ("wiki_demo.txt", "text", dict(sample_by="line", max_length=2048), "text", 0.99),
        ("pku_saferlhf_32.json", "preference_last", {}, "safe_rlhf", None),
    ],
)
def test_other_kinds(name, needs, options, formatter, fill):
    """They load and lay out, packed where a fill rate is asked for."""
    model = tiny.text_model()
    options = {"max_length": 1 << 20, "packing": bool(fill)} | options
    dataset = load_dataset(tiny.config(SHARED / "text" / name, **options), "train", model, needs, progress=False)
    assert f"formatter {formatter}:" in dataset.report[0]
    assert set(dataset.dropped) <= {"too long", "answers are equal", "empty answer"}
    assert fill is None or dataset.fill > fill
    batch = next(batches(dataset, 2, seed=0, shuffle=True))
    assert (batch["score_segment"] > 0).any(axis=1).all()


def test_pictures_in_later_turns(tmp_path):
    """Multimodal chats with two turns, each with a picture."""
    path = SHARED / "image" / "mllm_demo.json"
    dataset = load_dataset(tiny.config(path), "train", tiny.image_model(), "supervised", progress=False)
    assert dataset.size == 6 and dataset.shape[2] == 2 and dataset.dropped == {}


def test_other_kinds_of_rows_are_refused_with_what_they_lack():
    with pytest.raises(UserError, match=r"columns question, answer;.*needs"):
        load(SHARED / "text" / "gsm8k.jsonl")
    with pytest.raises(UserError, match=r"7 of 7 rows .*no ranked answers: 7"):
        load(SHARED / "image" / "vl_sft.json", tiny.image_model())
    with pytest.raises(UserError, match=r"unreadable image: 5 .*000000013249.jpg: does not exist"):
        load(SHARED / "image" / "vl_ranked_rewards.json", tiny.image_model())


def test_ranked_answers(tmp_path):
    from PIL import Image

    path = SHARED / "image" / "vl_ranked_rewards.json"
    for row in json.loads(path.read_text()):
        Image.new("RGB", (20, 10)).save(tmp_path / row["image"])
    dataset = load(path, tiny.image_model(), image_folder=str(tmp_path))
    assert dataset.size == 5 and dataset.shape[2] == 1


def test_scienceqa_as_pairs(tmp_path):
    folder = SHARED / "image" / "scienceqa"
    rows = []
    for row in json.loads((folder / "questions.json").read_text())[:40]:
        question = row["conversations"][0]["value"]
        wrong = next(letter for letter in "ABCDE" if letter != row["label"] and f"({letter})" in question)
        rows.append({"image": row["image"], "question": question, "chosen": row["label"], "rejected": wrong})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.image_model(size=16)
    dataset = load(path, model, image_folder=str(folder / "images"))
    assert dataset.dropped == {} and dataset.size == 40
    seen = list(eval_batches(dataset, 16))
    assert len(seen) == 3 and all(np.isfinite(batch["pixel_values"]).all() for batch in seen)
    assert (np.concatenate([batch["media_index"] for batch in seen]) >= 0).sum() == 40 * model.media.features
