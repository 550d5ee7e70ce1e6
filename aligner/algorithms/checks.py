"""Checks of `config.algorithm` that several algorithms share: one sentence each, before anything is loaded."""

import difflib
from collections.abc import Iterable

from ml_collections import ConfigDict

from aligner.types import UserError


def check_positive(c: ConfigDict, *keys: str) -> None:
    """Each key is > 0."""
    for key in keys:
        if not c[key] > 0:
            raise UserError(f"config.algorithm.{key} is {c[key]}, but {c.name} needs {key} > 0")


def check_not_negative(c: ConfigDict, *keys: str) -> None:
    """Each key is >= 0."""
    for key in keys:
        if not c[key] >= 0:
            raise UserError(f"config.algorithm.{key} is {c[key]}, but {c.name} needs {key} >= 0")


def check_smoothing(c: ConfigDict) -> None:
    """`label_smoothing` is the probability that a label is wrong."""
    if not 0 <= c.label_smoothing < 0.5:
        raise UserError(f"config.algorithm.label_smoothing is {c.label_smoothing}, but it must be in [0, 0.5)")


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """`value` is one of `choices`; else the nearest is named.

    Args:
        key: dotted name of the setting, without `config.`.
    """
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config.{key} {value!r} is not known{hint} (there is {', '.join(choices)})")
