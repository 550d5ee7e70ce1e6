"""The vision transformer: one implementation driven by configuration flags, which towers.py reads from Hugging Face configs.

It takes whole square images, or patches one after another in a row with arrays that say what belongs together and where each one stands
(`Patches`), so that images of all sizes share a program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from aligner.matmul import matmul
from aligner.models import rope
from aligner.models.attention import Spec, attention, dense
from aligner.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, RMSNorm, leaf, pick, stack
from aligner.sharding import constrain
from aligner.types import Params

NORMED = "normed"  # in place of a layer's index: the last one's output after the tower's final norm


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What changes the computation; names are Hugging Face's where the towers agree."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float
    initializer_range: float = 0.02
    frames: int = 0  # of a patch that spans time; 0 where patches are flat
    patch_bias: bool = False
    class_token: str = "class_embedding"  # name of the leaf; "" where there is none
    registers: int = 0  # tokens between the class token and the patches
    positions: str = "position_embedding"  # a table by patch; position_embeddings: one with the class token's; "" has none
    num_positions: int = 0  # rows of the table where it is not one for each patch
    rope: str = ""  # how a head turns by row and column: halves, interleaved, or not at all
    rope_theta: float = 1e4
    norm: str = "layer"  # or rms
    pre_norm: bool = True
    post_norm: bool = True
    qkv_bias: bool = True
    k_bias: bool = True  # where qkv_bias is
    o_bias: bool = True
    mlp_bias: bool = True
    gated_mlp: bool = False
    qk_norm: bool = False  # of all heads together
    layer_scale: bool = False
    gated: bool = False  # attention and MLP by one number each, through tanh
    groups_of_layer: tuple[int, ...] = ()  # which of `Patches.groups` each layer attends within; () means all the first
    mask_token: bool = False  # a leaf that only pre-training reads
    pooling_head: bool = False  # leaves that make one vector of an image (SigLIP), which nothing here reads
    places_by_fraction: bool = False  # which row of the table a patch has goes by fractions of the image's sides (NaViT)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_patches + bool(self.class_token) + self.registers


@struct.dataclass
class Patches:
    """Patches [N, P, K] of several images in a row, K the pixels of one, rows before columns before channels.

    Attributes:
        values: [N, P, K].
        groups: [N, P] each: within which patches attend to each other (of one image, of one window); 0 is padding.
        grid: [N, P, 2], row and column of each, where the tower turns its heads by them.
        places: [N, P, X] rows of the table of positions, where there is one, to be added up by `weights` [N, P, X].
    """

    values: Float[Array, "N P K"]
    groups: tuple[Int[Array, "N P"], ...]
    grid: Int[Array, "N P 2"] | None = None
    places: Int[Array, "N P X"] | None = None
    weights: Float[Array, "N P X"] | None = None


def make_norm(config: VisionConfig, name: str | None = None) -> nn.Module:
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config.layer_norm_eps, name=name)


class Embeddings(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "N H W C"] | Patches) -> Float[Array, "N P D"]:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        whole = not isinstance(pixels, Patches)
        x = PatchEmbedding(c, name="patch_embedding")(cut(pixels, c.patch_size) if whole else pixels.values)
        table = 0
        if c.positions == "position_embedding":
            rows = c.num_positions or c.num_patches + bool(c.class_token)
            table = Embed(rows, c.hidden_size, c.initializer_range, name=c.positions)
            if whole:
                table = table(jnp.arange(rows) if not c.places_by_fraction else by_fraction(c, *pixels.shape[1:3]))
            else:
                table = jnp.sum(table(pixels.places) * pixels.weights[..., None].astype(x.dtype), axis=2).astype(x.dtype)
        elif c.positions:
            table = leaf(self, c.positions, init, (1, c.num_patches + bool(c.class_token), c.hidden_size)).astype(x.dtype)
        if c.class_token:
            shape = (c.hidden_size,) if c.class_token == "class_embedding" else (1, 1, c.hidden_size)
            token = leaf(self, c.class_token, init, shape).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c.hidden_size)), x], axis=1)
        if c.mask_token and self.is_initializing():
            leaf(self, "mask_token", nn.initializers.zeros, (1, c.hidden_size))
        x = x + table
        if c.registers:
            tokens = leaf(self, "register_tokens", init, (1, c.registers, c.hidden_size)).astype(x.dtype)
            tokens = jnp.broadcast_to(tokens, (len(x), c.registers, c.hidden_size))
            x = jnp.concatenate([x[:, :1], tokens, x[:, 1:]], axis=1)
        return x


def by_fraction(config: VisionConfig, height: int, width: int) -> np.ndarray:
    """Rows of the table of positions for the patches of an image of (height, width) pixels: where each falls on the table's own grid.

    The arithmetic is float32's, in which a patch may fall short of its place, as the checkpoints were trained.
    """
    side = config.image_size // config.patch_size
    borders = (1 / side + np.arange(side) * (1 / side))[: math.ceil((1 - 1 / side) / (1 / side))].astype(np.float32)

    def places(count: int) -> np.ndarray:
        share = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
        return np.searchsorted(borders, np.minimum(share, np.float32(1 - 1e-6)), side="right")

    rows, columns = (places(pixels // config.patch_size) for pixels in (height, width))
    return (rows[:, None] * side + columns[None, :]).reshape(-1)


def cut(pixels: Float[Array, "N H W C"], patch: int) -> Float[Array, "N P K"]:
    """Patches of whole images, row by row: a convolution whose stride is its size is one matmul over them."""
    n, height, width, channels = pixels.shape
    patches = pixels.reshape(n, height // patch, patch, width // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(n, -1, patch * patch * channels)


class PatchEmbedding(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, patches: Float[Array, "N P K"]) -> Float[Array, "N P D"]:
        c = self.config
        shape = (*(c.frames,) * bool(c.frames), c.patch_size, c.patch_size, c.num_channels, c.hidden_size)
        kernel = leaf(self, "kernel", nn.initializers.normal(c.initializer_range), shape)
        x = matmul(patches, kernel.reshape(-1, c.hidden_size))
        return x + leaf(self, "bias", nn.initializers.zeros, (c.hidden_size,)).astype(x.dtype) if c.patch_bias else x


class Attention(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"], spec: Spec | None, tables: tuple[Array, Array] | None) -> Float[Array, "N P D"]:
        c = self.config
        shape = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        biases = {"q_proj": c.qkv_bias, "k_proj": c.qkv_bias and c.k_bias, "v_proj": c.qkv_bias}
        q, k, v = (Linear(c.hidden_size, bias, c.initializer_range, name=name)(x) for name, bias in biases.items())
        if c.qk_norm:
            q, k = RMSNorm(c.layer_norm_eps, name="q_norm")(q), RMSNorm(c.layer_norm_eps, name="k_norm")(k)
        q, k, v = (y.reshape(shape) for y in (q, k, v))
        if tables is not None:
            q, k = (rope.rotate(y, *tables) for y in (q, k))
        out = attention(q, k, v, spec, scale=shape[-1] ** -0.5)
        return Linear(c.hidden_size, c.o_bias, c.initializer_range, name="out_proj")(out.reshape(x.shape))


class MLP(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
        c = self.config
        *into, out = ("gate_proj", "up_proj", "down_proj") if c.gated_mlp else ("fc1", "fc2")
        y = [Linear(c.intermediate_size, c.mlp_bias, c.initializer_range, name=name)(x) for name in into]
        y = ACTIVATIONS[c.hidden_act](y[0]) * (y[1] if c.gated_mlp else 1)
        return Linear(c.hidden_size, c.mlp_bias, c.initializer_range, name=out)(y)


class LayerScale(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
        if self.config.gated:
            return x * jnp.tanh(leaf(self, "gate", nn.initializers.constant(math.pi / 4), (1,)).astype(x.dtype))
        return x * leaf(self, "lambda1", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype) if self.config.layer_scale else x


class Layer(nn.Module):
    config: VisionConfig
    collect: bool

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"], specs: tuple[Spec | None, ...], tables: tuple[Array, Array] | None, group: Array):
        c = self.config
        scale = lambda y, name: LayerScale(c, name=name)(y)
        y = Attention(c, name="self_attn")(make_norm(c, "layer_norm1")(x), pick(specs, group), tables)
        x = x + scale(y, "layer_scale1")
        x = x + scale(MLP(c, name="mlp")(make_norm(c, "layer_norm2")(x)), "layer_scale2")
        return x, (x if self.collect else None)


class Encoder(nn.Module):
    config: VisionConfig
    remat: str
    collect: bool

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"], specs: tuple[Spec | None, ...], tables: tuple[Array, Array] | None):
        c = self.config
        layers = stack(Layer, c.num_hidden_layers, self.remat, in_axes=(nn.broadcast, nn.broadcast, 0))
        groups = jnp.asarray(c.groups_of_layer or (0,) * c.num_hidden_layers, jnp.int32)
        return layers(c, self.collect, name="layers")(x, specs, tables, groups)


class VisionTransformer(nn.Module):
    """Returns the embeddings after their norm, what the last layer gave, and (when `collect`) what every layer gave."""

    config: VisionConfig
    remat: str = "none"
    collect: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "N H W C"] | Patches):
        c = self.config
        x = constrain(Embeddings(c, name="embeddings")(pixels), "batch", None, None)
        x = make_norm(c, "pre_layrnorm")(x) if c.pre_norm else x
        specs, tables = (None,), None
        if isinstance(pixels, Patches):
            specs = tuple(dense(Spec(group, causal=False)) for group in pixels.groups)
            tables = turns(c, pixels.grid, x.dtype) if c.rope else None
        last, states = Encoder(c, self.remat, self.collect, name="encoder")(x, specs, tables)
        if self.is_initializing() and c.post_norm:  # a leaf of the checkpoint that few hidden states pass through
            make_norm(c, "post_layernorm")(last)
        if self.is_initializing() and c.pooling_head:
            PoolingHead(c, name="head")(last[:, :1])
        return x, last, states


class PoolingHead(nn.Module):
    """SigLIP's pooling: no feature passes through it, its leaves are there to be kept as they are."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N 1 D"]):
        c = self.config
        leaf(self, "probe", nn.initializers.normal(c.initializer_range), (1, 1, x.shape[-1]))
        JointAttention(c, name="attention")(x)
        make_norm(c, "layernorm")(x)
        MLP(c, name="mlp")(x)


