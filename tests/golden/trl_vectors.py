"""What the real TRL computed (scripts/trl_vectors), and how ours is compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.metrics import values
from tests.models import tiny

FOLDER = Path(__file__).parent / "vectors"
BAR = 1e-6  # max|a - b| / max|b|
SKIPPED = {"num_tokens"}  # the training step counts those

with np.load(FOLDER / "trl_batches.npz") as stored:
    BATCHES: dict[str, dict[str, np.ndarray]] = {}
    for key in stored:
        BATCHES.setdefault(key.split("/")[0], {})[key.split("/")[1]] = stored[key]


def load(name: str) -> list[dict]:
    cases = json.loads((FOLDER / f"trl_losses_{name}.json").read_text())["cases"]
    assert {case["batch"] for case in cases} == set(BATCHES) and len(BATCHES) == 3
    return cases


def of(*names: str) -> list:
    """The stored cases of some trainers, as parameters (trainer, record) of a test."""
    return [pytest.param(name, record, id=f"{name}: {record['case']}: {record['batch']}") for name in names for record in load(name)]


def as_rows(x: np.ndarray, answers: int) -> np.ndarray:
    """[2n, T], all first answers and then all second ones -> [n, answers * T]: the answers to a prompt in one row."""
    return np.concatenate(np.split(x, 2)[:answers], axis=1)


def as_answers(x: np.ndarray, answers: int) -> np.ndarray:
    """[n, answers * T] -> [answers * n, T], the inverse."""
    return np.concatenate(np.split(np.asarray(x), answers, axis=1))


def reduced(objective: Callable, scores, batch) -> tuple[jax.Array, dict]:
    """(loss, metrics) as the training step puts them together."""
    terms, metrics, _ = objective(scores, batch, {})
    return sum(term.weight * term.sum / term.count for term in terms.values()), metrics


def check(record: dict, loss: Callable, x: np.ndarray, arrange: Callable = np.asarray, where=1.0) -> None:
    """`loss`, x -> (loss, metrics), its gradient and its metrics are the record's.

    Args:
        arrange: the gradient as TRL has it.
        where: 0 at places of TRL's gradient that no parameter feels.
    """
    with jax.enable_x64(True):
        (found, metrics), gradient = tiny.quick(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x))
    assert found.dtype == np.float64
    assert found == pytest.approx(record["loss"], rel=BAR)
    expected = np.array(record["gradient"])
    gradient = np.asarray(arrange(gradient))
    assert gradient.shape == expected.shape
    assert np.abs((gradient - expected) * where).max() <= BAR * np.abs(expected * where).max()
    found = values(metrics)
    for metric in record["metrics"].keys() - SKIPPED:
        assert found[metric] == pytest.approx(record["metrics"][metric], rel=BAR, abs=1e-9), metric
