"""math-verify as rewards ask it, in a thread: stood in for by a package that holds its time by signals as the real one does."""

import pytest

from aligner.rl import judge, verifiers
from aligner.rl.rewards import make_rewards, value

STAND_IN = """
import os, signal, time


def parse(text, parsing_timeout=5):
    if parsing_timeout is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not in a thread
    print("parsed", text)
    if "tower" in text:
        time.sleep(60)
    if "crash" in text:
        os._exit(1)
    if "raise" in text:
        raise ValueError(text)
    return text.removeprefix("\\\\boxed{").removesuffix("}").replace("two", "2")


def verify(gold, target, timeout_seconds=5):
    return gold == target
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    found = judge.Judge()
    monkeypatch.setattr(judge, "right", found)
    monkeypatch.setattr(judge, "LIMIT", 2.0)
    yield found
    if found.process:
        found.process.kill()


def verdicts(answers):
    return value(make_rewards(["math"]), answers, answers, {"ground_truth": ["2"] * len(answers)}, 60.0)[:, 0].tolist()


def test_in_a_thread():
    assert verdicts(["two", "x\nwo", "3"]) == [1, 0, 0]


@pytest.mark.slow
def test_whatever_is_written():
    assert verdicts(["two", "crash", "two", "raise", "tower", "two"]) == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("truth, asked", [("x+1", "\\boxed{x+1}"), ("so #### 2", "\\boxed{2}"), ("$x$", "$x$"), ("\\boxed{x}", "\\boxed{x}")])
def test_a_truth_is_a_formula_however_it_is_written(monkeypatch, truth, asked):
    """math-verify finds none in LaTeX without marks."""
    seen = []
    monkeypatch.setattr(judge, "right", lambda *pair: seen.append(pair) or True)
    assert verifiers.same(truth, "1 + y") and seen == [(asked, "1 + y")]