class JointAttention(nn.Module):
    """The leaves of torch's `MultiheadAttention`, as it stores them."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N 1 D"]):
        width, deviation = x.shape[-1], self.config.initializer_range
        leaf(self, "in_proj_weight", nn.initializers.normal(deviation), (3 * width, width))
        leaf(self, "in_proj_bias", nn.initializers.zeros, (3 * width,))
        Linear(width, True, deviation, name="out_proj")(x)


def turns(config: VisionConfig, grid: Int[Array, "N P 2"], dtype: Any) -> tuple[Array, Array]:
    """Cosine and sine of every patch's rotation: one half of a head's pairs turns by its row, the other by its column.

    With "halves" both have the same frequencies (Qwen2-VL); with "interleaved" rows have the even ones of a head's, columns the odd ones
    (Pixtral).
    """
    width = config.hidden_size // config.num_attention_heads
    if config.rope == "halves":
        by_row = by_column = config.rope_theta ** (-np.arange(0, width // 2, 2, dtype=np.float32) / (width // 2))
    else:
        inverse = config.rope_theta ** (-np.arange(0, width, 2, dtype=np.float32) / width)
        by_row, by_column = inverse[0::2], inverse[1::2]
    row, column = (grid[..., axis, None].astype(jnp.float32) for axis in (0, 1))
    angles = jnp.concatenate([row * by_row, column * by_column] * 2, axis=-1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def layers_run(config: VisionConfig, layers: tuple[int | str, ...]) -> int:
    """How many layers the hidden states with these indices pass through; gradients reach no others."""
    return max(_index(config, index) for index in layers)


def _index(config: VisionConfig, index: int | str) -> int:
    return config.num_hidden_layers if index == NORMED else index % (config.num_hidden_layers + 1)


def hidden_states(
    config: VisionConfig,
    params: Params,
    pixels: Float[Array, "N H W C"] | Patches,
    layers: tuple[int | str, ...],
    remat: str = "none",
    rngs=None,
) -> list[Float[Array, "N P D"]]:
    """The hidden states with these indices (0 the embeddings, negative ones from the end, as in `transformers`, or NORMED).

    Layers above the highest one asked for are not run; their parameters get a zero gradient.
    """
    wanted = [_index(config, index) for index in layers]
    depth = max(layers_run(config, layers), 1)  # a scan needs a layer; one that is not asked for is dropped by the compiler
    stacked = jax.tree.map(lambda leaf: leaf[:depth], params["encoder"]["layers"])
    shorter = dataclasses.replace(config, num_hidden_layers=depth, groups_of_layer=config.groups_of_layer[:depth])
    tower = VisionTransformer(shorter, remat, collect=len(set(wanted)) > 1)
    embeddings, last, states = tower.apply({"params": {**params, "encoder": {"layers": stacked}}}, pixels, rngs=rngs)
    found = [last if index == depth else embeddings if index == 0 else states[index - 1] for index in wanted]
    norm = lambda x: make_norm(config).apply({"params": params["post_layernorm"]}, x)
    return [norm(state) if asked == NORMED and config.post_norm else state for asked, state in zip(layers, found)]
