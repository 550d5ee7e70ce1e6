"""The optimizer from the config: AdamW, a schedule, and groups of leaves by regex."""

import difflib
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from aligner.matmul import at_least_float32
from aligner.sharding import tree_paths
from aligner.types import Params, UserError

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(optim: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up, then constant, or linear or cosine decay to zero at `steps`."""
    if optim.schedule not in SCHEDULES:
        near = difflib.get_close_matches(str(optim.schedule), SCHEDULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config.optim.schedule {optim.schedule!r} is not a schedule{hint} (known: {', '.join(SCHEDULES)})")
    peak = optim.learning_rate
    warmup = math.ceil(steps * optim.warmup) if optim.warmup < 1 else int(optim.warmup)  # up, as transformers rounds
    rest = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[optim.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup]) if warmup else decay


def group_factor(path: str, groups, key: str, default: float = 1.0) -> float:
    """The factor of the first group whose regex matches the path from its start; the default without one, or where it sets none."""
    return next((float(options.get(key, default)) for pattern, options in groups if re.match(pattern, path)), default)


def check_groups(groups, trainable: Params) -> None:
    """Refuse a group that would change nothing.

    Raises:
        UserError: a regex matches no leaf that trains.
    """
    paths = tree_paths(trainable)
    for pattern, _ in groups:
        if not any(re.match(pattern, path) for path in paths):
            top = ", ".join(f"{name}/..." for name in trainable)
            raise UserError(f"config.optim.groups has {pattern!r}, which matches no parameter that trains; their tree begins with {top}")


def make_optimizer(
    optim: ConfigDict, schedule: optax.Schedule, trained_layers: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """AdamW over the trainable tree (Loshchilov & Hutter, arXiv 1711.05101); clipping is the step's.

    Norms' weights and biases get no weight decay, as in transformers' Trainer and so in TRL, unless a group sets theirs. (The Trainer goes
    by names, and those of the norms in Qwen2.5-VL's tower escape it: there they decay.)

    Args:
        optim: the config's section.
        schedule: learning rate by step.
        trained_layers: tree prefix -> number of its layers that any gradient reaches; layers beyond get no weight decay.
    """
    known = {"learning_rate", "weight_decay"}
    for pattern, options in optim.groups:
        wrong = set(options) - known
        if wrong:
            raise UserError(f"config.optim.groups: {pattern!r} sets {sorted(wrong)[0]!r}; a group may set {' and '.join(sorted(known))}")

    def by_path(function):
        return lambda tree: jax.tree_util.tree_map_with_path(lambda path, leaf: function("/".join(k.key for k in path), leaf), tree)

    def decay(path, leaf):
        alone = path.rpartition("/")[2] in ("scale", "bias")
        factor = optim.weight_decay * group_factor(path, optim.groups, "weight_decay", default=0.0 if alone else 1.0)
        for prefix, count in (trained_layers or {}).items():
            if path.startswith(prefix):
                reached = jnp.arange(leaf.shape[0]) < count if count else jnp.zeros(leaf.shape[:1], bool)
                return factor * reached.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))
        return factor

    def add_decay(updates, state, params: Params):
        factors = by_path(decay)(params)
        return jax.tree.map(lambda u, p, f: u + f * p, updates, params, factors), state

    def scale_groups(updates, state, params=None):
        factors = by_path(lambda path, leaf: group_factor(path, optim.groups, "learning_rate"))(updates)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    # moments are of at least float32: times 0.999, a number in bfloat16 stays what it is, and the second would never fall
    widened = lambda tree: jax.tree.map(at_least_float32, tree)
    adam = optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps)
    stateless = lambda params: optax.EmptyState()
    moments = lambda updates, state, params: adam.update(widened(updates), state)
    chain = [optax.GradientTransformation(lambda params: adam.init(widened(params)), moments)]
    if optim.weight_decay:
        chain.append(optax.GradientTransformation(stateless, add_decay))
    if optim.groups:
        chain.append(optax.GradientTransformation(stateless, scale_groups))
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))
