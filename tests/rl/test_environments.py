"""Answers of several turns: what the policy reads, what it learns from, and a tool that it calls."""

import jax
import numpy as np
import pytest

from aligner.data.templates import Encoded
from aligner.generation.engine import Completion, Prompt
from aligner.rl import rollouts
from aligner.rl.environments import Step, Tools, play
from aligner.rl.prompts import Item
from aligner.types import UserError
from tests.rl.test_online import config_of

ITEMS = [Item(i, "x", Encoded(np.array(p, np.int32), ()), Prompt(np.array(p, np.int32)), {"goal": 10 * i}) for i, p in enumerate([[3, 4], [5]])]


class Scripted:
    """An engine that writes [20 + length of what it reads, 2]; says what it read."""

    def __init__(self):
        self.read = []

    def generate(self, prompts, n, ids):
        self.read += [prompt.tokens.tolist() for prompt in prompts]
        assert n == 1 and len(set(ids)) == len(ids)
        return [[Completion(np.array([20 + len(p.tokens), 2], np.int32), np.array([-1.0, -0.5], np.float32), True)] for p in prompts]


class Twice:
    """Wants to hear the answer twice."""

    def reset(self, prompt, columns):
        self.turns, self.goal = 0, columns["goal"]

    def step(self, text):
        self.turns += 1
        return Step("again", reward=1.0 + self.goal, done=self.turns == 2)


tokenize = lambda text: np.array([7, 8, 9], np.int32)


def test_turns_are_read_as_they_were_written_and_observations_are_not_learnt(llama):
    engine = Scripted()
    answers, worth = play(engine, Twice, ITEMS, [0, 1], 2, 4, tokenize, str)
    assert worth.tolist() == [[2, 2], [22, 22]]
    assert engine.read[0] == [3, 4] and engine.read[4] == [3, 4, 22, 2, 7, 8, 9]
    first = answers[0][0]
    assert first.tokens.tolist() == [22, 2, 7, 8, 9, 27, 2] and first.own.tolist() == [True, True, False, False, False, True, True]
    groups = [rollouts.Group(item, of, ["x"] * 2, w[:, None]) for item, of, w in zip(ITEMS, answers, worth)]
    batch = rollouts.lay_out(groups, llama.model, True, 8)
    scored = batch["score_segment"][0] > 0
    assert batch["score_token"][0][scored].tolist() == [22, 2, 27, 2] * 2, "what the environment said is read, not scored"
    assert batch["sampling_logps"][0][scored].tolist() == [-1.0, -0.5, -1.0, -0.5] * 2
    assert batch["tokens"][0, :9].tolist() == [3, 4, 22, 2, 7, 8, 9, 27, 2]
    groups = [group._replace(rewards=np.array([[1.0], [0.0]])) for group in groups]
    found, _, _ = rollouts.learnable(config_of("rloo"), groups, None, batch, np.ones(1), {})
    assert found["advantages"][0][scored].tolist() == [1, 1, 1, 1, -1, -1, -1, -1]
    assert jax.tree.all(jax.tree.map(lambda x: np.isfinite(x).all(), found))


def test_an_episode_ends_with_its_turns_or_where_a_turn_is_cut():
    answers, _ = play(Scripted(), Twice, ITEMS[:1], [0], 1, 1, tokenize, str)
    assert answers[0][0].tokens.tolist() == [22, 2]


class Broken(Twice):
    """Fails, or gives a reward that is none, at the second prompt."""

    worth = None

    def step(self, text):
        return Step(reward=1.0 / (10 - self.goal) if self.worth is None else self.worth if self.goal else 0.0)


@pytest.mark.parametrize("worth, words", [(None, r"failed at the turn .* of prompt 'x': ZeroDivisionError"), (float("nan"), "gave the reward nan")])
def test_an_environment_that_goes_wrong_is_told_with_its_prompt(monkeypatch, worth, words):
    monkeypatch.setattr(Broken, "worth", worth)
    with pytest.raises(UserError, match=words):
        play(Scripted(), Broken, ITEMS, [0, 1], 1, 2, tokenize, str)


class Mute(Twice):
    """Says nothing, and cannot begin where the goal is not 0."""

    def reset(self, prompt, columns):
        self.odds = 1 / (columns["goal"] == 0)

    def step(self, text):
        return Step(None)


@pytest.mark.parametrize("items, words", [(ITEMS, "failed at the start of prompt 'x': ZeroDivisionError"), (ITEMS[:1], "said None to the turn")])
def test_an_environment_that_cannot_begin_or_speak_is_told_with_its_prompt(items, words):
    """Either was a traceback, after which what had been learnt was not saved."""
    with pytest.raises(UserError, match=words):
        play(Scripted(), Mute, items, [0, 1], 1, 2, tokenize, str)


def test_tools():
    episode = Tools({"add": lambda a, b: a + b}, before="[", after="]")
    assert episode.step('so <tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>') == Step("[<tool_response>5</tool_response>]")
    wrong = episode.step("<tool_call>{oops</tool_call><tool_call>{\"name\": \"no\"}</tool_call>").observation
    assert "error: JSONDecodeError" in wrong and "error: KeyError" in wrong
    assert episode.step("it is 5").done
