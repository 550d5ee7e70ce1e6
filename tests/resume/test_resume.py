"""A run that was killed or stopped, at whatever moment, ends with the numbers of one that was not."""

import random
import shutil
import signal
import time

import pytest

from aligner import load
from tests.resume.runs import (
    TIMEOUT,
    complete,
    demo,
    evaluating,
    log_of,
    prepared_in_part,
    preparing,
    records,
    same_numbers,
    saving,
    start,
    start_two,
    step,
    stop,
)

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    complete(workdir)
    assert [r["step"] for r in records(workdir, "train")] == list(range(1, 23))
    assert [r["step"] for r in records(workdir, "eval")] == [5, 10, 15, 20, 22]
    return workdir


def parts_of(workdir):
    """Name -> (inode, time of writing) of the parts of the reference columns."""
    return {str(p.relative_to(workdir)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in workdir.glob("reference/*/part-*.npz")}


def tear(checkpoint):
    """Cut the largest file of a checkpoint in half."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.slow
def test_killed_stopped_and_torn(uninterrupted, tmp_path):
    """SIGKILL while preparing, saving and evaluating, SIGTERM while training, half a checkpoint lost: the same numbers, each step once."""
    workdir = tmp_path / "run"
    assert stop(workdir, prepared_in_part, KILL) == -KILL
    parts = parts_of(workdir)
    assert parts
    assert stop(workdir, saving(5), KILL) == -KILL
    assert stop(workdir, evaluating(10), KILL) == -KILL

    assert stop(workdir, step(13), TERM) == 0
    assert "stopped; the same command goes on from here" in log_of(workdir).read_text()
    assert (workdir / "curves.png").exists()
    older, newest = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert newest == records(workdir, "train")[-1]["step"]

    tear(workdir / "checkpoints" / str(newest))
    told = complete(workdir)
    assert f"checkpoints/{newest} cannot be read" in told
    assert f"goes on from step {older}\n" in told
    assert (workdir / f"torn-checkpoint-{newest}").exists()

    assert (workdir / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()
    assert parts.items() <= parts_of(workdir).items()  # not computed again


@pytest.mark.slow
def test_stopped_while_preparing_and_training(uninterrupted, tmp_path):
    """SIGTERM ends with status 0, Ctrl-C with 130."""
    workdir = tmp_path / "run"
    assert stop(workdir, preparing, TERM) == 0
    assert not (workdir / "metrics.jsonl").exists()
    assert stop(workdir, step(2), TERM) == 0
    assert stop(workdir, step(7), INT) == 128 + INT
    assert log_of(workdir).read_text().count("stopped; the same command goes on from here") == 3
    complete(workdir)
    assert (workdir / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_killed_after_the_last_save(uninterrupted, tmp_path):
    """The checkpoint of the last step is there, its evaluation is not: the next start makes up for it."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # the last line half written
    complete(workdir)
    assert (workdir / "metrics.jsonl").read_text() == "".join(lines)


@pytest.mark.slow
def test_other_rows_are_refused(tmp_path):
    """The place where a run stopped is one in the rows that it learned from."""
    rows, workdir = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = (demo() / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((demo() / "data" / "heldout.jsonl").read_text())
    settings = {"data.train.path": rows, "data.train.image_folder": demo() / "data", "data.eval.path": held_out, "data.eval.image_folder": demo() / "data"}
    assert stop(workdir, step(7), TERM, settings=settings) == 0
    mine = lambda path: path.is_file() and "data" not in path.parts and path.name != "running.tmp"
    of_run = lambda: {path: path.read_bytes() for path in workdir.rglob("*") if mine(path)}
    before = of_run()
    rows.write_text("".join(lines[40:] + lines[:20]))
    assert start(workdir, settings).wait(TIMEOUT) == 2
    assert "config.data.train no longer holds what the run in" in log_of(workdir).read_text()
    rows.write_text("".join(lines))
    assert start(workdir, settings | {"train.steps": 5}).wait(TIMEOUT) == 2
    assert " steps, and config.train.steps is 5; give " in log_of(workdir).read_text()
    assert of_run() == before  # what is refused leaves the run as it was
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:4]))
    complete(workdir, settings)
    assert "config.data.eval holds other rows than before" in log_of(workdir).read_text()


@pytest.mark.slow
def test_stopped_between_two_evaluation_sets(uninterrupted, tmp_path):
    """The one that is missing is made up for."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    other = '{"step": 22, "split": "eval", "dataset": "extra", "loss": 1.0}' + chr(10)
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]) + other)
    complete(workdir)
    assert (workdir / "metrics.jsonl").read_text() == "".join([*lines[:-1], other, lines[-1]])


@pytest.mark.slow
def test_eight_devices_then_one(uninterrupted, tmp_path):
    """A mesh of 2 x 2 x 2 gives the numbers of one device, and its checkpoint goes on there."""
    workdir = tmp_path / "run"
    mesh = {f"mesh.{axis}": 2 for axis in ("data", "fsdp", "tensor")}
    assert stop(workdir, step(7), TERM, settings=mesh, devices=8) == 0
    told = complete(workdir)
    assert "goes on with a different setting: config.mesh.tensor was 2 and is now 1" in told
    assert "was compiled" not in log_of(workdir).read_text()
    same_numbers(workdir, uninterrupted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_many_times(uninterrupted, tmp_path, seed):
    """Seven kills in a chain, each before the run ends, at moments drawn by the seed."""
    draw = random.Random(seed)
    workdir = tmp_path / "run"
    first = draw.randint(6, 9)
    moments = [
        (lambda workdir: True, draw.uniform(1, 4)),  # at the start, wherever that is
        (preparing, draw.uniform(0, 0.1)),
        (prepared_in_part, 0.0),
        (step(draw.randint(1, 4)), draw.uniform(0, 0.05)),
        (saving(5), draw.uniform(0, 0.01)),
        (step(first), draw.uniform(0, 0.05)),
        (saving(15), 0.0),
        (saving(20) if seed else evaluating(20), draw.uniform(0, 0.02)),
    ]
    for moment, delay in moments:
        assert stop(workdir, moment, KILL, delay) == -KILL
    complete(workdir)
    assert (workdir / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["_CHECKPOINT_METADATA", "manifest.ocdbt", "rest", "d"])
def test_torn_checkpoints(uninterrupted, tmp_path, harm):
    """Whatever is missing in the newest checkpoint, the one before is used."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    newest = workdir / "checkpoints" / "22"
    for path in [newest / "rest"] if harm == "rest" else list(newest.rglob(harm)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "goes on from step 20\n" in complete(workdir)
    assert (workdir / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes(uninterrupted, tmp_path):
    """Two processes of four devices each: the numbers of one device, a common stop after a signal to one of them, an export."""
    workdir, settings = tmp_path / "run", {"mesh.fsdp": 2, "mesh.tensor": 2, "checkpoint.export": True, "checkpoint.requeue_code": 75}
    processes = start_two(workdir, settings)
    try:
        while not step(7)(workdir):
            assert all(process.poll() is None for process in processes), log_of(workdir).read_text()
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGUSR1)  # SLURM's notice, handed on as SIGTERM to JAX's preemption service
        assert [process.wait(TIMEOUT) for process in processes] == [75, 75], log_of(workdir).read_text()
        processes = start_two(workdir, settings)
        assert [process.wait(TIMEOUT) for process in processes] == [0, 0], log_of(workdir).read_text()
    finally:
        for process in processes:
            process.kill()
    same_numbers(workdir, uninterrupted, 1e-5)
    model, _ = load(workdir / "export")
    assert model.family == "llava"
