"""How metrics add up, and metrics.jsonl."""

import json

import numpy as np
import pytest

from aligner import metrics
from aligner.types import Last, Max, Mean, Min, UserError


def example(total, count, value):
    make = lambda x: np.float32(x)
    return {"a": Mean(make(total), make(count)), "top": Max(make(value)), "low": Min(make(value)), "now": Last(make(value))}


PARTS = [example(6, 2, 1), example(1, 5, -3), example(0, 0, 2)]
WHOLE = {"a": 1.0, "top": 2.0, "low": -3.0, "now": 2.0}  # the mean is over 7, not a mean of means


def test_merge():
    assert metrics.values(metrics.merge(metrics.merge(PARTS[0], PARTS[1]), PARTS[2])) == WHOLE


def test_reduce_stacked_equals_merge():
    import jax

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *PARTS)
    assert metrics.values(metrics.reduce_stacked(stacked)) == WHOLE


def test_a_mean_over_nothing_is_left_out():
    assert metrics.values({"a": Mean(0.0, 0.0), "b": Last(1.0)}) == {"b": 1.0}


def test_log_is_cut_back_to_the_restored_step(tmp_path):
    with metrics.open_log(tmp_path, 0) as write:
        for step in (1, 2, 3, 4):
            write(step, "train", {"loss": step / 10})
        write(2, "eval", {"loss": 0.5, "rewards/accuracies": 0.75})
    with (tmp_path / metrics.JSONL).open("a") as file:
        file.write('{"step": 5, "split": "tra')  # a kill in the middle of a line
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4, 2]
    with metrics.open_log(tmp_path, 2) as write:
        write(3, "train", {"loss": 7.0})
    lines = [json.loads(line) for line in (tmp_path / metrics.JSONL).read_text().splitlines()]
    assert [(line["step"], line["split"], line["loss"]) for line in lines] == [
        (1, "train", 0.1), (2, "train", 0.2), (2, "eval", 0.5), (3, "train", 7.0),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / metrics.JSONL]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with metrics.open_log(tmp_path, 0) as write:
        write(1, "train", {"loss": 1.0})
        assert len(metrics.read(tmp_path)) == 1


def test_tensorboard_gets_the_numbers(tmp_path):
    with metrics.open_log(tmp_path, 0, tensorboard=True) as write:
        write(1, "train", {"loss": 1.0, "example_ids_hash": "abc"})
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes() and b"example_ids_hash" not in file.read_bytes()


def test_wandb_that_is_not_there(tmp_path):
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match="pip install wandb"), metrics.open_log(tmp_path, 0, wandb=True):
            pass
    else:
        pytest.skip("wandb is installed")


def test_curves(tmp_path):
    assert metrics.draw_curves(tmp_path) is None
    with metrics.open_log(tmp_path, 0) as write:
        write(1, "train", {"loss": 1.0, "rewards/accuracies": 0.5})
        write(2, "train", {"loss": 0.5, "rewards/accuracies": 0.75})
        write(2, "eval", {"loss": 0.6})
    assert metrics.draw_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_kill_leaves_the_curves_of_before(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    with metrics.open_log(tmp_path, 0) as write:
        write(1, "train", {"loss": 0.5})
    before = metrics.draw_curves(tmp_path).read_bytes()

    def killed(figure, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before
