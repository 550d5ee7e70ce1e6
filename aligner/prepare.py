"""Columns that an algorithm computes once per example before training, such as reference log-probabilities: computed, kept, reused.

They are kept in parts of a few batches under a folder named by a fingerprint of everything they depend on, so that a killed run goes
on with the first missing part, and another run with the same weights, rows and settings reads them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from aligner import arrays
from aligner.console import bar
from aligner.processes import anywhere
from aligner.types import Batch

BATCHES_PER_PART = 32
VERSION = 4  # raised when columns were found to have been computed wrongly: those on disk are then computed anew


def fingerprint(**parts) -> str:
    """A short name for everything that the columns depend on."""
    return hashlib.sha256(json.dumps(parts | {"version": VERSION}, sort_keys=True, default=str).encode()).hexdigest()[:16]


def compute_columns(
    prepare: Callable[[Batch], Mapping[str, jax.Array]],
    batches: Callable[[], Iterable[Batch]],
    count: int,
    rows: int,
    folder: str | Path,
    title: str,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Run `prepare` over all batches, skipping the parts that `folder` already holds.

    Args:
        prepare: batch -> {"example_id": [B, G], column: [B, G, ...]}, replicated over devices.
        batches: gives all batches, always the same ones in the same order: results are then the same, killed or not.
        count: number of batches.
        rows: rows of the dataset, kept or not.
        folder: where the parts are kept.
        title: of the progress bar.
        check_stop: called between batches; may raise.

    Returns:
        {column: [rows, ...]} by row id; NaN where a row was dropped.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, np.ndarray] = {}

    def fill(part: Mapping[str, np.ndarray]) -> None:
        ids = part["example_id"]
        for name in part.keys() - {"example_id"}:
            column = columns.setdefault(name, np.full((rows, *part[name].shape[1:]), np.nan, part[name].dtype))
            column[ids] = part[name]

    stream, taken = None, 0
    progress = None
    for start in range(0, count, BATCHES_PER_PART):
        stop = min(start + BATCHES_PER_PART, count)
        path = folder / f"part-{start:06d}-{stop:06d}.npz"
        kept = _read(path)
        if kept is not None:
            fill(kept)
            continue
        progress = bar(count, title, "batch", start, leave=False) if progress is None else progress
        stream = iter(batches()) if stream is None else stream
        for _ in range(taken, start):  # parts found on disk
            next(stream)
        results = []
        for _ in range(start, stop):
            check_stop()
            batch = next(stream)
            results.append(prepare(batch))
            jax.block_until_ready(results[-2:-1])  # the batch before: no more than two are on the devices
            progress.update()
        taken = stop
        part = _gather(results)
        if jax.process_index() == 0:
            arrays.write(path, **part)
        fill(part)
    if progress is not None:
        progress.close()
    return columns


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """A part; None where it is not there or damaged, for one of the processes at least: it is computed again, by all of them together."""
    kept = arrays.read(path)
    return None if anywhere(kept is None) else kept


def _gather(results: list[Mapping[str, jax.Array]]) -> dict[str, np.ndarray]:
    """Columns of several batches, one row an example, without the places where there is none."""
    host = jax.device_get(results)
    part = {name: np.concatenate([r[name].reshape(-1, *r[name].shape[2:]) for r in host]) for name in host[0]}
    present = part["example_id"] >= 0
    return {name: column[present] for name, column in part.items()}
