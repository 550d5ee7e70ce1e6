"""Reward functions that are right and wrong: values, and one sentence that names the prompt."""

import json
import time

import numpy as np
import pytest

from aligner.rl import reward_model, verifiers
from aligner.rl.prompts import load_prompts
from aligner.rl.rewards import Reward, make_rewards, value
from aligner.types import UserError
from tests.data import tiny
from tests.data.test_turns import user

PROMPTS, ANSWERS = ["one?", "two?", "three?"], ["1", "2", "3"]


def called(function, timeout=5.0, **columns):
    return value([Reward("mine", function)], PROMPTS, ANSWERS, columns, timeout)


def test_values_and_columns():
    found = called(lambda prompts, completions, truth: [None if t is None else float(c == t) for c, t in zip(completions, truth)],
                   truth=["1", None, "x"])  # fmt: skip
    np.testing.assert_array_equal(found, [[1], [np.nan], [0]])


def test_a_reward_model_is_told_what_the_prompts_template_was(tmp_path, monkeypatch):
    """So it reads the text that it was trained on: some templates write tools, or a way to think, before the conversation."""
    seen = []
    stand_in = lambda prompts, completions, options: seen.append(options) or [0.0] * len(prompts)
    monkeypatch.setattr(reward_model, "make_reward_model", lambda *args, **reading: stand_in)
    rows = [{"prompt": [user("hi")], "tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "kind"}}, {"prompt": "hi"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny.config(tmp_path / "rows.jsonl", shuffle=False, template=dict(mood="bad", year=1))
    config.generation = dict(max_new_tokens=8, server="")
    prompts = load_prompts(config, "train", tiny.text_model())
    items = [prompts.item(place) for place in range(2)]
    columns = {"chat_template_kwargs": [item.columns.get("chat_template_kwargs") for item in items]}
    value(make_rewards(["RM"]), [item.text for item in items], ["a", "b"], columns, 5.0)
    assert seen == [[{"mood": "kind", "year": 1, "tools": rows[0]["tools"]}, {}]]


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
