"""The page shows what was read: tokens, masks, drops with their rows, lengths, the template."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from aligner import preview
from aligner.convert import model_from_folder
from aligner.data.kinds import ENCODERS
from aligner.data.loader import load_dataset
from tests.data import tiny
from tests.models import vision_folders


def test_a_page(tmp_path):
    rows = [{"prompt": f"what is {i}", "chosen": " yes" * (i + 1), "rejected": " yes no"} for i in range(6)]
    rows += [{"prompt": "p <b>", "chosen": "same", "rejected": "same"}, {"prompt": "p", "chosen": None, "rejected": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny.text_model()
    dataset = load_dataset(tiny.config(path), "train", model, progress=False)
    shown = preview.page(ConfigDict({"model": {"path": "some/model"}}), model, [dataset], rows=2, kind=ENCODERS["preference"])
    assert shown.count("<h3>chosen</h3>") == shown.count("<h3>rejected</h3>") == 2 and "<h3>answer" not in shown
    assert "6 of 8 rows kept" in shown and shown.count('<div class="row">') == 2
    assert "answers are equal" in shown and "p &lt;b&gt;" in shown and "<b>" not in shown.replace("&lt;b&gt;", "")
    assert f"6 rows, {dataset.fill:.1%} of their {dataset.shape[0]} columns are filled" in shown
    counts = [int(n) for n in re.findall(r"<td>\d+ to \d+</td><td>(\d+)</td>", shown)]
    assert sum(counts) == dataset.size and dataset.lengths.tolist() == [int((dataset.row(i)["segment_ids"] > 0).sum()) for i in range(6)]
    for what in ('class="prompt"', 'class="trained1', 'class="trained2', "common", "endfor"):
        assert what in shown, what
    assert not re.search(r'(src|href)="(?!data:)', shown), "it loads nothing"


def test_another_rows_answer_is_not_trained(tmp_path):
    rows = [{"prompt": f"what is {i}", "completion": " yes" * (i + 1), "label": True} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(tiny.config(path), "train", tiny.text_model(), "unpaired", progress=False)
    shown = preview.page(ConfigDict({"model": {"path": "some/model"}}), tiny.text_model(), [dataset], rows=3, kind=ENCODERS["unpaired"])
    assert shown.count("<h3>answer</h3>") == shown.count("<h3>another row's answer, for the KL alone</h3>") == 3
    rows = shown[shown.index('<div class="row">') :]
    assert "trained2" not in rows and "untrained" in rows
    trained = [int((row["score_role"] == 1).sum()) for row in map(dataset.row, range(3))]
    assert [int(n) for n in re.findall(r"(\d+) tokens trained", shown)] == trained


def test_lengths_of_packed_rows(tmp_path):
    rows = [{"prompt": f"what is {i}", "chosen": " yes" * (i + 1), "rejected": " no"} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(tiny.config(path, packing=True, packed_length=128), "train", tiny.text_model(), progress=False)
    assert dataset.lengths.tolist() == [int((dataset.row(i)["segment_ids"] > 0).sum()) for i in range(dataset.size)]


def test_prompts_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is this, number {i}"}) + "\n" for i in range(3)))
    for shared in (True, False):
        dataset = load_dataset(tiny.config(path, shared_prompt=shared), "train", tiny.text_model(), "prompt", progress=False)
        shown = preview.page(ConfigDict({"model": {"path": "some/model"}}), tiny.text_model(), [dataset], rows=3)
        assert re.sub("<.*?>", "", shown).count("what is this, number") == 3
        assert f"row 2: {dataset.lengths[2]} of {dataset.shape[0]} columns, 0 tokens trained" in shown


def test_a_sound_is_shown_as_its_spectrogram(tmp_path):
    """Pitch upwards, as long as it sounds."""
    model = model_from_folder(vision_folders.describe(tmp_path, "qwen2_audio"))
    data = vision_folders.rows(tmp_path / "rows", 3, sounds=True)
    dataset = load_dataset(tiny.config(data), "train", model, progress=False)
    row = dataset.row(2)
    first, second = preview.stills(row, model)
    frames, features = row["frames"].tolist(), [(n + 1) // 4 for n in row["frames"]]
    assert first.shape == (6, frames[0], 3) and second.shape == (6, frames[1], 3)
    np.testing.assert_array_equal(first[0, :, 0], row["pixel_values"][0, : frames[0], -1])
    shown = preview.page(ConfigDict({"model": {"path": "some/model"}}), model, [dataset], rows=3)
    assert shown.count('<img alt="image as fed"') == 0 + 1 + 2 and f"audio, {sum(features)} features" in shown


CONFIG = """
from configs import common, dpo_llava
def get_config(preset=""):
    config = dpo_llava.get_config("tiny")
    config.unlock()
    config.data.evals.others = common.data_source()
    config.data.evals.others.path, config.data.evals.others.size = config.data.eval.path, 3
    return config.lock()
"""


@pytest.mark.slow
def test_the_command(tmp_path):
    """All that would be evaluated is shown; a page that cannot be written is told at once. What a preset makes has a folder for each config."""
    (tmp_path / "config.py").write_text(CONFIG)
    run = lambda out: subprocess.run(
        [sys.executable, "-m", "aligner.preview", f"--config={tmp_path / 'config.py'}", f"--out={out}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    refused = run(tmp_path / "nowhere" / "page.html")
    assert refused.returncode == 2 and refused.stderr.endswith("nowhere/page.html cannot be written: No such file or directory\n")
    assert not (tmp_path / "runs").exists()
    done = run(tmp_path / "page.html")
    assert [*(tmp_path / "runs" / "preview").iterdir()] == [tmp_path / "runs" / "preview" / "config"]
    assert done.returncode == 0 and "up to 8 rows of data.train, data.eval, data.evals.others" in done.stdout, done.stderr
    shown = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(data.*?)</h2>", shown) == ["data.train", "data.eval", "data.evals.others"]
    assert shown.count('<img alt="image as fed"') == 8 + 8 + 3


def test_tokens_read_as_the_text_they_stand_for(tmp_path):
    """Characters of several tokens, spaces that a SentencePiece tokenizer keeps in its words, half characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "▁a", "▁cat", "s", "a", "<0xF0>", "<0x9F>", "<0x90>", "<0x88>"])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    row = {"tokens": np.array([2, 3, 4, 3, 6, 7, 8, 9, 6, 1]), "role": np.ones(10, int)}
    model = SimpleNamespace(assets=SimpleNamespace(tokenizer=pieces))
    shown = preview.tokens_html(row, np.ones(10, bool), np.arange(10) < 8, model)
    assert re.findall(r"class=\"([\w ]+)\" title=\"(.*?)\">(.*?)</span>", shown) == [
        ("trained1", "2", " a"), ("trained1", "3", " cat"), ("trained1", "4", "s"), ("trained1", "3", " cat"),
        ("trained1", "6, 7, 8, 9", "🐈"), ("untrained", "6", "�"), ("untrained", "1", "&lt;/s&gt;"),
    ]  # fmt: skip
    bytewise = tiny.tokenizer()
    text = "a cat 🐈, 中国\nin the house</s>"
    ids = bytewise(text)["input_ids"]
    row = {"tokens": np.array(ids), "role": np.zeros(len(ids), int)}
    shown = preview.tokens_html(row, np.ones(len(ids), bool), np.zeros(len(ids), bool), SimpleNamespace(assets=SimpleNamespace(tokenizer=bytewise)))
    assert html.unescape(re.sub("<.*?>", "", shown)) == text.replace("\n", "⏎\n")
