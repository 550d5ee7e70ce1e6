"""Metrics: how they add up over micro-batches and batches, and where they go (metrics.jsonl, curves, TensorBoard, W&B).

Names are TRL's, and so are values at one batch. Over several, micro-batches or those of an evaluation, a value here is what one batch of
them all would give; TRL averages what each gave, be it a mean over tokens or over the good answers, a least or a greatest reward, or the
loss of an evaluation. `num_tokens` are those that were computed: a prompt that answers share is one, which TRL counts with each of them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aligner import arrays
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
    with arrays.whole(path) as part:
        part.write_text("".join(json.dumps(record) + "\n" for record in kept))
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


def evaluation(workdir: str | Path, dataset: str = "", step: int | None = None) -> dict[str, float]:
    """The newest evaluation of a set ("" is the one without a name) in metrics.jsonl, or that of a step; {} without one."""
    for record in reversed(read(workdir)):
        if record["split"] == "eval" and record.get("dataset", "") == dataset and step in (None, record["step"]):
            return {name: value for name, value in record.items() if name not in ("step", "split", "dataset")}
    return {}


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


CURVES = ("loss", "reward", "rewards/accuracies", "rewards/margins", "accuracy", "logps/chosen", "grad_norm", "learning_rate")


def draw_curves(workdir: str | Path) -> Path | None:
    """WORKDIR/curves.png: what metrics.jsonl holds, as pictures; None when there is nothing.

    Training is a pale line with its moving average over it, evaluation dots.
    """
    records = read(workdir)
    names = [name for name in CURVES if any(name in record for record in records)]
    if not names or jax.process_index() != 0:
        return None
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    datasets = list(dict.fromkeys(record.get("dataset", "") for record in records if record["split"] == "eval"))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names):
        steps, train = _points(records, "train", name)
        noisy = len(train) > 40 and name != "learning_rate"
        axes.plot(steps, train, color="tab:blue", linewidth=0.8 if noisy else 1.8, alpha=0.35 if noisy else 1.0)
        if noisy:
            axes.plot(steps, _smooth(train), color="tab:blue", linewidth=1.8)
        for number, dataset in enumerate(datasets):
            held_out = _points([record for record in records if record.get("dataset", "") == dataset], "eval", name)
            axes.plot(*held_out, color=f"C{number + 1}", linestyle="--", linewidth=1, marker="o", markersize=5)
        axes.set_title(name, fontsize=11)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if name.endswith(("accuracies", "accuracy")):
            axes.set_ylim(-0.02, 1.03)
            axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")  # chance
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("step")
    panels[0].plot([], [], color="tab:blue", label="train")
    for number, dataset in enumerate(datasets):
        panels[0].plot([], [], color=f"C{number + 1}", linestyle="--", marker="o", label=dataset or "held out")
    panels[0].legend(frameon=False)
    path = Path(workdir) / "curves.png"
    with arrays.whole(path) as part:  # so that a kill leaves the picture of before, not half of one
        figure.savefig(part, dpi=110, format="png")
    return path


def _points(records: list[dict[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[name]) for record in records if record["split"] == split and name in record]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(series: list[float]) -> np.ndarray:
    """Moving average, centred, over a fifteenth of the series; values that are not finite do not count."""
    values = np.asarray(series, np.float64)
    finite = np.isfinite(values)
    window = np.ones(len(values) // 15 | 1)
    count = np.convolve(finite, window, mode="same")
    return np.convolve(np.where(finite, values, 0.0), window, mode="same") / np.where(count, count, np.nan)
