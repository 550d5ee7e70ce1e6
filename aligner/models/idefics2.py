"""Idefics2 (arXiv 2405.02246): images in their own shape on a square canvas, through a SigLIP-like tower, each read by a resampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aligner.models import decoder, towers, vision, vlm
from aligner.models.pictures import Picture, Shown
from aligner.models.resampler import GatedMLP, Resampler, ResamplerConfig
from aligner.types import Batch, Media, Model


@dataclasses.dataclass(frozen=True)
class Idefics2Config:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    perceiver_config: ResamplerConfig
    image_token_id: int


def config_from_hf(hf: Any) -> Idefics2Config:
    """Read an `Idefics2Config`."""
    p = hf.perceiver_config
    perceiver = ResamplerConfig(p.hidden_size, p.resampler_n_latents, p.resampler_depth, p.resampler_n_heads, p.num_key_value_heads,
                                p.resampler_head_dim, p.hidden_act, p.rms_norm_eps)  # fmt: skip
    return Idefics2Config(vlm.read_text(hf), vlm.read_tower(hf, ("idefics2_vision",)), perceiver, hf.image_token_id)


def media(config: Idefics2Config) -> Media:
    """A slot is an image, or one of the five that the processor cuts it into."""
    tower, latents = config.vision_config, config.perceiver_config.latents

    def show(size: tuple[int, int], assets: Any, count: int) -> Shown:
        parts = 5 if assets.processor.image_processor.do_image_splitting else 1
        edge, image = "<fake_token_around_image>", assets.tokenizer.convert_ids_to_tokens(config.image_token_id)
        return Shown(parts, (latents,) * parts, edge + f"{image}{edge}" * parts)

    def pictures(processed: Mapping[str, Any]) -> list[Picture]:
        pixels = np.asarray(processed["pixel_values"])
        mask = np.asarray(processed.get("pixel_attention_mask", np.ones((*pixels.shape[:2], *pixels.shape[3:]))))
        pixels, mask = pixels.reshape(-1, *pixels.shape[2:]), mask.reshape(-1, *mask.shape[2:]).astype(bool)
        return [picture(image, real) for image, real in zip(pixels, mask) if real.any() and image.any()]

    def picture(image: np.ndarray, real: np.ndarray) -> Picture:
        size, patch = tower.image_size, tower.patch_size
        side = size // patch
        rows, columns = (int(real.any(axis=1 - axis).sum()) // patch for axis in (0, 1))
        canvas = np.zeros((size, size, 3), np.float32)
        canvas[: rows * patch, : columns * patch] = image[:, : rows * patch, : columns * patch].transpose(1, 2, 0)
        inside = np.zeros((side, side), bool)
        inside[:rows, :columns] = True
        places = np.zeros((side, side), np.int32)
        places[:rows, :columns] = vision.by_fraction(tower, rows * patch, columns * patch).reshape(rows, columns)
        arrays = {"pixel_values": canvas, "patch_mask": inside.reshape(-1), "patch_places": places.reshape(-1)}
        return Picture({name: array[None] for name, array in arrays.items()}, np.arange(latents))

    slot = {"patch_mask": ((tower.num_patches,), np.bool_), "patch_places": ((tower.num_patches,), np.int32)}
    return Media(config.image_token_id, latents, tower.image_size, tower.image_size, slot=slot, show=show, pictures=pictures)


def make(hf: Any) -> Model:
    """An Idefics2 model from its Hugging Face config."""
    config = config_from_hf(hf)
    text, tower, perceiver = config.text_config, config.vision_config, config.perceiver_config
    project = GatedMLP(text.intermediate_size, text.hidden_size, text.hidden_act)

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        connector = params["connector"]
        flat = lambda name: batch[name].reshape(-1, *batch[name].shape[2:])
        real, places = flat("patch_mask"), flat("patch_places")[..., None]
        pixels = vlm.flat_images(batch, connector["modality_projection"]["gate_proj"]["kernel"].dtype)
        patches = vision.Patches(vision.cut(pixels, tower.patch_size), (real.astype(jnp.int32),), None, places, jnp.ones_like(places))
        with jax.named_scope("vision_tower"):
            [state] = vision.hidden_states(tower, params["vision_model"], patches, (vision.NORMED,), remat, rngs)
        context = project.apply({"params": connector["modality_projection"]}, state, rngs=rngs)
        features = Resampler(perceiver, remat).apply({"params": connector["perceiver_resampler"]}, context, real, rngs=rngs)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    stacks, exceptions = towers.names("idefics2_vision", "vision_model/", "model.vision_model.")
    resampler = "connector/perceiver_resampler"
    stacks |= {"connector": "model.connector", f"{resampler}/layers": "model.connector.perceiver_resampler.layers.{i}"}
    shapes = ((1, 1, perceiver.width), (1, 1))
    return vlm.assemble(
        hf,
        config,
        parts={"vision_model": vlm.tower_params(tower), "connector/modality_projection": vlm.module_params(project, (1, tower.hidden_size)),
               resampler: lambda key: Resampler(perceiver).init(key, jnp.zeros(shapes[0]), jnp.ones(shapes[1], bool))["params"]},
        encode=encode,
        conversion=vlm.conversion(hf, text, vlm.inner_names("text_model"), [(stacks, exceptions)]),
        media=media(config),
    )  # fmt: skip
