"""Llama 3.2 Vision, "Mllama" (arXiv 2407.21783): a tower over an image's tiles, read by cross-attention between the decoder's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aligner.models import decoder, families, vision, vlm
from aligner.models.attention import Spec
from aligner.models.layers import Embed, LayerNorm, Linear, leaf
from aligner.models.pictures import Picture, Row, Shown
from aligner.types import Batch, Bool, Media, Model, UserError

EXTRA = 8  # rows of the embedding beyond the vocabulary, of which one is the image token's


@dataclasses.dataclass(frozen=True)
class MllamaConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    image_token_index: int
    num_global_layers: int
    max_num_tiles: int
    aspect_ratios: int
    intermediate_layers_indices: tuple[int, ...]

    @property
    def output_dim(self) -> int:
        """Width of what the tower says of a patch."""
        return self.vision_config.hidden_size * (1 + len(self.intermediate_layers_indices))


def config_from_hf(hf: Any) -> MllamaConfig:
    """Read an `MllamaConfig`."""
    tower, crossing = hf.vision_config, tuple(hf.text_config.cross_attention_layers)
    if any(after - one == 1 for one, after in pairwise(crossing)) or hf.text_config.num_hidden_layers - 1 in crossing:
        raise UserError(
            f"cross_attention_layers={list(crossing)} of the mllama config is not implemented: each must have one of the others after it"
        )
    text = vlm.read_text(hf, lambda text: families.common(text, rotary_fraction=1.0, cross_layers=tuple(text.cross_attention_layers)))
    flags = dict(image_size=tower.image_size, patch_size=tower.patch_size, num_channels=tower.num_channels, hidden_act=tower.hidden_act)
    config = vision.VisionConfig(
        tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers, tower.attention_heads, **flags, layer_norm_eps=tower.norm_eps,
        initializer_range=tower.initializer_range, qkv_bias=False, o_bias=False,
    )  # fmt: skip
    return MllamaConfig(
        dataclasses.replace(text, num_hidden_layers=text.num_hidden_layers - len(crossing), extra_embeddings=EXTRA),
        config, hf.image_token_index, tower.num_global_layers, tower.max_num_tiles, len(tower.supported_aspect_ratios),
        tuple(tower.intermediate_layers_indices),
    )  # fmt: skip


class ByRatio(nn.Module):
    """A gated embedding of the tiles by their arrangement."""

    config: MllamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N t P D"], ratios: Int[Array, "N"]) -> Float[Array, "N t P D"]:
        c, width = self.config, self.config.vision_config.hidden_size
        table = Embed(c.aspect_ratios + 1, c.max_num_tiles * width, name="embedding")(ratios)
        gate = jnp.tanh(leaf(self, "gate", nn.initializers.zeros, (1,)).astype(x.dtype))
        return x + gate * table.reshape(-1, c.max_num_tiles, 1, width).astype(x.dtype)


class Positions(nn.Module):
    """Where a patch is in its tile, and where its tile's patches are in the image, weighed by one gate."""

    config: MllamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N t P D"], ratios: Int[Array, "N"]) -> Float[Array, "N t P D"]:
        c, (patches, width) = self.config, x.shape[2:]
        gate = jnp.tanh(leaf(self, "gate", nn.initializers.zeros, (1,)).astype(x.dtype))
        table = leaf(self, "table", nn.initializers.normal(width**-0.5), (patches, width)).astype(x.dtype)
        tiles = Embed(c.aspect_ratios + 1, c.max_num_tiles * patches * width, name="tile_embedding")(ratios)
        return x + (1 - gate) * table + gate * tiles.reshape(-1, c.max_num_tiles, patches, width).astype(x.dtype)


class Tower(nn.Module):
    """A transformer over all tiles of an image, then a gated one; with its last states some of the first one's go out."""

    config: MllamaConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, pixels: Float[Array, "N t H W C"], ratios: Int[Array, "N"], tiles: Bool[Array, "N t"]) -> Float[Array, "N t P E"]:
        c, v = self.config, self.config.vision_config
        n, t = pixels.shape[:2]
        x = vision.PatchEmbedding(v, name="patch_embedding")(vision.cut(pixels.reshape(n * t, *pixels.shape[2:]), v.patch_size))
        x = ByRatio(c, name="pre_tile_positional_embedding")(x.reshape(n, t, *x.shape[1:]), ratios)
        token = leaf(self, "class_embedding", nn.initializers.normal(v.hidden_size**-0.5), (v.hidden_size,)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (n, t, 1, v.hidden_size)), x], axis=2)
        x = LayerNorm(name="layernorm_pre")(Positions(c, name="gated_positional_embedding")(x, ratios))
        patches = x.shape[2]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -patches % 8), (0, 0)))
        # as the weights were trained: what fills up is hidden from what fills up, and from nothing else
        filling = (~tiles[:, :, None] | (jnp.arange(x.shape[2]) >= patches)).reshape(n, -1)
        spec = Spec(None, mask=~(filling[:, :, None] & filling[:, None, :])[:, None], causal=False)
        shape = x.shape
        x, states = vision.Encoder(v, self.remat, True, name="transformer")(x.reshape(n, -1, v.hidden_size), (spec,), None)
        x = ByRatio(c, name="post_tile_positional_embedding")(LayerNorm(name="layernorm_post")(x).reshape(shape), ratios)
        last = dataclasses.replace(v, num_hidden_layers=c.num_global_layers, gated=True)
        x, _ = vision.Encoder(last, self.remat, False, name="global_transformer")(x.reshape(n, -1, v.hidden_size), (spec,), None)
        between = jnp.stack([states[i] for i in c.intermediate_layers_indices], axis=-1).reshape(n, x.shape[1], -1)
        return jnp.concatenate([x, between], axis=-1).reshape(*shape[:3], -1)[:, :, :patches]


