"""A vision-language model put together from a tower, a projector and a decoder (`python -m aligner.convert build`).

With the two-layer projector and plain attention it is a LLaVA and stored as one. The other projectors, and MMCA, in which text reads text
and images by two softmaxes (arXiv 2309.14327), are of this family alone: `transformers` has no class for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from aligner.models import llava, towers, vision, vlm
from aligner.models.layers import Linear
from aligner.models.resampler import Resampler, ResamplerConfig
from aligner.types import Batch, Media, Model, UserError

PROJECTORS = ("linear", "mlp", "transformer", "perceiver")
_HEAD = 64  # width of a head in the projectors that attend, where the decoder's width is a multiple


@dataclasses.dataclass(frozen=True)
class VisionLLMConfig(llava.LlavaConfig):
    """LLaVA's, and what stands between tower and decoder."""

    projector: str
    projector_latents: int  # features of an image with the perceiver

    @property
    def features(self) -> int:
        """Features of one image."""
        return self.projector_latents if self.projector == "perceiver" else super().features


def config_from_hf(hf: Any) -> VisionLLMConfig:
    """Read the config that `register_configs` describes."""
    if hf.projector not in PROJECTORS:
        raise UserError(f"projector {hf.projector!r} of the vision_llm config is not one of {', '.join(PROJECTORS)}")
    base = llava.config_from_hf(hf)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    values["text_config"] = dataclasses.replace(base.text_config, split_media=bool(hf.mmca))
    return VisionLLMConfig(**values, projector=hf.projector, projector_latents=hf.projector_latents)


def projector_of(config: VisionLLMConfig) -> nn.Module:
    return llava.Projector(config) if config.projector == "mlp" else Projector(config)


class Projector(nn.Module):
    """One matrix, alone or followed by a transformer layer or a resampler."""

    config: VisionLLMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P V"]) -> Float[Array, "N F D"]:
        c, width = self.config, self.config.text_config.hidden_size
        x = Linear(width, True, name="linear")(x)
        heads = max(width // _HEAD, 1)
        if c.projector == "transformer":
            layer = vision.VisionConfig(width, 4 * width, 1, heads, 0, 0, 0, c.projector_hidden_act, 1e-5)
            return vision.Layer(layer, False, name="layer")(x, (None,), None, jnp.int32(0))[0]
        if c.projector == "perceiver":
            perceiver = ResamplerConfig(width, c.projector_latents, 2, heads, heads, width // heads)
            return Resampler(perceiver, name="resampler")(x, jnp.ones(x.shape[:2], bool))
        return x


def make(hf: Any) -> Model:
    """A put-together model from its config."""
    config, path = config_from_hf(hf), llava.tower_path(hf)
    tower, disk = config.vision_config, path.replace("/", ".") + "."

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        projector = params["multi_modal_projector"]
        dtype = projector["linear_1" if config.projector == "mlp" else "linear"]["kernel"].dtype
        selected = llava.select(config, params, vlm.flat_images(batch, dtype), path, rngs, remat)
        features = projector_of(config).apply({"params": projector}, selected, rngs=rngs)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    shape = (1, config.features, tower.hidden_size * len(config.vision_feature_layer))
    stacks = {"multi_modal_projector/resampler/layers": "multi_modal_projector.resampler.layers.{i}"}
    return vlm.assemble(
        hf,
        config,
        parts={path: vlm.tower_params(tower), "multi_modal_projector": vlm.module_params(projector_of(config), shape)},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.llava_names,
                                  [towers.names(hf.vision_config.model_type, path + "/", disk), (stacks, ())], **vlm.llava_renames(disk)),
        media=Media(config.image_token_index, config.features, tower.image_size, tower.image_size),
        trained_layers=vlm.tower_layers(path, tower, config.vision_feature_layer),
    )  # fmt: skip
