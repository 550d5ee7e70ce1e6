"""DPO runs with every family that sees or hears, from a folder and rows of pictures, clips or sounds to an exported folder."""

import json
import math

import jax
import numpy as np
import pytest

import aligner
from aligner import generate, metrics, run, score
from aligner.trees import flatten
from tests.models import tiny, vision_folders
from tests.models.vision_configs import CASES, VIDEOS


@pytest.mark.slow
@pytest.mark.parametrize("family", [*CASES, "pixtral"])
def test_dpo_runs(family, tmp_path, monkeypatch):
    quick = tiny.QUICK | {"xla_allow_excess_precision": False}
    monkeypatch.setattr(run, "jit", lambda function, mesh=None, **options: jax.jit(function, compiler_options=quick, **options))
    folder = vision_folders.save(tmp_path, "llava", 4) if family == "pixtral" else vision_folders.save(tmp_path, family)
    data = vision_folders.rows(tmp_path / "rows", videos=family in VIDEOS, sounds=family == "qwen2_audio")
    config = tiny.config(model__path=str(folder), data__max_length=512, data__pad_to_multiple=8, data__batch_size=4, data__workers=2, data__video_frames=3,
                         train__steps=2, log__every=1, optim__learning_rate=1e-2, optim__warmup=0.0, checkpoint__export=True,
                         mesh__data=1)  # fmt: skip
    config.data.train.path, config.data.train.image_folder = str(data), str(data.parent)
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
    run.run(config, tmp_path / "run")
    records = [record for record in metrics.read(tmp_path / "run") if record["split"] == "train"]
    assert len(records) == 2
    assert abs(records[0]["loss"] - math.log(2)) < 1e-6, "policy and reference are the same at first"
    assert abs(records[1]["loss"] - math.log(2)) > 1e-6
    (_, before), (model, after) = aligner.load(folder), aligner.load(tmp_path / "run" / "export")
    before, after = flatten(before), flatten(after)
    still = {path for path in before if np.array_equal(before[path], after[path])}
    unused = {path for path in still for prefix in model.trained_layers if path.startswith(prefix)}
    assert not {path for path in still - unused if not path.endswith("mask_token")}, "these leaves have not moved"


@pytest.mark.slow
def test_rows_with_videos_are_scored_and_answered(tmp_path):
    """And what a clip shows counts."""
    folder, data = vision_folders.save(tmp_path, "llava_next_video"), vision_folders.rows(tmp_path / "rows", 4, videos=True)
    common = ["--model", str(folder), "--data", str(data), "--dtype", "float32", "--batch-size", "4", "--video-frames", "3"]
    read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert score.main([*common, "--out", str(tmp_path / "scored.jsonl"), "--kind", "logprob"]) == 0
    assert generate.main([*common, "--out", str(tmp_path / "answered.jsonl"), "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert [len(row["completions"]) for row in read("answered.jsonl")] == [1, 1, 1, 1]
    assert [row["prompt"][0]["content"].count("<video>") for row in read("answered.jsonl")] == [0, 1, 0, 1]
    (data.parent / "1.mp4").write_bytes((data.parent / "3.mp4").read_bytes())
    assert score.main([*common, "--out", str(tmp_path / "again.jsonl"), "--kind", "logprob"]) == 0
    before, after = ([row["logps"] for row in read(name)] for name in ("scored.jsonl", "again.jsonl"))
    assert np.isfinite(before).all() and [a == b for a, b in zip(before, after)] == [True, False, True, True]
