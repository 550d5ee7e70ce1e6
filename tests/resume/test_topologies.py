"""A checkpoint knows nothing of the devices that wrote it: a run goes on on others with the same rows in the same order, and the same losses."""

import shutil
import signal

import pytest

from tests.resume.runs import complete, log_of, records, same_numbers, step, stop

SETTINGS = {"train.steps": 12, "data.batch_size": 8, "checkpoint.every": 50, "train.eval_every": 6}
EIGHT = {f"mesh.{axis}": 2 for axis in ("data", "fsdp", "tensor")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """On one device, from the first step to the last."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    complete(workdir, SETTINGS)
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """On 2 x 2 x 2 devices, stopped after a few steps."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    assert stop(workdir, step(4), signal.SIGTERM, settings=SETTINGS | EIGHT, devices=8) == 0
    assert 4 <= records(workdir, "train")[-1]["step"] < 12
    return workdir


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "devices,mesh",
    [(1, {}), (4, {"mesh.data": 2, "mesh.fsdp": 2}), (4, {"mesh.fsdp": 4, "mesh.data": 1}), (4, {}), (2, {"mesh.tensor": 2})],
    ids=["1", "2x2", "4 fsdp", "4 data", "2 tensor"],
)
def test_goes_on_elsewhere(uninterrupted, stopped, tmp_path, devices, mesh):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    told = complete(workdir, SETTINGS | mesh, devices)
    assert f"goes on from step {records(stopped, 'train')[-1]['step']}\n" in told
    assert "goes on with a different setting: config.mesh." in told
    assert "was compiled" not in log_of(workdir).read_text()
    same_numbers(workdir, uninterrupted, 1e-5)
