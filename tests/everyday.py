"""Which cases of a test run every day; the others are slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def everyday(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """All cases, for `parametrize`; those that are not chosen are marked slow."""
    cases = list(cases)
    assert set(chosen) <= set(cases), set(chosen) - set(cases)
    several = lambda case: case if isinstance(case, tuple) else (case,)
    return [case if case in chosen else pytest.param(*several(case), marks=pytest.mark.slow) for case in cases]
