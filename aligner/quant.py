"""Quantised kernels of a frozen base (QLoRA, arXiv 2305.14314): how they are made, read and multiplied.

A quantised kernel is one `qwix.QArray` where the array stood: `qvalue` [..., in, out] in four or eight bits and one `scale` for every
TILE inputs of a column. It is data like any other leaf, so that it shards, scans over layers and goes through `jit`.
"""

import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from aligner.matmul import Turned, after, dot, dot_turned
from aligner.matmul import matmul as dense_matmul
from aligner.types import UserError

KINDS = ("nf4", "int8")
TILE = 64  # inputs that share a scale

# The values of 4-bit NormalFloat, appendix E of the paper.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises UserError where `config.quant` makes no sense."""
    kind = config.quant.base
    if kind and kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise UserError(f"config.quant.base is {kind!r}; it must be one of {', '.join(KINDS)}, or empty for none{hint}")
    if kind and not config.lora.rank:
        raise UserError(f"config.quant.base={kind} needs adapters, as quantised kernels cannot train; set config.lora.rank, for example 16")


def is_quantised(leaf: Any) -> bool:
    return hasattr(leaf, "qvalue")


def quantise(kernel: Float[Array, "... K N"], kind: str) -> Any:
    """A kernel as a `qwix.QArray`; a stack of kernels one after the other, so that the working memory is that of one.

    Args:
        kernel: [K, N] or stacked [..., K, N].
        kind: one of KINDS.

    Returns:
        QArray: qvalue [..., K, N], scale [..., K / tile, N] in the kernel's dtype; the tile is the largest divisor of K up to TILE that
        is a power of two.
    """
    import qwix

    if kernel.ndim > 2:
        return jax.lax.map(lambda one: quantise(one, kind), kernel)
    return qwix.quantize(kernel, kind, channelwise_axes=(1,), tiled_axes={0: math.gcd(kernel.shape[0], TILE)})


def abstract(kernel: Any, kind: str) -> Any:
    """What `quantise` makes of a kernel of which shape, dtype and sharding are known: abstract leaves, laid out as the kernel is."""

    def like(part):
        if not isinstance(kernel.sharding, NamedSharding):
            return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=kernel.sharding)
        mesh, spec = kernel.sharding.mesh, kernel.sharding.spec
        parts = lambda axis: math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        place = PartitionSpec(*(axis if size % parts(axis) == 0 else None for axis, size in zip(spec, part.shape)))
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, place))

    return jax.tree.map(like, jax.eval_shape(lambda k: quantise(k, kind), kernel))


def quantise_leaf(kernel: Array, kind: str) -> Any:
    """`quantise` for an array on devices: the result is laid out as the kernel was. The kernel should be dropped right after."""
    layout = jax.tree.map(lambda part: part.sharding, abstract(kernel, kind))
    return jax.jit(lambda k: quantise(k, kind), out_shardings=layout)(kernel)


def dequantise(kernel: Any, dtype: Any) -> Float[Array, "... K N"]:
    """The kernel as an array; an array that is not quantised is only cast.

    Elementwise but for a split of the input axis, so that a sharded kernel stays where it is.
    """
    if isinstance(kernel, Turned):
        return kernel.weight.T.astype(dtype)
    if not is_quantised(kernel):
        return kernel.astype(dtype)
    values = jnp.asarray(NF4, kernel.scale.dtype)[kernel.qvalue] if kernel.qtype == "nf4" else kernel.qvalue.astype(kernel.scale.dtype)
    *stacked, tiles, columns = kernel.scale.shape
    tiled = values.reshape(*stacked, tiles, -1, columns) * kernel.scale[..., None, :]
    return tiled.reshape(values.shape).astype(dtype)


def matmul(x: Float[Array, "... K"], kernel: Any) -> Float[Array, "... N"]:
    """`x @ kernel` in the dtype of x, the kernel an array, turned or quantised; a quantised one gets no gradient."""
    if isinstance(kernel, Turned):
        return dot_turned(x, kernel.weight).astype(x.dtype)
    return _matmul(x, kernel) if is_quantised(kernel) else dense_matmul(x, kernel.astype(x.dtype))


@jax.custom_vjp
def _matmul(x, kernel):
    return dense_matmul(x, dequantise(_awaiting(x, kernel), x.dtype))


def _awaiting(x, kernel):
    """The kernel, once x is known: where a CPU's layers are no loop it would make the kernels of all of them at once, and keep for the
    backward pass those that it made for the forward pass."""
    return jax.tree.map(lambda part: after(x, part), kernel)


def _forward(x, kernel):
    return _matmul(x, kernel), kernel  # what is kept for the backward pass is the few bits, not the array made of them


def _backward(kernel, g):
    weight = dequantise(_awaiting(g, kernel), g.dtype)
    return dot(g, weight, ((g.ndim - 1,), (1,))).astype(g.dtype), None


_matmul.defvjp(_forward, _backward)
