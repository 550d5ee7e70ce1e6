"""Metrics: how they add up over micro-batches and batches, and where they go (metrics.jsonl, curves, TensorBoard, W&B)."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aligner.types import Last, Max, Mean, Min, UserError

Metric = Mean | Max | Min | Last


def merge(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics of two batches as those of one."""

    def one(x: Metric, y: Metric) -> Metric:
        match x:
            case Mean():
                return Mean(x.sum + y.sum, x.count + y.count)
            case Max():
                return Max(jnp.maximum(x.value, y.value))
            case Min():
                return Min(jnp.minimum(x.value, y.value))
        return y

    return {name: one(a[name], b[name]) for name in a}


def reduce_stacked(stacked: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics of a scan over micro-batches, every leaf with a leading axis, as those of one batch."""

    def one(x: Metric) -> Metric:
        match x:
            case Mean():
                return Mean(jnp.sum(x.sum, axis=0), jnp.sum(x.count, axis=0))
            case Max():
                return Max(jnp.max(x.value, axis=0))
            case Min():
                return Min(jnp.min(x.value, axis=0))
        return Last(x.value[-1])

    return {name: one(metric) for name, metric in stacked.items()}


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain numbers; a mean over nothing is left out."""
    result = {}
    for name, metric in metrics.items():
        if isinstance(metric, Mean):
            if float(metric.count) > 0:
                result[name] = float(np.asarray(metric.sum, np.float64) / np.asarray(metric.count, np.float64))
        else:
            result[name] = float(metric.value)
    if {"rewards/chosen", "rewards/rejected"} <= result.keys():  # of unpaired answers: exact over any split, where a mean of margins is not
        result.setdefault("rewards/margins", result["rewards/chosen"] - result["rewards/rejected"])
    return result


JSONL = "metrics.jsonl"


@contextlib.contextmanager
def open_log(workdir: str | Path, step: int, tensorboard: bool = False, wandb: bool = False, config: Any = None) -> Iterator[Callable]:
    """`write(step, split, values)` to every place that the config asks for; only process 0 writes.

    WORKDIR/metrics.jsonl is first cut back to `step`, the one that was restored, so that no step stands there twice.
    """
    if jax.process_index() != 0:
        yield lambda step, split, values: None
        return
    path = Path(workdir) / JSONL
    kept = [record for record in read(workdir) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(temporary, path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a"))
        board = stack.enter_context(_tensorboard(workdir)) if tensorboard else None
        run = stack.enter_context(_wandb(workdir, config)) if wandb else None

        def write(step: int, split: str, values: Mapping[str, Any]) -> None:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
            file.flush()
            place = "/".join(filter(None, (split, values.get("dataset"))))
            numbers = {f"{place}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            for name, value in numbers.items() if board else ():
                board.add_scalar(name, value, step)
            if run:
                run.log(numbers, step=step)

        yield write


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of a workdir's metrics.jsonl; a last line that a kill left unfinished is not one."""
    path = Path(workdir) / JSONL
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def has(workdir: str | Path, step: int, split: str) -> bool:
    """Whether metrics.jsonl holds a line of this step and split."""
    return any(record["step"] == step and record["split"] == split for record in read(workdir))


@contextlib.contextmanager
def _tensorboard(workdir):
    from tensorboardX import SummaryWriter  # imported where it is asked for

    with SummaryWriter(str(Path(workdir) / "tensorboard")) as writer:
        yield writer


@contextlib.contextmanager
def _wandb(workdir, config):
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError("config.log.wandb=True needs the package wandb: pip install wandb") from None
    with wandb.init(project="aligner", dir=str(workdir), config=config, resume="allow", id=Path(workdir).resolve().name) as run:
        yield run


CURVES = ("loss", "rewards/accuracies", "rewards/margins", "accuracy", "learning_rate")


def draw_curves(workdir: str | Path) -> Path | None:
    """WORKDIR/curves.png: what metrics.jsonl holds, as pictures; training as lines, evaluation as dots. None when there is nothing."""
    records = read(workdir)
    names = [name for name in CURVES if any(name in record for record in records)]
    if not names or jax.process_index() != 0:
        return None
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        points: dict[str, list] = {}  # "train", "eval", "eval NAME"
        for record in records:
            if name in record:
                label = " ".join(filter(None, (record["split"], record.get("dataset"))))
                points.setdefault(label, []).append((record["step"], record[name]))
        for label, pairs in points.items():
            style = dict(linewidth=1.2) if label == "train" else dict(marker="o", linestyle="--", markersize=4)
            axes.plot(*zip(*pairs), label=label, **style)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if name.endswith(("accuracies", "accuracy")):
            axes.set_ylim(-0.02, 1.02)
        if len(axes.lines) > 1:
            axes.legend()
    path = Path(workdir) / "curves.png"
    figure.savefig(path, dpi=110)
    return path
