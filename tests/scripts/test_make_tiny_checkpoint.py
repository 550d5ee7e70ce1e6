"""The demo set leaves only the picture to decide, and the checkpoints are what Hugging Face's loaders expect."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from PIL import Image

from aligner.types import UserError
from configs.common import base
from scripts.audio_demo import setup_qwen2_audio_demo
from scripts.make_tiny_checkpoint import (
    IMAGE,
    blank_pictures,
    make_llama,
    make_llava,
    make_pictures,
    make_tokenizer,
    setup_llama_demo,
    setup_llava_demo,
    setup_qwen_demo,
    setup_teacher_demo,
)
from scripts.online_demo import setup_colours, setup_sums

ROOT = Path(__file__).parents[2]
SMALL = dict(vocab_size=300, hidden_size=16, layers=1, heads=2, kv_heads=1)
SMALL_VISION = dict(image_size=28, patch_size=7, vision_hidden_size=8, vision_layers=2, vision_heads=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_pictures(folder, n_train=96, n_heldout=48, seed=3)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "model"
    make_llava(folder, **SMALL, **SMALL_VISION)
    return folder


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels(folder, split):
    return [hashlib.sha256(Image.open(folder / row["image"]).tobytes()).hexdigest() for row in rows(folder, split)]


# ---- the pictures


@pytest.mark.parametrize(("split", "n"), [("train", 96), ("heldout", 48)])
def test_every_pair_of_answers_is_right_equally_often_either_way(pictures, split, n):
    data = rows(pictures, split)
    assert len(data) == n and set(data[0]) == {"image", "question", "chosen", "rejected"}
    ordered = Counter((row["question"], row["chosen"], row["rejected"]) for row in data)
    assert ordered == Counter((row["question"], row["rejected"], row["chosen"]) for row in data)
    assert len({row["question"] for row in data}) == 4 and all(row["chosen"] != row["rejected"] for row in data)
    assert set(Counter(row["question"] for row in data).values()) == {n // 4}


def test_balance_holds_where_the_rows_do_not_divide_evenly(tmp_path):
    make_pictures(tmp_path / "data", n_train=22, n_heldout=2)
    data = rows(tmp_path / "data", "train")
    assert len(data) == 22
    chosen = Counter((row["question"], row["chosen"]) for row in data)
    assert chosen == Counter((row["question"], row["rejected"]) for row in data)


def test_no_picture_stands_twice(pictures):
    train, heldout = pixels(pictures, "train"), pixels(pictures, "heldout")
    assert len(set(train)) == len(train) == 96 and len(set(heldout)) == len(heldout) == 48
    assert not set(train) & set(heldout)


def test_the_picture_shows_the_chosen_colour_and_side(pictures):
    """A reader of pixels that knows nothing of the code's attributes answers two of the kinds right."""
    import numpy as np

    for row in rows(pictures, "train"):
        image = np.asarray(Image.open(pictures / row["image"]), float)
        coloured = np.ptp(image, axis=-1) > 60  # the ground is grey
        red, green, blue = image[coloured].mean(0)
        seen = "yellow" if min(red, green) > 120 else ("red", "green", "blue")[int(np.argmax((red, green, blue)))]
        side = "left" if np.nonzero(coloured)[1].mean() < image.shape[1] / 2 - 0.5 else "right"
        if "colour" in row["question"]:
            assert row["chosen"] == f"It is {seen}."
        if "left" in row["question"]:
            assert row["chosen"] == f"It is on the {side}."


def test_blanked_pictures_are_all_the_same_and_the_rows_stay(pictures, tmp_path):
    blank_pictures(pictures, tmp_path / "blank")
    assert rows(tmp_path / "blank", "heldout") == rows(pictures, "heldout")
    assert len(set(pixels(tmp_path / "blank", "train") + pixels(tmp_path / "blank", "heldout"))) == 1


def test_an_odd_split_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"even number of rows.*7 were asked for; use 8"):
        make_pictures(tmp_path / "data", n_train=7, n_heldout=2)
    assert not list(tmp_path.iterdir())


# ---- the checkpoints


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(pictures, llava, tmp_path):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | SMALL_VISION).items()]
    command = [sys.executable, "scripts/make_tiny_checkpoint.py", "--out", tmp_path / "model", *sizes]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "model") == contents(llava)
    make_pictures(tmp_path / "data", n_train=96, n_heldout=48, seed=3)
    assert contents(tmp_path / "data") == contents(pictures)
    make_pictures(tmp_path / "other", n_train=96, n_heldout=48, seed=4)
    assert contents(tmp_path / "other").keys() == contents(pictures).keys() and contents(tmp_path / "other") != contents(pictures)


