"""Every config runs: two steps of its `:tiny` preset on eight simulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resume.runs import ROOT, TIMEOUT, WITHOUT_TORCH

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))


EVERYDAY = ("dpo_llava",)


@pytest.mark.parametrize(
    "config", [pytest.param(path, id=path.stem, marks=[] if path.stem in EVERYDAY else pytest.mark.slow) for path in CONFIGS]
)
def test_two_steps(config: Path, tmp_path: Path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    sizes = ["--config.train.steps=2", "--config.data.train.size=32", "--config.data.eval.size=32", "--config.data.batch_size=8"]
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, f"--config={config.relative_to(ROOT)}:tiny", f"--workdir={tmp_path}", *sizes, *mesh],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on 8 cpu devices" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "train"] == [1, 2]
    assert {record["step"] for record in records if record["split"] == "eval"} == {2}
    losses = [record["loss"] for record in records if "loss" in record]  # held-out answers of online training have a reward alone
    assert all(loss == loss and abs(loss) < 100 for loss in losses) and len(losses) >= 2
