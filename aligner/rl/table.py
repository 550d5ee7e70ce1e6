"""The answers of a rollout for people: a Parquet file with all of them, a table on the terminal with a few."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligner import arrays
from aligner.rl.rollouts import Group


def write_parquet(path: Path, step: int, groups: Sequence[Group], names: Sequence[str]) -> None:
    """One line an answer: step, row, prompt, completion, tokens, whether it stopped by itself, and a column for each reward.

    Whole or not at all; the same rollout made again writes the same file.
    """
    import pyarrow
    from pyarrow import parquet

    lines = []
    for group in groups:
        for answer, text, values in zip(group.answers, group.texts, group.rewards):
            worth = {f"rewards/{name}": None if np.isnan(value) else float(value) for name, value in zip(names, values)}
            about = {"step": step, "row": group.item.row, "prompt": shown(group.item.text), "completion": text}
            lines.append({**about, "tokens": len(answer.tokens), "stopped": answer.stopped, **worth})
    path.parent.mkdir(parents=True, exist_ok=True)
    with arrays.whole(path) as part:
        parquet.write_table(pyarrow.Table.from_pylist(lines), part)


def table(groups: Sequence[Group], total: np.ndarray, count: int, width: int = 120) -> list[str]:
    """Lines that show the first answers of the first groups and what they are worth."""
    lines = []
    for group, worth in list(zip(groups, total))[:count]:
        text, reward = group.texts[0], worth[0]
        lines.append(f"  {reward:7.3f} | {_cut(shown(group.item.text), width // 2)} -> {_cut(text, width // 2)}")
    return [f"  {'reward':>7} | prompt -> completion", *lines] if lines else []


def shown(prompt: Any) -> str:
    """A prompt as text."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=lambda image: "<image>")


def _cut(text: str, width: int) -> str:
    text = repr(text)[1:-1]
    return text if len(text) <= width else ".." + text[-width + 2 :]
