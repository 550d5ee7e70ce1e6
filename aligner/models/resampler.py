"""A perceiver resampler (arXiv 2103.03206, as in Idefics2): learned queries read an image's features into a fixed number."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aligner.models.attention import Spec, attention
from aligner.models.layers import ACTIVATIONS, Linear, RMSNorm, leaf, stack


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """What changes the computation."""

    width: int
    latents: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_act: str = "silu"
    norm_eps: float = 1e-6


class GatedMLP(nn.Module):
    """An MLP with a gate and no biases."""

    inner: int
    out: int
    hidden_act: str

    @nn.compact
    def __call__(self, x: Float[Array, "... V"]) -> Float[Array, "... D"]:
        y = ACTIVATIONS[self.hidden_act](Linear(self.inner, name="gate_proj")(x)) * Linear(self.inner, name="up_proj")(x)
        return Linear(self.out, name="down_proj")(y)


class CrossAttention(nn.Module):
    """Latents look at what is to be read and at themselves."""

    config: ResamplerConfig

    @nn.compact
    def __call__(
        self, latents: Float[Array, "N L D"], context: Float[Array, "N P D"], mask: Bool[Array, "N 1 L S"]
    ) -> Float[Array, "N L D"]:
        c = self.config
        both = jnp.concatenate([context, latents], axis=1)

        def project(name: str, heads: int, x: Array) -> Array:
            return Linear(heads * c.head_dim, name=name)(x).reshape(*x.shape[:2], heads, c.head_dim)

        q, k, v = project("q_proj", c.heads, latents), project("k_proj", c.kv_heads, both), project("v_proj", c.kv_heads, both)
        out = attention(q, k, v, Spec(None, mask=mask, causal=False), scale=c.head_dim**-0.5)
        return Linear(c.width, name="o_proj")(out.reshape(*latents.shape[:2], -1))


class Layer(nn.Module):
    config: ResamplerConfig

    @nn.compact
    def __call__(self, latents: Float[Array, "N L D"], context: Float[Array, "N P D"], mask: Bool[Array, "N 1 L S"]):
        c = self.config
        norm = lambda name: RMSNorm(c.norm_eps, name=name)
        read = CrossAttention(c, name="self_attn")(norm("input_latents_norm")(latents), norm("input_context_norm")(context), mask)
        latents = latents + read
        return latents + GatedMLP(4 * c.width, c.width, c.hidden_act, name="mlp")(norm("post_attention_layernorm")(latents)), None


class Resampler(nn.Module):
    """[N, P, D] -> [N, latents, D]. `real` says which of the P there are."""

    config: ResamplerConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, context: Float[Array, "N P D"], real: Bool[Array, "N P"]) -> Float[Array, "N L D"]:
        c = self.config
        latents = leaf(self, "latents", nn.initializers.normal(0.02), (c.latents, c.width)).astype(context.dtype)
        latents = jnp.broadcast_to(latents, (len(context), *latents.shape))
        mask = jnp.concatenate([real, jnp.ones((len(real), c.latents), bool)], axis=1)[:, None, None]
        mask = jnp.broadcast_to(mask, (len(real), 1, c.latents, mask.shape[-1]))
        layers = stack(Layer, c.depth, self.remat, in_axes=(nn.broadcast, nn.broadcast))
        return RMSNorm(c.norm_eps, name="norm")(layers(c, name="layers")(latents, context, mask)[0])
