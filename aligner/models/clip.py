"""CLIP's vision tower (arXiv 2103.00020): patches, a class token, learned positions, pre-norm transformer layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from aligner.matmul import matmul
from aligner.models.attention import attention
from aligner.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, leaf, stack
from aligner.sharding import constrain
from aligner.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What changes the computation; names are Hugging Face's."""

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

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def config_from_hf(hf: Any) -> VisionConfig:
    """Read a `CLIPVisionConfig`."""
    if hf.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act {hf.hidden_act!r} of the vision config is not supported; known: {', '.join(ACTIVATIONS)}")
    if not isinstance(hf.image_size, int) or not isinstance(hf.patch_size, int):
        raise UserError(f"image_size {hf.image_size} and patch_size {hf.patch_size} of the vision config must be single numbers (square)")
    return VisionConfig(**{field.name: getattr(hf, field.name) for field in dataclasses.fields(VisionConfig)})


class Embeddings(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "N H W C"]) -> Float[Array, "N P D"]:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        patch = c.patch_size
        kernel = PatchKernel(c, name="patch_embedding")()
        # a convolution whose stride is its size is one matmul over flattened patches
        n, grid = pixels.shape[0], c.image_size // patch
        patches = pixels.reshape(n, grid, patch, grid, patch, c.num_channels).transpose(0, 1, 3, 2, 4, 5)
        x = matmul(patches.reshape(n, grid * grid, -1), kernel.reshape(-1, c.hidden_size))
        cls = leaf(self, "class_embedding", init, (c.hidden_size,)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, c.hidden_size)), x], axis=1)
        return x + Embed(c.num_patches + 1, c.hidden_size, c.initializer_range, name="position_embedding")(jnp.arange(x.shape[1]))


class PatchKernel(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self) -> Float[Array, "p p C D"]:
        c = self.config
        shape = (c.patch_size, c.patch_size, c.num_channels, c.hidden_size)
        return leaf(self, "kernel", nn.initializers.normal(c.initializer_range), shape)


class Attention(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
        c = self.config
        shape = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        q, k, v = (Linear(c.hidden_size, True, c.initializer_range, name=n)(x).reshape(shape) for n in ("q_proj", "k_proj", "v_proj"))
        out = attention(q, k, v, None, scale=shape[-1] ** -0.5)
        out = checkpoint_name(out.reshape(x.shape), "context")
        return Linear(c.hidden_size, True, c.initializer_range, name="out_proj")(out)


class MLP(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
        c = self.config
        x = ACTIVATIONS[c.hidden_act](Linear(c.intermediate_size, True, c.initializer_range, name="fc1")(x))
        return Linear(c.hidden_size, True, c.initializer_range, name="fc2")(x)


class Layer(nn.Module):
    config: VisionConfig
    collect: bool

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"], _=None):
        c = self.config
        x = x + Attention(c, name="self_attn")(LayerNorm(c.layer_norm_eps, name="layer_norm1")(x))
        x = x + MLP(c, name="mlp")(LayerNorm(c.layer_norm_eps, name="layer_norm2")(x))
        return x, (x if self.collect else None)


class Encoder(nn.Module):
    config: VisionConfig
    remat: str
    collect: bool

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]):
        return stack(Layer, self.config.num_hidden_layers, self.remat)(self.config, self.collect, name="layers")(x)


class VisionTransformer(nn.Module):
    """Returns the embeddings after their norm, what the last layer gave, and (when `collect`) what every layer gave."""

    config: VisionConfig
    remat: str = "none"
    collect: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "N H W C"]):
        x = Embeddings(self.config, name="embeddings")(pixels)
        x = LayerNorm(self.config.layer_norm_eps, name="pre_layrnorm")(constrain(x, "batch", None, None))
        last, states = Encoder(self.config, self.remat, self.collect, name="encoder")(x)
        if self.is_initializing():  # a leaf of the checkpoint that no hidden state passes through
            LayerNorm(self.config.layer_norm_eps, name="post_layernorm")(last)
        return x, last, states


def layers_run(config: VisionConfig, layers: tuple[int, ...]) -> int:
    """How many layers the hidden states with these indices pass through; gradients reach no others."""
    return max(index % (config.num_hidden_layers + 1) for index in layers)


def hidden_states(
    config: VisionConfig, params: Params, pixels: Float[Array, "N H W C"], layers: tuple[int, ...], remat: str = "none", rngs=None
) -> list[Float[Array, "N P D"]]:
    """The hidden states with these indices (0 the embeddings, negative ones from the end, as in `transformers`).

    Layers above the highest one asked for are not run; their parameters get a zero gradient.
    """
    wanted = [index % (config.num_hidden_layers + 1) for index in layers]
    depth = max(layers_run(config, layers), 1)  # a scan needs a layer; one that is not asked for is dropped by the compiler
    stacked = jax.tree.map(lambda leaf: leaf[:depth], params["encoder"]["layers"])
    params = {**params, "encoder": {"layers": stacked}}
    tower = VisionTransformer(dataclasses.replace(config, num_hidden_layers=depth), remat, collect=len(wanted) > 1)
    embeddings, last, states = tower.apply({"params": params}, pixels, rngs=rngs)
    return [last if index == depth else embeddings if index == 0 else states[index - 1] for index in wanted]
