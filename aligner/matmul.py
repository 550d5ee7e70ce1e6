"""The one matmul primitive: float32 accumulation, and a backward pass whose two products are chosen, not left to autodiff.

Plain autodiff of `x @ w` costs 7 % of a float32 training step on CPU (16 % under a scan over layers) and about a third of a bfloat16
one; asking for a bfloat16 result of bfloat16 operands costs more still, on every backend that then accumulates in bfloat16.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from aligner.sharding import alone

FEW_ROWS = 64  # rows of x up to which a CPU multiplies a turned kernel from the left
TURNED = re.compile(r"(^|/)(layers/\d+/.*|lm_head)/kernel$")


def wide(dtype: Any) -> jnp.dtype:
    """float32, or the dtype itself where it is wider: what sums and norms are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def at_least_float32(x: Array) -> Array:
    return x.astype(wide(x.dtype))


def accumulated(dtype: jnp.dtype) -> dict[str, Any]:
    """What every product of this dtype is asked for: to be accumulated and returned in at least float32."""
    # float32 operands mean float32 products: TPUs would otherwise round them to bfloat16, GPUs to TF32
    precision = None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return {"precision": precision, "preferred_element_type": wide(dtype)}


def dot(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """`lax.dot_general` without batch axes, accumulated and returned in at least float32."""
    return lax.dot_general(x, y, (contract, ((), ())), **accumulated(x.dtype))


@jax.custom_vjp
def matmul(x: Float[Array, "... K"], w: Float[Array, "K N"]) -> Float[Array, "... N"]:
    """`x @ w`, accumulated in float32 (or wider) and rounded once to the dtype of x. Both have the same dtype."""
    return dot(x, w, ((x.ndim - 1,), (0,))).astype(x.dtype)


def _forward(x, w):
    return matmul(x, w), (x, w)


def _backward(residuals, g):
    x, w = residuals
    with jax.named_scope("matmul_backward"):
        dx = dot(g, w, ((g.ndim - 1,), (1,))).astype(x.dtype)
        return dx, weight_gradient(x, g).astype(w.dtype)


matmul.defvjp(_forward, _backward)


def weight_gradient(x: Float[Array, "... K"], g: Float[Array, "... N"]) -> Float[Array, "K N"]:
    """The gradient of `x @ w` by w: `x` and `g` contracted over every leading axis, in at least float32."""
    leading = tuple(range(x.ndim - 1))
    return on_one_cpu(_weight_gradient_cpu, functools.partial(dot, contract=(leading, leading)), x, g)


def _weight_gradient_cpu(x, g):
    """A CPU's products want x turned. XLA would do it in the pass that makes x, at several times a transpose's cost, or in bfloat16 widen
    all to float32: so x is turned apart, or not at all where it is the wider of two in float32."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if x.dtype != jnp.bfloat16 and x.shape[1] > g.shape[1]:
        return dot(x, g, ((0,), (0,)))
    return dot(turned(x), g, ((1,), (0,)))


def on_one_cpu(form: Callable[..., Array], default: Callable[..., Array], *arrays: Array) -> Array:
    """`form` of the arrays in a program for one CPU, else `default`: what is turned in memory is not cut over devices."""
    return lax.platform_dependent(*arrays, cpu=form, default=default) if alone() else default(*arrays)


def after(first: Array, x: Array) -> Array:
    """x, for a product that had better wait until `first` is known.

    One CPU starts whatever is ready, and two products of all the vocabulary at once, which share its caches, take a fifth longer than
    one after the other.
    """
    return on_one_cpu(lambda first, x: jnp.where(_never(first), jnp.zeros_like(x), x), lambda first, x: x, first, x)


def _never(x: Array) -> Array:
    """False, once x is known: nothing is above infinity, but a compiler does not fold that away."""
    return jnp.any(x.ravel()[:1] > jnp.inf)


def apart(form: Callable[[Array], Any], x: Array) -> Any:
    """form(x), in memory, by passes of its own: in a branch, since a compiler makes a pass of all that it can put together, and what makes
    x would become part of those that read it, and what they make a part of those that read that."""
    nothing = lambda x: jax.tree.map(jnp.zeros_like, jax.eval_shape(form, x))
    return lax.cond(_never(x), nothing, form, x)


def turned(x: Float[Array, "... M N"]) -> Float[Array, "... N M"]:
    """The transpose of each matrix, in memory; apart, or a slice of a stack would take five times as long."""
    return apart(lambda x: with_layout_constraint(x.swapaxes(-1, -2), Layout(major_to_minor=tuple(range(x.ndim)))), x)


@struct.dataclass
class Turned:
    """A kernel [K, N] held as its transpose, `weight` [N, K]: how a CPU reads it fastest for the few rows of a step of generation."""

    weight: Float[Array, "N K"]


def turn(params: Any) -> Any:
    """The tree, its decoder's layers apart, with the kernels of those layers and of the head turned; as it is where there is no CPU."""
    if jax.default_backend() != "cpu":
        return params

    def turned(path: tuple, leaf: Array) -> Any:
        fits = leaf.ndim == 2 and TURNED.search(jax.tree_util.keystr(path, simple=True, separator="/"))
        return Turned(leaf.T) if fits else leaf

    return jax.tree_util.tree_map_with_path(turned, params)


def dot_turned(x: Float[Array, "... K"], weight: Float[Array, "N K"]) -> Float[Array, "... N"]:
    """`x @ weight.T` as `dot` gives it. A CPU packs the right factor of a product anew each time: few rows had better be it."""
    rows = math.prod(x.shape[:-1])
    if rows > FEW_ROWS or jax.default_backend() != "cpu":
        return dot(x, weight, ((x.ndim - 1,), (1,)))
    y = dot(weight, x.reshape(rows, -1), ((1,), (1,)))
    return lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)  # without the barrier the compiler swaps the factors back
