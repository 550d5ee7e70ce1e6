"""The training state: all that changes from step to step, and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from aligner.sharding import like_params, replicated
from aligner.types import Array, Int, Params


@struct.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps taken, int32 [].
        trainable: the parameters that train, in `model.param_dtype`.
        opt_state: optax's.
        rng: typed key; never advanced, each step folds in its number.
        carry: what the algorithm keeps from step to step.
        nonfinite: steps in a row that were skipped because loss or gradient was not finite, int32 [].
        reference: what the policy's trainable tree was when the reference was last synchronised; None where it never is.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
    rng: Array
    carry: Any
    nonfinite: Int[Array, ""]
    reference: Params | None = None


def create(
    trainable: Params, optimizer: optax.GradientTransformation, carry: Any, seed: int, mesh: Mesh, own_reference: bool = False
) -> TrainState:
    """The state before the first step; optimizer state is laid out like the parameters it belongs to."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    layout = like_params(jax.eval_shape(optimizer.init, trainable), trainable, shardings, mesh)

    def rest():
        zero = jnp.zeros((), jnp.int32)
        return dict(step=zero, rng=jax.random.key(seed), carry=carry, nonfinite=zero)

    return TrainState(
        trainable=trainable,
        opt_state=jax.jit(optimizer.init, out_shardings=layout)(trainable),
        reference=jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(trainable) if own_reference else None,
        # made by a jit, as the step makes them: arrays put onto the mesh otherwise differ in type and the step would compile twice
        **jax.jit(rest, out_shardings=replicated(mesh))(),
    )


def abstract_create(
    trainable: Params, optimizer: optax.GradientTransformation, carry: Any, mesh: Mesh, own_reference: bool = False
) -> TrainState:
    """What `create` would make from parameters of which only shapes, dtypes and shardings are known."""
    whole = replicated(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    shape = jax.eval_shape(optimizer.init, trainable)
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(
        step=number,
        trainable=trainable,
        opt_state=jax.tree.map(put, shape, like_params(shape, trainable, shardings, mesh)),
        rng=put(jax.eval_shape(jax.random.key, 0), whole),
        carry=jax.tree.map(lambda leaf: put(jnp.asarray(leaf), whole), carry),
        nonfinite=number,
        reference=trainable if own_reference else None,
    )


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings without the data: what a restore needs to know."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
