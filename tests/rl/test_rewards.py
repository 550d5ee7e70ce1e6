"""Reward functions that are right and wrong: values, and one sentence that names the prompt."""

import time

import numpy as np
import pytest

from aligner.rl import verifiers
from aligner.rl.rewards import Reward, make_rewards, value
from aligner.types import UserError

PROMPTS, ANSWERS = ["one?", "two?", "three?"], ["1", "2", "3"]


def called(function, timeout=5.0, **columns):
    return value([Reward("mine", function)], PROMPTS, ANSWERS, columns, timeout)


def test_values_and_columns():
    found = called(lambda prompts, completions, truth: [None if t is None else float(c == t) for c, t in zip(completions, truth)],
                   truth=["1", None, "x"])  # fmt: skip
    np.testing.assert_array_equal(found, [[1], [np.nan], [0]])


def test_an_async_function():
    async def later(prompts, completions):
        return [len(text) for text in completions]

    np.testing.assert_array_equal(called(later)[:, 0], [1, 1, 1])


def raises_on_two(prompts, completions):
    if "two?" in prompts:
        raise KeyError("no such thing")
    return [0.0] * len(prompts)


def hangs_on_two(prompts, completions):
    if "two?" in prompts:
        time.sleep(30)
    return [0.0] * len(prompts)


@pytest.mark.parametrize("function, words", [
    (raises_on_two, "reward mine failed for the prompt 'two\\?': KeyError"),
    (hangs_on_two, "did not come back in time for the prompt 'two\\?'"),
    (lambda prompts, completions: [1.0], "returned 1 values for 3 answers, the first to the prompt 'one\\?'"),
    (lambda prompts, completions: [1.0, float("nan"), 2.0], "gave nan for the answer '2' to the prompt 'two\\?'"),
    (lambda prompts, completions: [1.0, "good", 2.0], "gave 'good' for the answer '2'"),
    (lambda prompts, completions: 3.0, "returned a float; it must give a list"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_prompt(function, words):
    with pytest.raises(UserError, match=words):
        called(function, timeout=0.3)


def test_a_reward_that_is_slow_for_many_is_told_soon():
    """No answer is at fault alone: to ask them all one by one took longer than the rollout itself."""
    asked = []

    def slow(prompts, completions):
        asked.append(len(completions))
        time.sleep(0.02 * len(completions))
        return [0.0] * len(completions)

    with pytest.raises(UserError, match="did not come back in time for 100 answers, the first to the prompt 'one\\?'"):
        value([Reward("mine", slow)], ["one?"] * 100, ["1"] * 100, {}, 0.2)
    assert len(asked) < 50


@pytest.mark.parametrize("name", ["no_module:f", "json:no_function", ":f"])
def test_a_name_that_cannot_be_imported(name):
    with pytest.raises(UserError, match=f"{name} cannot be imported"):
        make_rewards([name])


@pytest.mark.parametrize("truth, text, right", [
    ("7", "3 + 4 = 7", True), ("7", "the answer is 8", False), ("#### 1,234", "so it is 1234.", True), (0.5, "\\boxed{1/2}", True),
    ("\\frac{1}{2}", "it is \\boxed{0.5}", True), ("12", "\\boxed{12} and not 13", True), ("-3", "-3", True), ("5", "no number", False),
    ("x+1", "\\boxed{x + 1}", True), ("x+1", "\\boxed{1}", False), ("\\boxed{x+1}", "\\boxed{x + 1}", True),
])  # fmt: skip
def test_the_verifier_of_mathematics(truth, text, right):
    assert verifiers.math([""], [text], ground_truth=[truth]) == [float(right)]


def test_the_verifier_of_form():
    good = "<think>so</think>\n<answer>7</answer>"
    assert verifiers.format(["", ""], [good, "7"]) == [1.0, 0.0]
