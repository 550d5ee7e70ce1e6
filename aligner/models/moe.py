"""Mixture of experts: a router sends every token to a few of many MLPs (arXiv 1701.06538, as in Mixtral, arXiv 2401.04088).

No expert has a capacity: no token is dropped, so neighbours in a batch, padding and packing do not change a token's result.

Tokens are sorted by expert and multiplied group by group (`lax.ragged_dot`; grouped on TPU, while XLA's CPU backend goes over all experts
for every token). On a mesh every device sorts its own tokens, with all experts gathered for the layer as any fully sharded weight is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from aligner.matmul import accumulated, at_least_float32
from aligner.models.layers import ACTIVATIONS, leaf
from aligner.sharding import largest, per_device
from aligner.types import Batch, UserError


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A sparse MLP's sizes and its routing."""

    num_experts: int
    per_token: int  # how many experts see a token
    intermediate_size: int
    renormalize: bool  # whether the chosen experts' weights add up to 1
    shared_intermediate_size: int | None = None  # of an expert that every token also goes to, through a sigmoid gate
    aux_coef: float = 0.0  # weight of the load-balance loss; 0 leaves it out


def route(
    config: ExpertsConfig, logits: Float[Array, "B T E"]
) -> tuple[Float[Array, "B T E"], Float[Array, "B T k"], Int[Array, "B T k"]]:
    """Which experts see a token: probabilities over all of them in float32, weights of the largest few, and which those are."""
    probabilities = jax.nn.softmax(at_least_float32(logits), axis=-1)
    chosen = largest(probabilities, config.per_token)
    weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
    if config.renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probabilities, weights.astype(logits.dtype), chosen


class Experts(nn.Module):
    """The MLPs, kernels [E, in, out], each on the tokens that chose it."""

    config: ExpertsConfig
    hidden_act: str
    init_scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], weights: Float[Array, "B T k"], chosen: Int[Array, "B T k"]) -> Float[Array, "B T D"]:
        c, width = self.config, x.shape[-1]
        shapes = dict(gate_proj=(width, c.intermediate_size), up_proj=(width, c.intermediate_size), down_proj=(c.intermediate_size, width))
        kernels = [Kernels((c.num_experts, *shape), self.init_scale, name=name)().astype(x.dtype) for name, shape in shapes.items()]
        rows, into, out = ("batch", "length", None), (None, None, "mlp"), (None, "mlp", None)
        run = per_device(functools.partial(grouped_mlp, self.hidden_act), (rows, rows, rows, into, into, out), rows, summed="mlp")
        return run(x, weights, chosen, *kernels)


class Kernels(nn.Module):
    """A leaf `kernel` alone."""

    shape: tuple[int, ...]
    init_scale: float

    @nn.compact
    def __call__(self) -> Array:
        kernel = leaf(self, "kernel", nn.initializers.normal(self.init_scale), self.shape)
        if self.has_variable("params", "lora_a"):
            raise UserError(f"adapters on the experts ({'/'.join(self.path)}) are not implemented; leave them out of config.lora.targets")
        return kernel


def grouped_mlp(
    act: str,
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "B T D"]:
    """Sum over a token's experts of weight * MLP, one product a kernel for all tokens sorted by expert."""
    experts, k = gate.shape[0], chosen.shape[-1]
    tokens, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    order = jnp.argsort(chosen)  # stable: place in the sorted list -> token * k + which of its choices
    sizes = jnp.bincount(chosen, length=experts).astype(jnp.int32)
    dot = lambda y, kernel: lax.ragged_dot(y, kernel, sizes, **accumulated(x.dtype)).astype(x.dtype)
    taken = tokens[order // k]
    y = dot(ACTIVATIONS[act](dot(taken, gate)) * dot(taken, up), down)
    y = y[jnp.argsort(order)].reshape(*weights.shape, -1)  # back in the order of the tokens
    return jnp.sum(y * weights[..., None], axis=-2).astype(x.dtype)


def load(
    probabilities: Float[Array, "B T E"], chosen: Int[Array, "B T k"], real: Bool[Array, "B T"]
) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
    """For every row and expert, over the real tokens: how many chose it, and the sum of its probabilities."""
    count = jnp.sum(jax.nn.one_hot(chosen, probabilities.shape[-1], dtype=probabilities.dtype), axis=-2)
    return tuple(jnp.sum(jnp.where(real[..., None], y, 0), axis=1) for y in (count, probabilities))


def balance_loss(aux: Mapping[str, Array], batch: Batch, layers: int) -> Float[Array, ""]:
    """The load-balance loss (Switch, arXiv 2101.03961, equation 4) over all real tokens of a batch and all layers together.

    E * sum_e (how many choose e) * (mean probability of e), 1 * per_token when all is even. It is no sum over rows.

    Args:
        aux: "router_count", "router_probability" [B, E], sums over tokens and layers.
        batch: says which tokens are real.
        layers: number of layers summed over.
    """
    tokens = layers * jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1)
    count, probability = (jnp.sum(aux[name], axis=0) / tokens for name in ("router_count", "router_probability"))
    return count.shape[-1] * jnp.sum(jax.lax.stop_gradient(count) * probability)
