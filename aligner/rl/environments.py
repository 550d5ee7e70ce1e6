"""Answers of several turns: an environment says something between them, which is read but not learnt.

Tokens are never written twice: what the policy wrote stands in the answer as it was sampled, and the environment's words are tokenised
alone and put between, marked as not the policy's own.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from aligner.generation.engine import Completion, Prompt
from aligner.rl.engines import RolloutEngine
from aligner.types import UserError


class Step(NamedTuple):
    """What an environment says to a turn.

    Attributes:
        observation: text that the policy reads next, as it is; a chat model's marks of a turn belong to it.
        reward: of this turn; added up over the turns.
        done: nothing comes after.
    """

    observation: str = ""
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """One episode."""

    def reset(self, prompt: Any, columns: Mapping[str, Any]) -> None:
        """Begin: the prompt, and what else its row holds."""

    def step(self, text: str) -> Step:
        """Hear what the policy said in its turn."""


def find_environment(name: str) -> Callable[[], Environment]:
    """The class or function that `config.algorithm.environment` names, "package.module:Name"."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"config.algorithm.environment {name!r} cannot be imported ({error}); it is like package.module:Name") from None


def play(
    engine: RolloutEngine,
    make: Callable[[], Environment],
    items: Sequence[Any],
    ids: Sequence[int],
    n: int,
    turns: int,
    tokenize: Callable[[str], np.ndarray],
    detokenize: Callable[[np.ndarray], str],
) -> tuple[list[list[Completion]], np.ndarray]:
    """n episodes on every prompt, all side by side.

    Args:
        engine: writes one turn, at most generation.max_new_tokens long, from what stands there so far.
        make: makes an episode's environment.
        items: prompts (`aligner.rl.prompts.Item`).
        ids: their numbers in the run.
        n: episodes on each.
        turns: of the policy, at most.
        tokenize, detokenize: text <-> tokens, without special tokens put in.

    Returns:
        (answers of all turns and what was said between, `own` says which tokens are the policy's; [N, n] sums of rewards).
    """
    episodes = [(i, sample) for i in range(len(items)) for sample in range(n)]
    environments = [_begin(make, items[i]) for i, _ in episodes]
    parts: list[list[tuple[np.ndarray, np.ndarray, bool]]] = [[] for _ in episodes]
    worth, stopped, going = np.zeros(len(episodes)), np.zeros(len(episodes), bool), list(range(len(episodes)))
    for turn in range(turns):
        prompts = [Prompt(_so_far(items[episodes[e][0]], parts[e]), items[episodes[e][0]].prompt.pictures) for e in going]
        numbers = [(int(ids[episodes[e][0]]) * n + episodes[e][1]) * turns + turn for e in going]
        written = engine.generate(prompts, 1, numbers)
        still = []
        for e, [answer] in zip(going, written):
            parts[e].append((answer.tokens, answer.logps, True))
            stopped[e] = answer.stopped
            said = _step(environments[e], detokenize(answer.tokens), items[episodes[e][0]].text)
            worth[e] += said.reward
            if said.done or not answer.stopped or turn == turns - 1:
                continue
            words = tokenize(said.observation)
            if len(words):
                parts[e].append((words, np.zeros(len(words), np.float32), False))
            still.append(e)
        going = still
        if not going:
            break
    answers = [_joined(part, bool(end)) for part, end in zip(parts, stopped)]
    return [answers[i * n : (i + 1) * n] for i in range(len(items))], worth.reshape(len(items), n)


def _begin(make: Callable[[], Environment], item: Any) -> Environment:
    """An episode's environment; one that fails ends the run, as a reward function does."""
    try:
        environment = make()
        environment.reset(item.text, item.columns)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the environment failed at the start of prompt {item.text!r}: {type(error).__name__}: {error}") from error
    return environment


def _step(environment: Environment, text: str, prompt: Any) -> Step:
    """What the environment says, which must be of use."""
    try:
        said = environment.step(text)
        fine, words = np.isfinite(said.reward), isinstance(said.observation, str)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the environment failed at the turn {text!r} of prompt {prompt!r}: {type(error).__name__}: {error}") from error
    if not words:
        raise UserError(f"the environment said {said.observation!r} to the turn {text!r} of prompt {prompt!r}; it must be a text")
    if not fine:
        raise UserError(f"the environment gave the reward {said.reward} to the turn {text!r} of prompt {prompt!r}; it must be finite")
    return said


def _so_far(item: Any, parts: list) -> np.ndarray:
    return np.concatenate([item.prompt.tokens, *(tokens for tokens, _, _ in parts)]).astype(np.int32)


def _joined(parts: list, stopped: bool) -> Completion:
    tokens, logps = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    own = np.concatenate([np.full(len(part), mine) for part, _, mine in parts])
    return Completion(tokens.astype(np.int32), logps.astype(np.float32), stopped, own)


# ---- tools --------------------------------------------------------------------------------------------------------------------------

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class Tools:
    """An episode in which the policy may call Python functions: <tool_call>{"name": .., "arguments": {..}}</tool_call>.

    The result comes back as <tool_response>..</tool_response>; a turn without a call is the last. A call that cannot be made is
    answered with what is wrong.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]], before: str = "", after: str = ""):
        """
        Args:
            functions: name -> function.
            before, after: what the chat template puts around the tools' turn and before the policy's next.
        """
        self.functions, self.before, self.after = functions, before, after

    def reset(self, prompt: Any, columns: Mapping[str, Any]) -> None:
        pass

    def step(self, text: str) -> Step:
        calls = _CALL.findall(text)
        if not calls:
            return Step(done=True)
        results = "".join(f"<tool_response>{self.call(call)}</tool_response>" for call in calls)
        return Step(f"{self.before}{results}{self.after}")

    def call(self, text: str) -> str:
        """The result of one call as text."""
        try:
            call = json.loads(text)
            return str(self.functions[call["name"]](**call.get("arguments", {})))
        except Exception as error:  # whatever the policy wrote, and whatever the function does with it
            return f"error: {type(error).__name__}: {error}"
