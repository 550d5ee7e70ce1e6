"""Building blocks that every family shares: linear maps, embeddings, norms, activations.

A module's leaves are read with `get_variable`, not `param`: only `init` fixes shapes, so that a leaf may later be something else
than the array that `init` made (a quantised kernel, a kernel with adapters).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from aligner import lora
from aligner.matmul import after, at_least_float32, dot
from aligner.quant import matmul
from aligner.sharding import constrain


def rounded_once(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """In at least float32, as PyTorch computes its own; in bfloat16 every step between would be rounded, and take longer."""
    return lambda x: activation(at_least_float32(x)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": rounded_once(jax.nn.silu),
    "swish": rounded_once(jax.nn.silu),
    "gelu": rounded_once(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_pytorch_tanh": rounded_once(lambda x: jax.nn.gelu(x, approximate=True)),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(scaled(x, 1.702)),
    "relu": jax.nn.relu,
}


def scaled(x: Array, by: float) -> Array:
    """x times a number that is not rounded to x's dtype before, as PyTorch multiplies; in bfloat16 it would be off by up to 0.4 %."""
    return x if by == 1.0 else (at_least_float32(x) * by).astype(x.dtype)


def leaf(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
    """A parameter: made by `init`, afterwards whatever stands in the tree."""
    if module.is_initializing():
        return module.param(name, init, shape)
    return module.get_variable("params", name)


def own_rngs(module: nn.Module) -> dict[str, Array]:
    """`rngs` for a module that this one applies."""
    return {"dropout": module.make_rng("dropout")} if module.has_rng("dropout") else {}


def rngs(key: Array | None) -> dict[str, Array]:
    """What a module's `apply` needs to draw from; nothing is dropped without a key."""
    return {} if key is None else {"dropout": key}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(f: Callable[..., Array], *args: Any) -> Array:
    """f(*args), of which the backward pass keeps the arguments and computes the rest again.

    As under `jax.checkpoint`; but where no loop lies between the two passes, XLA on a CPU finds their computations equal and keeps what the
    first one made. Here the arguments of the second wait for the gradient, and are no longer the same.
    """
    return f(*args)


def _recomputed_backward(f, vjp, g):
    return jax.tree.map(lambda x: after(g, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, vjp)(g)


recomputed.defvjp(lambda f, *args: jax.vjp(jax.checkpoint(f, prevent_cse=False), *args), _recomputed_backward)


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel [in, out], in the dtype of x; with the adapter that stands beside the kernel, if any."""

    features: int
    use_bias: bool = False
    init_scale: float = 0.02

    @nn.compact
    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        kernel = leaf(self, "kernel", nn.initializers.normal(self.init_scale), (x.shape[-1], self.features))
        y = matmul(x, kernel)
        if self.has_variable("params", "lora_a"):
            read = lambda name: self.get_variable("params", name)
            y = lora.adapt(y, x, kernel, read, (lambda: self.make_rng("dropout")) if self.has_rng("dropout") else None)
        if self.use_bias:
            y = y + leaf(self, "bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return checkpoint_name(y, "linear")


class Embed(nn.Module):
    """A table of rows [num, features]."""

    num: int
    features: int
    init_scale: float = 0.02

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        table = leaf(self, "embedding", nn.initializers.normal(self.init_scale), (self.num, self.features))
        if ids.size > self.num:  # less is sent of the table than of all that is looked up in it
            table = constrain(table, "vocab", None)
        return jnp.take(table, ids, axis=0)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32.

    Llama rounds to the dtype of x before the weight is applied; with `wide` the weight is applied in float32 (OLMo 2), with `plus_one`
    it is 1 + weight (Gemma).
    """

    eps: float = 1e-6
    wide: bool = False
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = leaf(self, "scale", nn.initializers.zeros if self.plus_one else nn.initializers.ones, (x.shape[-1],))
        return recomputed(functools.partial(rms_norm, eps=self.eps, wide=self.wide, plus_one=self.plus_one), x, scale)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float, wide: bool, plus_one: bool) -> Float[Array, "... D"]:
    y = at_least_float32(x)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if wide or plus_one:
        return (y * (scale.astype(y.dtype) + plus_one)).astype(x.dtype)
    return _by_feature(y.astype(x.dtype), scale.astype(x.dtype))


@jax.custom_vjp
def _by_feature(x: Float[Array, "... D"], scale: Float[Array, "D"]) -> Float[Array, "... D"]:
    """`x * scale`. Autodiff would round each part of the scale's gradient before it adds them up, and a CPU takes four times as long to."""
    return x * scale


def _by_feature_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, scale = residuals
    parts, leading = at_least_float32(x) * at_least_float32(g), tuple(range(x.ndim - 1))
    return g * scale, dot(jnp.ones(x.shape[:-1], parts.dtype), parts, (leading, leading)).astype(scale.dtype)


_by_feature.defvjp(lambda x, scale: (x * scale, (x, scale)), _by_feature_backward)


class LayerNorm(nn.Module):
    """Layer norm with bias; statistics in float32."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = leaf(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = leaf(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        wide = at_least_float32(x)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


def pick(kinds: tuple, index: Array) -> Any:
    """The one of a few alike trees that a layer's number says; layers differ, their program does not."""
    if len(kinds) == 1:
        return kinds[0]
    return jax.tree.map(lambda *leaves: jax.lax.select_n(index, *leaves), *kinds)


def keep(*names: str) -> Callable[..., bool]:
    """Keeps what has one of these names, and all that cuDNN's attention gives: its log-sum-exp has none, and is made by all of it again."""
    named = jax.checkpoint_policies.save_only_these_names(*names)
    return lambda primitive, *args, **options: primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *args, **options)


# What the backward pass may keep of a layer; the rest is computed again. "context" is attention's output before its projection.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "context": keep("context"),
    "dots": keep("linear", "context"),
}


def unrolled(remat: str) -> bool:
    """Whether a program has its layers one after the other.

    A loop on a CPU copies what it reads of its stacks and what it adds to them, and keeps a float32 copy of what it keeps in bfloat16;
    without a loop, what a whole layer computes again would be found equal and kept.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu" and remat == "none"


def stack(layer: type[nn.Module], length: int, remat: str, in_axes: tuple = ()) -> type[nn.Module]:
    """A module class that runs `length` copies of `layer` in a scan, their parameters stacked on axis 0.

    Args:
        layer: `__call__(carry, *arguments) -> (carry, collected)`.
        length: number of layers.
        remat: a key of REMAT.
        in_axes: for every further argument `nn.broadcast`, if all layers get it alike, or the axis along which it is dealt out.
    """
    if REMAT[remat] is not None:
        layer = nn.remat(layer, policy=REMAT[remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unrolled(remat) else 1,
        check_constancy_invariants=False,  # which would trace each layer once more
    )
