"""What goes wrong on real machines, each drilled through the command line: the run says what happened, ends as launchers expect, and goes on
with the steps since the last save lost at most and no row skipped or repeated."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aligner import arrays
from tests.resume.runs import (
    ROOT,
    TIMEOUT,
    WITHOUT_TORCH,
    arguments,
    complete,
    demo,
    log_of,
    meddle,
    prepared_in_part,
    records,
    same_numbers,
    saved,
    start,
    step,
    stop,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A copy of the demo's data that may be harmed."""
    folder = tmp_path_factory.mktemp("harmed") / "data"
    shutil.copytree(demo() / "data", folder)
    return folder


def settings(pictures, **more):
    """Batches of four in the order of the file: step s trains on rows 4 s - 4 to 4 s - 1."""
    return {"data.train.path": pictures / "train.jsonl", "data.shuffle": False} | {k.replace("__", "."): v for k, v in more.items()}


def picture(pictures, row):
    return pictures / "pictures" / "train" / f"{row:05d}.png"


@contextlib.contextmanager
def gone(path):
    """The file is away meanwhile."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        aside.rename(path)


@contextlib.contextmanager
def never_answers(path):
    """Whoever reads the file waits for ever, as on a file system that is gone. Gives a moment: somebody has begun to."""
    with gone(path):
        os.mkfifo(path)
        opened = []

        def reading(workdir):
            with contextlib.suppress(OSError):  # nobody reads: a pipe cannot be opened for writing without waiting
                opened.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return bool(opened)

        try:
            yield reading
        finally:
            for descriptor in opened:
                os.close(descriptor)


def told_by(workdir, act):
    """(exit status, what the run that `act` makes told)."""
    before = log_of(workdir).stat().st_size if log_of(workdir).exists() else 0
    code = act()
    return code, log_of(workdir).read_text()[before:]


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    """What a run comes to in which nothing goes wrong."""
    workdir = tmp_path_factory.mktemp("in_order") / "run"
    complete(workdir, {"data.shuffle": False})
    return workdir


@pytest.mark.slow
def test_asked_to_stop(pictures, tmp_path):
    """SIGTERM while rows are read, SIGUSR1 (SLURM's notice) while training: the launcher's code."""
    workdir, given = tmp_path / "run", settings(pictures, train__steps=300, checkpoint__requeue_code=75)  # so many that the signal comes in time
    with never_answers(picture(pictures, 0)) as reading:
        code, told = told_by(workdir, lambda: stop(workdir, reading, signal.SIGTERM, settings=given))
    assert code == 75
    assert told.strip().endswith("stopped at once; the same command goes on from the newest checkpoint") and "Traceback" not in told
    assert stop(workdir, step(3), signal.SIGUSR1, settings=given) == 75
    assert "stopped; the same command goes on from here" in log_of(workdir).read_text()
    last = records(workdir, "train")[-1]["step"]
    assert (workdir / "checkpoints" / str(last)).exists()


@pytest.mark.slow
def test_one_misfortune_after_another(pictures, in_order, tmp_path):
    """A full disk, a file system that no longer answers, a picture that is gone, gradients that are not finite."""
    workdir = tmp_path / "run"

    def full(process):  # no file can grow beyond this: to a writer the same as a full disk
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    code, told = told_by(workdir, lambda: meddle(workdir, saved(5), full, settings=settings(pictures)))
    assert code == 2
    said = told.strip().splitlines()[-1]
    assert said.startswith("error: ") and "File too large" in said and "step 5; make room" in said, told

    given = settings(pictures, train__watchdog=20.0)
    with never_answers(picture(pictures, 50)) as reading:
        code, told = told_by(workdir, lambda: meddle(workdir, reading, lambda process: None, settings=given))
    assert code == 124
    assert "goes on from step 5\n" in told
    assert "no step for 20 s: the stacks of all threads" in told and "in read_bytes" in told, told
    done = records(workdir, "train")[-1]["step"]
    assert 10 <= done <= 12, "row 50 is of step 13"

    with gone(picture(pictures, 50)):
        code, told = told_by(workdir, lambda: start(workdir, settings(pictures)).wait(TIMEOUT))
    assert code == 2
    assert "goes on from step 10\n" in told
    said = told.strip().splitlines()[-1]
    assert said.startswith("error: data.train, row 50 of ") and "pictures/train/00050.png: does not exist" in said, told

    # reference log-probabilities that are not finite stand for whatever makes a loss so
    parts = {path: path.read_bytes() for path in (workdir / "reference").glob("train-*/part-*.npz")}
    poison(parts, [56, *range(68, 80)])
    code, told = told_by(workdir, lambda: start(workdir, settings(pictures)).wait(TIMEOUT))
    assert code == 2
    assert "step 15 skipped: loss nan" in told and "rows 56, 57, 58, 59\n" in told and "step 16 skipped" not in told
    assert "not finite in 3 steps in a row, the last one step 20 with rows 76, 77, 78, 79;" in told.strip().splitlines()[-1]

    for path, content in parts.items():
        path.write_bytes(content)
    shutil.rmtree(workdir / "checkpoints" / "15")  # the step that was skipped stands in it; without it all is as if nothing had been
    assert "goes on from step 10\n" in complete(workdir, settings(pictures))
    same_numbers(workdir, in_order, 0.0)


@pytest.mark.slow
def test_preempted_for_good(pictures, in_order, tmp_path):
    """The workdir is in a bucket (a folder stands for it); the machine is killed and never comes back, another goes on."""
    bucket = tmp_path / "bucket" / "run"

    def machine(name):
        given = [*arguments(bucket, settings(pictures)), f"--workdir=file://{bucket}"]
        environment = os.environ | {"HOME": str(tmp_path / name), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""}
        return subprocess.Popen([sys.executable, "-c", WITHOUT_TORCH, *given], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    first = machine("one")

    def wait(moment):
        until = time.monotonic() + TIMEOUT
        while not moment():
            assert first.poll() is None and time.monotonic() < until, first.communicate()[1]
            time.sleep(0.01)

    wait(lambda: any(map(prepared_in_part, tmp_path.glob("one/.cache/aligner/workdirs/run-*"))))
    with never_answers(picture(pictures, 50)):  # read and tokenised by now, and again before step 13: the run waits there
        wait((bucket / "checksums" / "10.json").exists)
        first.kill()
        first.communicate()
    shutil.rmtree(tmp_path / "one")
    second = machine("two")
    _, told = second.communicate(timeout=TIMEOUT)
    assert second.returncode == 0, told
    assert "goes on from step 10\n" in told
    same_numbers(bucket, in_order, 0.0)


def poison(parts, rows):
    """Make the columns of these rows NaN."""
    for path in parts:
        columns = arrays.read(path)
        for name in columns.keys() - {"example_id"}:
            columns[name][np.isin(columns["example_id"], rows)] = np.nan
        arrays.write(path, **columns)
