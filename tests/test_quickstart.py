"""The README's first command, as it stands there: it learns to answer by what it sees, and cannot without seeing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from scripts.make_tiny_checkpoint import blank_pictures
from tests.resume.runs import ROOT

pytestmark = pytest.mark.slow


def quickstart(workdir, *more):
    command = [sys.executable, "-m", "aligner.main", "--config", "configs/dpo_llava.py:tiny", "--workdir", str(workdir), *more]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["split"]) == (200, "eval")
    return last["rewards/accuracies"], done.stderr


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    return workdir, *quickstart(workdir)


def test_learns_by_seeing(seeing):
    workdir, accuracy, told = seeing
    assert accuracy >= 0.95
    for name in ("config.json", "assets/config.json", "assets/tokenizer.json", "metrics.jsonl", "checkpoints/200", "curves.png",
                 "export/model.safetensors", "export/config.json"):  # fmt: skip
        assert (workdir / name).exists(), name
    for what in ("metrics.jsonl", "curves.png", "checkpoints/200", "export"):
        assert f"{workdir}/{what}" in told  # where to find it
    assert any(workdir.glob("reference/train-*/part-*.npz"))
    assert any(workdir.glob("reference/eval-*/part-*.npz"))
    with Image.open(workdir / "curves.png") as curves:
        assert min(curves.size) > 200
        assert len(curves.convert("RGB").getcolors(1 << 24)) > 20


def test_chance_without_seeing(seeing, tmp_path):
    """The same with every picture grey: question and answers alone tell nothing."""
    workdir = seeing[0]
    blank_pictures(workdir / "demo" / "data", tmp_path / "run" / "demo" / "data")
    shutil.copytree(workdir / "demo" / "model", tmp_path / "run" / "demo" / "model")
    accuracy, _ = quickstart(tmp_path / "run", "--config.checkpoint.export=False")
    assert 0.4 <= accuracy <= 0.6