def test_processor_places_one_image_token_per_feature(llava, pictures):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava)
    image = Image.open(pictures / rows(pictures, "train")[0]["image"])
    out = processor(images=[image, image], text=["USER: <image>\nWhat is it? ASSISTANT:"] * 2, return_tensors="np")
    assert out["pixel_values"].shape == (2, 3, 28, 28)
    assert (out["input_ids"] == IMAGE).sum(1).tolist() == [16, 16]
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id == IMAGE
    assert out["input_ids"][0, 0] == processor.tokenizer.bos_token_id


def test_template_reads_both_ways_of_writing_content(llava):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava)
    render = lambda messages, **options: processor.apply_chat_template(messages, tokenize=False, **options)
    parts = lambda text: [{"type": "image"}, {"type": "text", "text": text}]
    as_list = [{"role": "user", "content": parts("Which?")}, {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]
    as_text = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "This."}]
    assert render(as_list) == render(as_text) == "USER: <image>\nWhich? ASSISTANT: This.</s>"
    assert render(as_list[:1], add_generation_prompt=True) == "USER: <image>\nWhich? ASSISTANT:"
    assert render(2 * as_text) == 2 * render(as_text)
    system = [{"role": "system", "content": "Be brief."}, *as_text]
    assert render(system) == "Be brief. " + render(as_text)

    ids = lambda text: processor.tokenizer(text)["input_ids"]
    prompt, whole = ids(render(as_text[:1], add_generation_prompt=True)), ids(render(as_text))
    assert whole[: len(prompt)] == prompt and whole[-1] == processor.tokenizer.eos_token_id


def test_llama_template_and_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    make_llama(tmp_path / "llama", **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>[user]\nWhich?\n[assistant]\nThis.</s>\n"
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(prompt)] == prompt and ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_takes_any_text_and_knows_the_demo():
    tokenizer = make_tokenizer(512)
    for text in ("naïve café — 猫が好き 🙂\n\ttab", "It is a square.", "<image>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("It is yellow.")["input_ids"]) <= 5 and len(tokenizer) <= 512
    assert len(make_tokenizer(261)) == 261
    with pytest.raises(UserError, match=r"vocab_size 260 is too small.*at least 261"):
        make_tokenizer(260)


# ---- the preset's setup


def demo_config(folder):
    config, folder = base(), folder / "demo"
    config.model.path = str(folder / "model")
    config.data.train.path, config.data.eval.path = str(folder / "data/train.jsonl"), str(folder / "data/heldout.jsonl")
    return config


SETUPS = (setup_llava_demo, setup_llama_demo, setup_qwen_demo, setup_teacher_demo, setup_qwen2_audio_demo, setup_sums, setup_colours)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.__name__)
def test_setup_makes_nothing_at_a_path_that_was_given(setup, tmp_path, monkeypatch):
    """A misspelt checkpoint, or one of the Hub, was made small and random there, and trained."""
    monkeypatch.chdir(tmp_path)
    config = base()
    config.model.path, config.data.train.path, config.data.eval.path = "organisation/name", "mine/data/train.jsonl", "mine/data/heldout.jsonl"
    config.algorithm = ConfigDict({"teacher": "organisation/teacher", "reward_funcs": ()})
    setup(config)
    assert not list(tmp_path.iterdir())


def test_setup_makes_what_is_missing_once(tmp_path, capsys):
    config = demo_config(tmp_path / "run")
    setup_llava_demo(config)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and config.model.path in said
    assert sorted(path.name for path in (tmp_path / "run/demo").iterdir()) == ["data", "model"]
    assert not set(pixels(tmp_path / "run/demo/data", "train")) & set(pixels(tmp_path / "run/demo/data", "heldout"))
    before = contents(tmp_path / "run")
    setup_llava_demo(config)
    assert capsys.readouterr().out == "" and contents(tmp_path / "run") == before


def test_setup_leaves_other_data_alone_and_never_mixes_folders(tmp_path):
    config = demo_config(tmp_path)
    make_llava(config.model.path, **SMALL, **SMALL_VISION)
    config.data.train.path, config.data.eval.path = str(tmp_path / "mine.jsonl"), ""
    setup_llava_demo(config)
    assert not (tmp_path / "demo/data").exists()
    config = demo_config(tmp_path)
    (tmp_path / "demo/data").mkdir()
    (tmp_path / "demo/data/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        setup_llava_demo(config)
