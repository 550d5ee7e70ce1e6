"""Loss and gradients as the real training step computes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aligner import algorithms, lora, metrics, sharding, state
from aligner.algorithms.distillation import distil
from aligner.likelihood import cast
from aligner.train_step import jit, make_train_step
from tests.models import tiny

# Keys of a softmax whose queries carry no position: a bias on them moves every logit alike, so the true gradient is zero.
ZERO_GRADIENT = r"vision_tower/.*k_proj/bias"


class Result(NamedTuple):
    """What one step gave: metrics as numbers, gradients by tree path."""

    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]
    example_ids: np.ndarray


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that moves nothing and whose state is the gradient it was given, to the last bit."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return optax.GradientTransformation(zeros, lambda grads, _, params: (zeros(grads), grads))


def build(
    f: tiny.Family, config: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, max_grad_norm: float = 0.0,
    teacher: tiny.Family | None = None,
):  # fmt: skip
    """(jitted step, state, fixed), put together as `aligner.run` does it."""
    shardings = sharding.param_shardings(f.params, f.model.sharding_rules, mesh)
    place = lambda f, at: jax.device_put(tiny.as_arrays(f.params, config.model.param_dtype), at)
    params = place(f, shardings)
    algorithm = distil(config, f.model, teacher.model) if teacher else algorithms.make(config, f.model)
    trainable, base = lora.split(params, config.optim.freeze)
    fixed = {"base": base}
    if config.reference.kind == "copy":
        fixed["reference"] = jit(lambda tree: cast(tree, config.model.dtype), out_shardings=shardings)(params)
    if teacher:
        fixed["teacher"] = place(teacher, sharding.param_shardings(teacher.params, teacher.model.sharding_rules, mesh))
    train_state = state.create(trainable, optimizer, algorithm.carry, config.seed, mesh)
    function = make_train_step(
        algorithm, optimizer, dtype=config.model.dtype, accumulate=config.train.accumulate, max_grad_norm=max_grad_norm
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    return jit(function, out_shardings=(layout, sharding.replicated(mesh))), train_state, fixed


def put(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, dtype: str = "float32") -> dict[str, jax.Array]:
    """A global batch over the mesh; floating columns in the dtype that the test computes in."""
    return jax.device_put(tiny.as_arrays(batch, dtype), sharding.batch_sharding(mesh))


def loss_and_gradients(
    f: tiny.Family, batch: dict[str, np.ndarray], config: Any, mesh: jax.sharding.Mesh, dtype: str = "float32",
    teacher: tiny.Family | None = None,
) -> Result:  # fmt: skip
    """One step on one batch, its floating columns in `dtype`."""
    with jax.set_mesh(mesh):
        step, train_state, fixed = build(f, config, keep_gradient(), mesh, teacher=teacher)
        arguments = train_state, fixed, put(batch, mesh, dtype)
        after, found = step.lower(*arguments).compile(compiler_options=tiny.QUICK)(*arguments)
    ids = np.asarray(found.pop("example_ids").value)
    gradients = {path: np.asarray(leaf) for path, leaf in sharding.tree_paths(after.opt_state).items()}
    return Result(metrics.values(found), gradients, ids)


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": 1}, jax.devices()[:1])