def media(config: MllamaConfig) -> Media:
    """A slot is an image with all its tiles; one token stands for it."""
    size, tiles = config.vision_config.image_size, config.max_num_tiles

    def show(wide: tuple[int, int], assets: Any, count: int) -> Shown:
        return Shown(1, (1,))

    def pictures(processed: Mapping[str, Any]) -> list[Picture]:
        arrays = [np.asarray(processed[name]) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
        pixels, ratios, mask = (array.reshape(-1, *array.shape[2:]) for array in arrays)
        made = [
            {"pixel_values": image.transpose(0, 2, 3, 1), "aspect_ratio_ids": ratio, "tile_mask": real}
            for image, ratio, real in zip(pixels, ratios, mask.astype(bool))
            if ratio  # rows with fewer images are filled up
        ]
        return [Picture({name: np.asarray(array)[None] for name, array in arrays.items()}, np.arange(1)) for arrays in made]

    def arrange(row: Row, pictures: Sequence[Picture]) -> Row:
        """A token sees the images that stand last before it: one, or several that follow each other."""
        seen = np.zeros((len(row["tokens"]), 4), np.int32)
        for segment in np.unique(row["segment_ids"][row["segment_ids"] > 0]):
            columns = np.flatnonzero(row["segment_ids"] == segment)
            numbers = row["media_index"][columns]
            own = (min(numbers[numbers >= 0]), max(numbers) + 1) if max(numbers) >= 0 else (0, 0)
            first = end = before = 0
            for column, number in zip(columns, numbers):
                if number >= 0:
                    first, end = (first if before else number), number + 1
                before = number >= 0
                seen[column] = first, end, *own
        return {"cross_images": seen}

    slot = {"pixel_values": ((tiles, size, size, 3), np.float32), "aspect_ratio_ids": ((), np.int32), "tile_mask": ((tiles,), np.bool_)}
    return Media(config.image_token_index, 1, size, size, slot=slot, per_token={"cross_images": ((4,), np.int32)}, show=show,
                 pictures=pictures, arrange=arrange, together=True)  # fmt: skip


def make(hf: Any) -> Model:
    """A Llama 3.2 Vision model from its Hugging Face config."""
    config = config_from_hf(hf)
    v, width = config.vision_config, config.text_config.hidden_size
    project = Linear(width, True)

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        rows = len(batch["pixel_values"])
        flat = lambda name: batch[name].reshape(-1, *batch[name].shape[2:])
        with jax.named_scope("vision_tower"):
            pixels = flat("pixel_values").astype(params["multi_modal_projector"]["kernel"].dtype)
            inputs = (pixels, flat("aspect_ratio_ids"), flat("tile_mask"))
            states = Tower(config, remat).apply({"params": params["vision_model"]}, *inputs, rngs=rngs)
        return project.apply({"params": params["multi_modal_projector"]}, states, rngs=rngs).reshape(rows, -1, width)

    layers = range(hf.text_config.num_hidden_layers)
    crossing = config.text_config.cross_layers
    numbered = lambda wanted: " ".join(str(i) for i in layers if (i in crossing) == wanted)
    names = lambda name: vlm.llava_names(name.replace("layers.{i}", f"layers.{{i:{numbered(False)}}}"))
    stacks = {
        "language_model/model/cross_layers": f"language_model.model.layers.{{i:{numbered(True)}}}",
        "vision_model": "vision_model",
        "multi_modal_projector": "multi_modal_projector",
    }
    exceptions = [("vision_model.gated_positional_embedding.embedding", "vision_model/gated_positional_embedding/table", "copy")]
    for part in ("transformer", "global_transformer"):
        ours, theirs = f"vision_model/{part}/layers", f"vision_model.{part}.layers.{{i}}"
        renamed = {"layer_norm1": "input_layernorm", "layer_norm2": "post_attention_layernorm", "self_attn/out_proj": "self_attn.o_proj"}
        stacks |= {ours: theirs, **{f"{ours}/{name}": f"{theirs}.{stored}" for name, stored in renamed.items()}}
        gates = {"gate_attn": "layer_scale1", "gate_ffn": "layer_scale2"}
        exceptions += [(f"{theirs}.{stored}", f"{ours}/{name}/gate", "copy") for stored, name in gates.items()]
    shape = (1, config.max_num_tiles, v.image_size, v.image_size, 3)
    dummy = (np.zeros(shape, np.float32), np.zeros(1, np.int32), np.ones((1, config.max_num_tiles), bool))
    return vlm.assemble(
        hf,
        config,
        parts={"vision_model": lambda key: Tower(config).init(key, *dummy)["params"],
               "multi_modal_projector": vlm.module_params(project, (1, config.output_dim))},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, names, [(stacks, tuple(exceptions))],
                                  **vlm.llava_renames("vision_tower.", "multi_modal_projector|vision_model")),
        media=media(config),
    )  # fmt: skip
