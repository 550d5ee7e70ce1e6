"""An online run that is killed again and again, whatever it is doing, learns the same from the same answers to the same prompts."""

import json
import random
import signal
from collections import Counter

import pytest

from aligner import checkpoint
from tests.resume.runs import TIMEOUT, complete, log_of, ppo, start, step, stop, sums, wrote

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    complete(workdir, recipe=ppo)
    return workdir


def lines(workdir):
    """metrics.jsonl without the seconds that a rollout took."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if not name.startswith("time/")} for record in records]


def answers(workdir):
    return {path.name: path.read_bytes() for path in sorted((workdir / "completions").iterdir())}


def same(workdir, uninterrupted):
    """Bit for bit: metrics of every step once, and every answer."""
    assert lines(workdir) == lines(uninterrupted)
    assert answers(workdir) == answers(uninterrupted)


@pytest.mark.slow
def test_the_run_itself(uninterrupted):
    """22 steps are six rollouts of eight prompts: none comes twice before all hundred have come; later updates are off-policy."""
    from pyarrow import parquet

    train = [record for record in lines(uninterrupted) if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 23))
    shown = Counter(row for path in (uninterrupted / "completions").iterdir() for row in parquet.read_table(path)["row"].to_pylist())
    assert len(shown) == 48 and set(shown.values()) == {2}
    assert train[0]["val/ratio"] == 1 and train[2]["val/ratio"] != 1
    assert len({record["objective/kl"] for record in train}) == 6


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_many_times(uninterrupted, tmp_path, seed):
    """SIGKILL while a rollout is written, between its updates and while saving, at moments drawn by the seed."""
    draw = random.Random(seed)
    workdir = tmp_path / "run"
    moments = [
        (wrote(0), draw.uniform(0, 0.05)),
        (step(draw.randint(4, 6)), draw.uniform(0, 0.01)),
        (step(9), draw.uniform(0, 0.01)),  # which is saved then
        (wrote(3), draw.uniform(0, 0.02)),
        (step(draw.randint(15, 17)), draw.uniform(0, 0.01)),
    ]
    for moment, delay in moments:
        assert stop(workdir, moment, KILL, delay, recipe=ppo) == -KILL
    complete(workdir, recipe=ppo)
    same(workdir, uninterrupted)


@pytest.mark.slow
def test_stopped_between_two_updates_of_a_rollout(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    assert stop(workdir, step(6), TERM, recipe=ppo) == 0
    complete(workdir, recipe=ppo)
    same(workdir, uninterrupted)


@pytest.mark.slow
def test_other_held_out_prompts_are_told(tmp_path):
    rows, workdir = tmp_path / "rows.jsonl", tmp_path / "run"
    lines = (sums() / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:8]))
    settings = {"data.eval.path": rows, "train.steps": 8}
    assert stop(workdir, step(4), TERM, settings=settings, recipe=ppo) == 0
    assert "other rows" not in log_of(workdir).read_text()
    rows.write_text("".join(lines[4:12]))
    complete(workdir, settings, recipe=ppo)
    told = log_of(workdir).read_text()
    assert "config.data.eval holds other rows than before" in told
    assert told.count("first step ") == 2  # of either start


@pytest.mark.slow
def test_the_step_that_ends_a_run_is_told_too(tmp_path):
    """It is saved, so that no later run would make it again."""
    workdir, settings = tmp_path / "run", {"optim.learning_rate": 1e38}
    for _ in range(2):
        assert start(workdir, settings, recipe=ppo).wait(TIMEOUT) == 2
        assert "loss or gradient was not finite in " in log_of(workdir).read_text().splitlines()[-1]
        told = [record["step"] for record in lines(workdir) if record["split"] == "train"]
        assert told == list(range(1, checkpoint.steps(workdir)[-1] + 1))
