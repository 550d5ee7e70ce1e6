"""Layers in which text looks at pictures through cross-attention, between the decoder's own layers (Llama 3.2 Vision, arXiv 2407.21783)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aligner.models.attention import Spec, attention
from aligner.models.layers import Linear, RMSNorm, leaf
from aligner.types import Batch


@struct.dataclass
class Seen:
    """What the layers look at, and who sees what of it.

    Attributes:
        params: of all such layers, stacked.
        states: [B, S, D] of all pictures of a row.
        mask: [B, 1, T, S].
        sees: [B, T, 1], 1 for tokens that see a picture.
        present: [B, 1, 1], 1 for rows that have one.
    """

    params: Any
    states: Float[Array, "B S D"]
    mask: Bool[Array, "B 1 T S"]
    sees: Float[Array, "B T 1"]
    present: Float[Array, "B 1 1"]


def seen(params: Any, states: Float[Array, "B S D"], batch: Batch) -> Seen:
    """From a batch's `cross_images` [B,T,2], the first picture that a token sees and the one after the last, and `tile_mask` [B,I,tiles].

    A token that sees none looks at all of the row's in the attention, whose weights were trained so in `transformers`; only its MLP is
    left out.
    """
    tiles, picture = batch["tile_mask"], jnp.arange(batch["tile_mask"].shape[1])
    first, end = (batch["cross_images"][..., i, None] for i in (0, 1))
    shown = ((picture >= first) & (picture < end))[..., None] & tiles[:, None]  # [B,T,I,tiles]
    sees = jnp.any(shown, axis=(2, 3))
    shown |= ~sees[..., None, None] & batch["image_mask"][:, None, :, None]
    mask = jnp.repeat(shown.reshape(*shown.shape[:2], -1), states.shape[1] // (tiles.shape[1] * tiles.shape[2]), axis=2)
    number = lambda x: x[..., None].astype(states.dtype)
    return Seen(params, states, mask[:, None], number(sees), number(jnp.any(batch["image_mask"], axis=1, keepdims=True)))


class CrossAttention(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], here: Seen) -> Float[Array, "B T D"]:
        c = self.config

        def project(name: str, heads: int, y: Array) -> Array:
            return Linear(heads * c.head_dim, init_scale=c.initializer_range, name=name)(y).reshape(*y.shape[:2], heads, c.head_dim)

        q, k = project("q_proj", c.num_attention_heads, x), project("k_proj", c.num_key_value_heads, here.states)
        q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        v = project("v_proj", c.num_key_value_heads, here.states)
        out = attention(q, k, v, Spec(None, mask=here.mask, causal=False), scale=c.head_dim**-0.5)
        return Linear(c.hidden_size, init_scale=c.initializer_range, name="o_proj")(out.reshape(*x.shape[:2], -1))


class CrossLayer(nn.Module):
    """Gated cross-attention, then a gated MLP."""

    config: Any
    mlp: type[nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], here: Seen):
        c = self.config
        gate = lambda name: jnp.tanh(leaf(self, name, nn.initializers.zeros, (1,)).astype(x.dtype))
        norm = lambda name: RMSNorm(c.norm_eps, name=name)
        y = CrossAttention(c, name="cross_attn")(norm("input_layernorm")(x), here)
        x = x + gate("cross_attn_attn_gate") * here.present * y
        y = self.mlp(c, name="mlp")(norm("post_attention_layernorm")(x))
        return x + gate("cross_attn_mlp_gate") * here.sees * y, None


def before(config: Any, mlp: type[nn.Module], x: Float[Array, "B T D"], here: Seen | None, number: Int[Array, ""]) -> Float[Array, "B T D"]:
    """The cross layer with this number, if it is one, which comes before a layer of the decoder."""
    if here is None:
        return x
    one = jax.tree.map(lambda stacked: stacked[jnp.maximum(number, 0)], here.params)
    run = lambda x: CrossLayer(config, mlp).apply({"params": one}, x, here)[0]
    return jax.lax.cond(number >= 0, run, lambda x: x, x)
