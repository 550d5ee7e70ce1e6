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
        params: of all such layers, stacked or apart.
        states: [B, S, D] of all pictures of a row; None where `memory` has what the layers make of them.
        mask: [B, 1, T, S].
        sees: [B, T, 1], 1 for tokens that see a picture.
        present: [B, T, 1], 1 for tokens of a text that has one.
        memory: keys and values [B, K, S, H] of every such layer.
    """

    params: Any
    states: Float[Array, "B S D"] | None
    mask: Bool[Array, "B 1 T S"]
    sees: Float[Array, "B T 1"]
    present: Float[Array, "B T 1"]
    memory: tuple[tuple[Array, Array], ...] | None = None


def seen(params: Any, states: Float[Array, "B S D"], batch: Batch) -> Seen:
    """From a batch's `cross_images` [B,T,4] and `tile_mask` [B,I,tiles]. The first two say which pictures a token sees, the first of them
    and the one after the last; the other two which are of its text.

    A token that sees none looks at all of its text's in the attention, whose weights were trained so in `transformers`; only its MLP is
    left out.
    """
    tiles, picture = batch["tile_mask"], jnp.arange(batch["tile_mask"].shape[1])
    first, end, text_first, text_end = jnp.split(batch["cross_images"], 4, axis=-1)  # [B,T,1] each
    shown = ((picture >= first) & (picture < end))[..., None] & tiles[:, None]  # [B,T,I,tiles]
    sees = jnp.any(shown, axis=(2, 3))
    shown |= (~sees[..., None] & (picture >= text_first) & (picture < text_end))[..., None]
    mask = jnp.repeat(shown.reshape(*shown.shape[:2], -1), states.shape[1] // (tiles.shape[1] * tiles.shape[2]), axis=2)
    return Seen(params, states, mask[:, None], sees[..., None].astype(states.dtype), (text_first < text_end).astype(states.dtype))


def unseen(memory: tuple[tuple[Array, Array], ...]) -> Seen:
    """Nothing, with room in `memory`."""
    rows, _, room, _ = memory[0][0].shape
    nothing = jnp.zeros((rows, 1, 1), memory[0][0].dtype)
    return Seen(None, None, jnp.zeros((rows, 1, 1, room), bool), nothing, nothing, memory)


def last(here: Seen, memory: tuple[tuple[Array, Array], ...]) -> Seen:
    """What tokens see that follow the last one: the same as it."""
    return Seen(None, None, here.mask[:, :, -1:], here.sees[:, -1:], here.present[:, -1:], memory)


class CrossAttention(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], here: Seen, memory: tuple[Array, Array] | None):
        """The output, and the pictures' keys and values [B, K, S, H]; those in `memory` where they are already made."""
        c = self.config

        def project(name: str, heads: int, y: Array) -> Array:
            return Linear(heads * c.head_dim, init_scale=c.initializer_range, name=name)(y).reshape(*y.shape[:2], heads, c.head_dim)

        q = RMSNorm(c.norm_eps, name="q_norm")(project("q_proj", c.num_attention_heads, x))
        if memory is None:
            k = RMSNorm(c.norm_eps, name="k_norm")(project("k_proj", c.num_key_value_heads, here.states))
            v = project("v_proj", c.num_key_value_heads, here.states)
            memory = k.swapaxes(1, 2), v.swapaxes(1, 2)
        k, v = (y.swapaxes(1, 2) for y in memory)
        out = attention(q, k, v, Spec(None, mask=here.mask, causal=False), scale=c.head_dim**-0.5)
        return Linear(c.hidden_size, init_scale=c.initializer_range, name="o_proj")(out.reshape(*x.shape[:2], -1)), memory


class CrossLayer(nn.Module):
    """Gated cross-attention, then a gated MLP. Beside the states it gives what the attention makes of the pictures."""

    config: Any
    mlp: type[nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], here: Seen, memory: tuple[Array, Array] | None = None):
        c = self.config
        gate = lambda name: jnp.tanh(leaf(self, name, nn.initializers.zeros, (1,)).astype(x.dtype))
        norm = lambda name: RMSNorm(c.norm_eps, name=name)
        y, memory = CrossAttention(c, name="cross_attn")(norm("input_layernorm")(x), here, memory)
        x = x + gate("cross_attn_attn_gate") * here.present * y
        y = self.mlp(c, name="mlp")(norm("post_attention_layernorm")(x))
        return x + gate("cross_attn_mlp_gate") * here.sees * y, memory


def before(
    config: Any, mlp: type[nn.Module], x: Float[Array, "B T D"], here: Seen, number: Int[Array, ""], rngs: dict[str, Array]
) -> Float[Array, "B T D"]:
    """The cross layer with this number, if it is one, which comes before a layer of the decoder. `rngs` are what adapters drop by."""
    one = jax.tree.map(lambda stacked: stacked[jnp.maximum(number, 0)], here.params)
    run = lambda x: CrossLayer(config, mlp).apply({"params": one}, x, here, rngs=rngs)[0]
    return jax.lax.cond(number >= 0, run, lambda x: x, x)


def look(config: Any, mlp: type[nn.Module], x: Float[Array, "B T D"], here: Seen, number: int) -> tuple[Array, tuple[Array, Array]]:
    """The cross layer with this number, its parameters apart: the states, and what it makes of the pictures."""
    memory = None if here.memory is None else here.memory[number]
    return CrossLayer(config, mlp).apply({"params": here.params[str(number)]}, x, here, memory)
