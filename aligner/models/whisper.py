"""Whisper's encoder (arXiv 2212.04356): a log-mel spectrogram through two convolutions, then transformer layers like a vision tower's."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aligner.matmul import matmul
from aligner.models import families, vision
from aligner.models.attention import Spec, dense
from aligner.models.layers import ACTIVATIONS, Embed, LayerNorm, leaf, stack
from aligner.sharding import constrain
from aligner.types import UserError

# Fields that need not be read: dropout, and `scale_embedding`, which the encoder itself does not look at.
UNREAD = families.UNREAD | {"activation_dropout", "encoder_layerdrop", "scale_embedding"}


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """What changes the computation; names are Hugging Face's."""

    layers: vision.VisionConfig
    num_mel_bins: int
    max_source_positions: int
    pool: int  # neighbouring positions that are averaged before the final norm

    @property
    def frames(self) -> int:
        """Frames of a spectrogram; the second convolution halves them."""
        return 2 * self.max_source_positions

    @property
    def features(self) -> int:
        """Features of a spectrogram that is sound to its end."""
        return self.max_source_positions // self.pool


def read(hf: Any, pool: int = 1) -> WhisperConfig:
    """The encoder's flags from its Hugging Face config; what it does not implement is refused by name."""
    return families.read(lambda hf: _config(hf, pool), hf, UNREAD)


def _config(hf: Any, pool: int) -> WhisperConfig:
    act, width = hf.activation_function, hf.d_model
    if act not in ACTIVATIONS:
        raise UserError(f"activation_function {act!r} of the audio config is not supported; known: {', '.join(ACTIVATIONS)}")
    layers = vision.VisionConfig(
        width, hf.encoder_ffn_dim, hf.encoder_layers, hf.encoder_attention_heads, 0, 0, 0, act, 1e-5, hf.initializer_range, k_bias=False
    )
    return WhisperConfig(layers, hf.num_mel_bins, hf.max_source_positions, pool)


class Convolution(nn.Module):
    """Every `stride`-th frame and its two neighbours, side by side, times one matrix; zeros stand before the first and after the last."""

    features: int
    stride: int
    init_scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "N T C"]) -> Float[Array, "N t D"]:
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        around = [padded[:, k : k + x.shape[1] : self.stride] for k in range(3)]
        kernel = leaf(self, "kernel", nn.initializers.normal(self.init_scale), (3, x.shape[-1], self.features))
        bias = leaf(self, "bias", nn.initializers.zeros, (self.features,))
        return matmul(jnp.concatenate(around, axis=-1), kernel.reshape(-1, self.features)) + bias.astype(x.dtype)


class WhisperEncoder(nn.Module):
    """Features of spectrograms as long as the encoder's window, of which `frames` are sound; the features of the rest mean nothing."""

    config: WhisperConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, spectrograms: Float[Array, "N T M"], frames: Int[Array, "N"]) -> Float[Array, "N P D"]:
        c, width, scale = self.config, self.config.layers.hidden_size, self.config.layers.initializer_range
        x = ACTIVATIONS["gelu"](Convolution(width, 1, scale, name="conv1")(spectrograms))
        x = ACTIVATIONS["gelu"](Convolution(width, 2, scale, name="conv2")(x))
        positions = Embed(c.max_source_positions, width, scale, name="embed_positions")(jnp.arange(c.max_source_positions))
        x = constrain(x + positions.astype(x.dtype), "batch", None, None)
        heard = jnp.arange(c.max_source_positions) < (frames[:, None] + 1) // 2
        spec = dense(Spec(heard.astype(jnp.int32), causal=False))
        depth = c.layers.num_hidden_layers
        layers = stack(vision.Layer, depth, self.remat, in_axes=(nn.broadcast, nn.broadcast, 0))
        x, _ = layers(c.layers, False, name="layers")(x, (spec,), None, jnp.zeros(depth, jnp.int32))
        if c.pool > 1:
            x = jnp.mean(x[:, : c.features * c.pool].reshape(len(x), c.features, c.pool, width), axis=2)
        return LayerNorm(name="layer_norm")(x)


# Where our tree's names are not the checkpoint's: tree prefix -> prefix on disk.
NAMES = {
    "layers": "layers.{i}",
    "layers/layer_norm1": "layers.{i}.self_attn_layer_norm",
    "layers/layer_norm2": "layers.{i}.final_layer_norm",
    "layers/mlp": "layers.{i}",
}


def names(tree: str, disk: str) -> tuple[dict[str, str], tuple]:
    """(stacks, exceptions) of a Conversion for an encoder that stands at `tree` (such as "audio_tower/") and at `disk` in names."""
    return {tree + ours: disk + theirs for ours, theirs in NAMES.items()}, ()
