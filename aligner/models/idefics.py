"""Idefics3 and SmolVLM (arXiv 2408.12637, 2504.05299): tiles through a SigLIP-like tower, neighbouring patches joined and projected by one
matrix; every tile and the small view of the whole stand in the text between marks of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from aligner.models import decoder, towers, vision, vlm
from aligner.models.layers import Linear
from aligner.models.pictures import Picture, Shown
from aligner.types import Batch, Media, Model, UserError


@dataclasses.dataclass(frozen=True)
class IdeficsConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    image_token_id: int
    scale_factor: int

    @property
    def features(self) -> int:
        """Features of one tile."""
        return self.vision_config.num_patches // self.scale_factor**2


def config_from_hf(hf: Any) -> IdeficsConfig:
    """Read an `Idefics3Config` or `SmolVLMConfig`."""
    tower = vlm.read_tower(hf, ("idefics3_vision", "smolvlm_vision"))
    return IdeficsConfig(vlm.read_text(hf), tower, hf.image_token_id, hf.scale_factor)


def media(config: IdeficsConfig) -> Media:
    """A slot is a tile."""
    size, features = config.vision_config.image_size, config.features

    def show(wide: tuple[int, int], assets: Any, count: int) -> Shown:
        _, rows, columns = assets.processor.image_processor.get_number_of_image_patches(wide[1], wide[0], {})
        edge, image = "<fake_token_around_image>", assets.tokenizer.convert_ids_to_tokens(config.image_token_id)
        text = "".join(
            "".join(f"{edge}<row_{r + 1}_col_{c + 1}>{image}" for c in range(columns)) + "\n" for r in range(rows)
        ) + ("\n" if rows else "")  # fmt: skip
        tiles = rows * columns + 1
        return Shown(tiles, (features,) * tiles, f"{text}{edge}<global-img>{image}{edge}")

    def pictures(processed: Mapping[str, Any]) -> list[Picture]:
        pixels = np.asarray(processed["pixel_values"])
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        mask = np.asarray(processed.get("pixel_attention_mask", np.ones((len(pixels), *pixels.shape[2:]))))
        mask = mask.reshape(-1, *mask.shape[-2:]).astype(bool)
        real = mask.any(axis=(1, 2)) & (pixels != 0).any(axis=(1, 2, 3))  # rows with fewer tiles are filled up
        if not mask[real].all():
            raise UserError("tiles of several sizes are not implemented; set do_image_splitting in preprocessor_config.json")
        return [Picture({"pixel_values": tile[None]}, np.arange(features)) for tile in pixels[real].transpose(0, 2, 3, 1)]

    return Media(config.image_token_id, features, size, size, show=show, pictures=pictures)


def make(hf: Any) -> Model:
    """An Idefics3 or SmolVLM model from its Hugging Face config."""
    config = config_from_hf(hf)
    tower, side = config.vision_config, config.vision_config.image_size // config.vision_config.patch_size
    project = Linear(config.text_config.hidden_size)

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        connector = params["connector"]["modality_projection"]["proj"]
        with jax.named_scope("vision_tower"):
            pixels = vlm.flat_images(batch, connector["kernel"].dtype)
            [state] = vision.hidden_states(tower, params["vision_model"], pixels, (vision.NORMED,), remat, rngs)
        joined = vision.cut(state.reshape(len(state), side, side, -1), config.scale_factor)
        features = project.apply({"params": connector}, joined, rngs=rngs)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    stacks, exceptions = towers.names(hf.vision_config.model_type, "vision_model/", "model.vision_model.")
    return vlm.assemble(
        hf,
        config,
        parts={"vision_model": vlm.tower_params(tower),
               "connector/modality_projection/proj": vlm.module_params(project, (1, tower.hidden_size * config.scale_factor**2))},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.inner_names("text_model"),
                                  [({**stacks, "connector": "model.connector"}, exceptions)]),
        media=media(config),
    )  # fmt: skip
