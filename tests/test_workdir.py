"""What may work in a workdir, and what may go on there."""

import pytest

from aligner import metrics, workdir
from aligner.types import UserError
from configs import common


def test_one_run_at_a_time(tmp_path, capsys):
    with workdir.alone(tmp_path / "run"):
        second = workdir.alone(tmp_path / "run", patience=0.5)
        with pytest.raises(UserError, match=r"another run works in .*run \(process \d+ on .*\); wait for its end"), second:
            raise AssertionError("two at once")
        assert "waiting for its end" in capsys.readouterr().err
    with workdir.alone(tmp_path / "run"):
        pass


def test_rows_must_be_the_same(tmp_path):
    workdir.check_place(tmp_path, 3, {"rows": "abc"}, "abc", 3)
    workdir.check_place(tmp_path, 3, {}, "abc", 3)  # of an aligner that did not note them
    with pytest.raises(UserError, match=r"no longer holds what the run in .* learned from"):
        workdir.check_place(tmp_path, 3, {"rows": "abc"}, "abd", 3)
    with pytest.raises(UserError, match=r"has done 3 steps, and config\.train\.steps is 2; give 3 or more"):
        workdir.check_place(tmp_path, 3, {"rows": "abc"}, "abc", 2)


def test_a_workdir_that_was_moved(tmp_path):
    """What lies in it is known again where it stands now, and nothing else."""
    config = common.base()
    config.algorithm = common.dpo()
    config.model.path, config.data.train.path = "{workdir}/demo/model", "/data/rows.jsonl"
    old, new = tmp_path / "a" / "run", tmp_path / "b" / "run"
    workdir.record(workdir.resolve(config, old), old)
    with metrics.open_log(old, 0) as write:
        write(1, "train", {"loss": 1.0})
    new.parent.mkdir()
    old.rename(new)
    assert workdir.check(workdir.resolve(config, new), new) == []
    config.data.train.path = "/other/rows.jsonl"
    with pytest.raises(UserError, match=r"config\.data\.train\.path was '/data/rows.jsonl'"):
        workdir.check(workdir.resolve(config, new), new)


def test_evaluations_of_several_sets(tmp_path):
    with metrics.open_log(tmp_path, 0) as write:
        write(4, "eval", {"dataset": "extra", "loss": 2.0})
        write(4, "train", {"loss": 9.0})
        write(8, "eval", {"loss": 1.0})
        write(8, "eval", {"dataset": "extra", "loss": 3.0})
    assert metrics.evaluation(tmp_path) == {"loss": 1.0}
    assert metrics.evaluation(tmp_path, step=4) == {}
    assert metrics.evaluation(tmp_path, "extra", 4) == {"loss": 2.0}
