"""What answers are worth: Python functions, verifiers, reward models and reward servers behind one signature."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligner.types import UserError

VERIFIERS = ("math", "format")


class Reward(NamedTuple):
    """One way to value answers.

    Attributes:
        name: for metrics and messages.
        call: (prompts, completions, **columns) -> one number or None for each.
    """

    name: str
    call: Callable[..., Any]


def make_rewards(
    names: Sequence[str], *, dtype: str = "float32", rows: int = 16, folder: str | Path = ".", frames: int = 8, timeout: float = 60.0
) -> list[Reward]:
    """The rewards that `config.algorithm.reward_funcs` names.

    Args:
        names: "math", "format", "package.module:function", "http://..", or a reward model's folder or Hub id.
        dtype, rows, folder, frames: of reward models; see `make_reward_model`.
        timeout: seconds that a server may take.

    Raises:
        UserError: one of them cannot be imported or read.
    """
    return [_make(str(name), timeout, dtype=dtype, rows=rows, folder=folder, frames=frames) for name in names]


def _make(name: str, timeout: float, **reading: Any) -> Reward:
    from aligner.rl import verifiers

    if name in VERIFIERS:
        return Reward(name, getattr(verifiers, name))
    if name.startswith(("http://", "https://")):
        from aligner.rl.remote import make_remote_reward

        return Reward("remote", make_remote_reward(name, timeout=timeout))
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return Reward(attribute, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"config.algorithm.reward_funcs: {name} cannot be imported ({error})") from None
    from aligner.rl.reward_model import make_reward_model

    score = make_reward_model(name, **reading)

    def valued(prompts: Sequence[Any], completions: Sequence[str], chat_template_kwargs: Sequence | None = None, **columns: Any) -> list:
        return score(prompts, completions, chat_template_kwargs and [told or {} for told in chat_template_kwargs])

    return Reward(Path(name).name, valued)


def value(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list], timeout: float
) -> np.ndarray:
    """What each answer is worth to each reward.

    Args:
        prompts, completions: [M] each.
        columns: what else the dataset's rows hold, [M] each.
        timeout: seconds for each reward.

    Returns:
        [M, K] float64, NaN where a reward gave None.

    Raises:
        UserError: a reward raises, takes too long, or gives something else than a finite number or None for each answer; names the
            prompt.
    """
    found = []
    for reward in rewards:
        values = _called(reward, prompts, completions, columns, timeout)
        try:
            values = list(values)
        except TypeError:
            raise UserError(f"reward {reward.name} returned a {type(values).__name__}; it must give a list, one number an answer") from None
        if len(values) != len(completions):
            raise UserError(
                f"reward {reward.name} returned {len(values)} values for {len(completions)} answers, the first to the prompt "
                f"{_short(prompts[0])}; it must give one for each, None where it has none"
            )
        for prompt, completion, one in zip(prompts, completions, values):
            number = one is None or (isinstance(one, (int, float, np.number, np.bool_)) and math.isfinite(one))
            if not number:
                where = f"the answer {_short(completion)} to the prompt {_short(prompt)}"
                raise UserError(f"reward {reward.name} gave {one!r} for {where}; it must give a finite number, or None where it has none")
        found.append([np.nan if one is None else float(one) for one in values])
    return np.array(found, np.float64).T if found else np.zeros((len(completions), 0))


class _Failed(Exception):
    """A call that raised, or None as its argument: one that did not come back in time."""


def _called(reward: Reward, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list], timeout: float) -> Any:
    def call(part: slice) -> Any:
        rest = {name: column[part] for name, column in columns.items()}
        return _in_time(reward.call, list(prompts[part]), list(completions[part]), rest, timeout)

    try:
        return call(slice(None))
    except _Failed as failed:
        error = failed.args[0]
        hung, until = error is None, time.monotonic() + timeout
        where = f"{len(completions)} answers, the first to the prompt {_short(prompts[0])}"
        for place in range(len(completions)) if len(completions) > 1 and not isinstance(error, UserError) else ():
            if time.monotonic() > until:  # it may be no answer's fault: there are many
                break
            try:  # one by one, to know which it is
                timeout = min(timeout, 2.0)
                call(slice(place, place + 1))
            except _Failed as single:
                where = f"the prompt {_short(prompts[place])}"
                error, hung = single.args[0], single.args[0] is None
                break
    if isinstance(error, UserError):
        raise error
    if hung:
        fix = "make it quicker, or raise config.algorithm.reward_timeout"
        raise UserError(f"reward {reward.name} did not come back in time for {where}; {fix}")
    raise UserError(f"reward {reward.name} failed for {where}: {type(error).__name__}: {error}") from error


def _in_time(function: Callable, prompts: list, completions: list[str], columns: dict[str, list], timeout: float) -> Any:
    """The function's result; it runs in a thread of its own, which is left behind where it hangs."""
    result: list[Any] = []

    def run() -> None:
        try:
            found = function(prompts, completions, **columns)
            result.append((asyncio.run(found) if inspect.isawaitable(found) else found, None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not result:
        raise _Failed(None)
    value, error = result[0]
    if error is not None:
        raise _Failed(error)
    return value


def _short(text: Any) -> str:
    text = repr(text if isinstance(text, str) else text[-1]["content"] if text else text)
    return text if len(text) <= 90 else text[:80] + "...'"
