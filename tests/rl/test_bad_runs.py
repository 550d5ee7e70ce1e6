"""Online runs in which something outside goes wrong half-way: one sentence, the state saved, and on from there with the same numbers."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from aligner import checkpoint, online
from aligner.rl import remote, rollouts
from aligner.types import UserError
from tests.rl.http import serving
from tests.rl.test_online import brevity, demo, one_device, records, settings  # noqa: F401

TROUBLE: dict = {}  # `how` the reward function goes wrong from now on, and at which `prompt`


def moody(prompts, completions, **columns):
    """`brevity`, unless there is trouble."""
    values = brevity(prompts, completions)
    bad = bool(TROUBLE) and TROUBLE.setdefault("prompt", prompts[-1]) in prompts
    match TROUBLE.get("how"):
        case "raises" if bad:
            raise ValueError("no such sum")
        case "hangs" if bad:
            time.sleep(5)
        case "is not a number":
            values[-1] = float("nan")
        case "is too short":
            values.pop()
    return values


@pytest.mark.slow
@pytest.mark.parametrize("how, words", [
    ("raises", r"reward moody failed for the prompt '\d \+ \d =': ValueError: no such sum"),
    ("hangs", r"reward moody did not come back in time for the prompt '\d \+ \d =';.* config.algorithm.reward_timeout"),
    ("is not a number", r"reward moody gave nan for the answer '.*' to the prompt '\d \+ \d ='"),
    ("is too short", r"reward moody returned 15 values for 16 answers, the first to the prompt '\d \+ \d ='"),
])  # fmt: skip
def test_a_reward_that_goes_wrong_in_the_second_rollout(demo, tmp_path, monkeypatch, how, words):  # noqa: F811
    config = settings(demo, "grpo", algorithm__reward_funcs=("tests.rl.test_bad_runs:moody",), algorithm__num_iterations=2,
                      algorithm__reward_timeout=0.5, train__steps=4, checkpoint__every=100)  # fmt: skip
    original = online.check_finite

    def then(step, *rest):
        if step == 2:
            TROUBLE["how"] = how
        return original(step, *rest)

    monkeypatch.setattr(online, "check_finite", then)
    try:
        with pytest.raises(UserError, match=words):
            online.run(config, tmp_path / "run")
    finally:
        TROUBLE.clear()
    assert checkpoint.steps(tmp_path / "run") == [2], "what was learnt is saved"
    monkeypatch.setattr(online, "check_finite", original)
    online.run(config, tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_reward_server_that_dies_half_way(demo, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda seconds: None))
    left = 99  # requests after which the server is gone

    def lengths(path, body):
        nonlocal left
        left -= 1
        return None if left < 0 else (200, {"rewards": [float(len(text)) for text in body["responses"]]})

    with serving(lengths) as url:
        changes = dict(algorithm__reward_funcs=(f"{url}/reward",), algorithm__num_iterations=2, train__steps=4, checkpoint__every=100)
        config = settings(demo, "grpo", **changes)
        online.run(config, tmp_path / "whole")
        left = 1
        with pytest.raises(UserError, match=r"gives no answer after 5 tries .*give the same command again"):
            online.run(config, tmp_path / "run")
        assert checkpoint.steps(tmp_path / "run") == [2]
        left = 99
        online.run(config, tmp_path / "run")
    plain = lambda workdir: [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records(workdir)]
    assert plain(tmp_path / "run") == plain(tmp_path / "whole")


def test_a_prompt_beyond_the_budget_is_counted_and_too_many_stop_the_run(demo, tmp_path, capsys):  # noqa: F811
    rows = tmp_path / "rows.jsonl"
    long = [{"role": "user", "content": "1 + " * 40 + "1 ="}]
    rows.write_text((demo / "data" / "train.jsonl").read_text() + json.dumps({"prompt": long, "answer": "41"}) + "\n")
    config = settings(demo, "grpo").copy_and_resolve_references().unlock()
    config.data.train.path = str(rows)
    config.data.max_bad_fraction = 0.0
    with pytest.raises(UserError, match=r"1 of 101 rows of .* cannot be used"):
        online.run(config.lock(), tmp_path / "run")


def test_answers_that_no_reward_judges_are_told(capsys):
    assert rollouts.mean_reward(np.array([[np.nan, 2.0]])) == 2 and not capsys.readouterr().err
    assert rollouts.mean_reward(np.full((2, 3), np.nan)) == 0 and "gave None for all of 6 answers" in capsys.readouterr().err
