"""Metrics: how they add up over micro-batches and hosts, and where they go (console, metrics.jsonl, curves, TensorBoard, W&B)."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from aligner.types import Last, Max, Mean, Min

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
    return result
