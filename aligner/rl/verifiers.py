"""Rewards that need no model: whether a mathematical answer is right, whether an answer has the form that was asked for."""

from __future__ import annotations

import re
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from aligner.rl import judge

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?"
_THINK = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)


def math(prompts: list, completions: list[str], *, ground_truth: list[Any], **columns: Any) -> list[float | None]:
    """1 where the answer's value is the ground truth's, else 0; None where there is no ground truth.

    The package math-verify judges where it is installed (pip install 'aligner[math]'); without it, the last \\boxed{} or else the last
    number is compared exactly.
    """
    return [None if truth is None else float(same(truth, text)) for truth, text in zip(ground_truth, completions)]


def format(prompts: list, completions: list[str], **columns: Any) -> list[float]:
    """1 where the answer is `<think>..</think><answer>..</answer>`, else 0."""
    return [float(bool(_THINK.fullmatch(text.strip() + "\n"))) for text in completions]


def same(truth: Any, text: str) -> bool:
    """Whether a text comes to the same value as the truth, which may be a number, a text with it, or LaTeX."""
    truth = str(truth)
    if "####" in truth:
        truth = truth.rpartition("####")[2].strip()
    boxed = truth if "\\boxed" in truth else f"\\boxed{{{truth}}}"
    found, wanted = last_value(text), last_value(boxed)
    if found is not None and found == wanted:
        return True
    return find_spec("math_verify") is not None and judge.right(truth if "$" in truth else boxed, text)


def last_value(text: str) -> Fraction | str | None:
    """What a text comes to: of its last \\boxed{}, of what follows its last `####`, or else its last number."""
    inside = _boxed(text)
    if inside is None and "####" in text:
        inside = text.rpartition("####")[2]
    if inside is None:
        numbers = re.findall(_NUMBER, _plain(text))
        if not numbers:
            return None
    else:
        numbers = [_plain(inside).strip().strip("$%.").strip()]
        if not re.fullmatch(_NUMBER, numbers[0]):
            return re.sub(r"\s", "", inside)
    try:
        return Fraction(numbers[-1].replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return re.sub(r"\\d?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2", text)


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{}, braces in it paired."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 7 : place]
    return None
