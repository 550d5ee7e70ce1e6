"""LLaVA-1.5 (arXiv 2310.03744) and its kin: a vision tower's patch features through a two-layer projector, put where the `<image>` tokens
stand. The tower is CLIP, SigLIP, DINOv2, or Pixtral's with images of all sizes (arXiv 2410.07073), the decoder any text family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aligner.models import decoder, towers, vision, vlm
from aligner.models.layers import ACTIVATIONS, Linear
from aligner.models.pictures import Picture, Shown
from aligner.types import Batch, Media, Model, UserError


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    image_token_index: int
    vision_feature_layer: tuple[int, ...]
    vision_feature_select_strategy: str  # "default" leaves the first token (of the class) out, "full" keeps it
    projector_hidden_act: str
    multimodal_projector_bias: bool

    @property
    def features(self) -> int:
        """Features of one image."""
        return self.vision_config.num_tokens - (self.vision_feature_select_strategy == "default")


TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "pixtral")


def config_from_hf(hf: Any) -> LlavaConfig:
    """Read a Hugging Face `LlavaConfig`."""
    layer, strategy = hf.vision_feature_layer, hf.vision_feature_select_strategy
    tower = vlm.read_tower(hf, TOWERS)
    if strategy not in ("default", "full") or (strategy == "default" and not tower.class_token):
        raise UserError(
            f"vision_feature_select_strategy {strategy!r} of the {hf.model_type} config does not fit its {hf.vision_config.model_type} "
            "tower; set 'full', or 'default' to leave out a class token"
        )
    depth = hf.vision_config.num_hidden_layers
    if outside := [index for index in np.ravel(layer).tolist() if not -depth - 1 <= index <= depth]:
        raise UserError(f"vision_feature_layer {outside[0]} is none of the vision tower, which has {depth} layers")
    return LlavaConfig(
        text_config=vlm.read_text(hf),
        vision_config=tower,
        image_token_index=hf.image_token_index,
        vision_feature_layer=(layer,) if isinstance(layer, int) else tuple(layer),
        vision_feature_select_strategy=strategy,
        projector_hidden_act=hf.projector_hidden_act,
        multimodal_projector_bias=hf.multimodal_projector_bias,
    )


class Projector(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... V"]) -> Float[Array, "... D"]:
        c, width = self.config, self.config.text_config.embedding_size or self.config.text_config.hidden_size
        x = ACTIVATIONS[c.projector_hidden_act](Linear(width, c.multimodal_projector_bias, name="linear_1")(x))
        return Linear(width, c.multimodal_projector_bias, name="linear_2")(x)


def project(config: Any, params, pixels: Any, tower: str, rngs: Any, remat: str) -> Float[Array, "N P D"]:
    """What the tower says of `pixels`, in the width of the decoder."""
    selected = select(config, params, pixels, tower, rngs, remat)
    return Projector(config).apply({"params": params["multi_modal_projector"]}, selected, rngs=rngs)


def select(config: Any, params, pixels: Any, tower: str, rngs: Any, remat: str) -> Float[Array, "N P V"]:
    """The tower's hidden states that the config asks for, side by side."""
    tree = params["vision_tower"]
    with jax.named_scope("vision_tower"):
        tree = tree["vision_model"] if tower.endswith("vision_model") else tree
        states = vision.hidden_states(config.vision_config, tree, pixels, config.vision_feature_layer, remat, rngs)
    if config.vision_feature_select_strategy == "default":
        states = [state[:, 1:] for state in states]
    return jnp.concatenate(states, axis=-1)


def dtype_of(params) -> Any:
    return params["multi_modal_projector"]["linear_1"]["kernel"].dtype


def tower_path(hf: Any) -> str:
    """Where the tower stands in the tree and on disk; CLIP's and SigLIP's have one module more."""
    return "vision_tower/vision_model" if hf.vision_config.model_type in TOWERS[:2] else "vision_tower"


def make(hf: Any) -> Model:
    """A LLaVA-1.5 model from its Hugging Face config."""
    config, path = config_from_hf(hf), tower_path(hf)
    tower, disk = config.vision_config, path.replace("/", ".") + "."
    mixed = hf.vision_config.model_type == "pixtral"

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        pixels = batch_patches(batch, dtype_of(params)) if mixed else vlm.flat_images(batch, dtype_of(params))
        features = project(config, params, pixels, path, rngs, remat)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    return vlm.assemble(
        hf,
        config,
        parts=parts(config, path, patch_dummy(tower) if mixed else None),
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.llava_names, [towers.names(hf.vision_config.model_type, path + "/", disk)],
                                  **vlm.llava_renames(disk)),
        media=mixed_media(hf, config) if mixed else Media(config.image_token_index, config.features, tower.image_size, tower.image_size),
        trained_layers=vlm.tower_layers(path, tower, config.vision_feature_layer),
    )  # fmt: skip


def parts(config: Any, path: str, pixels: Any = None) -> dict[str, Any]:
    """What stands beside the decoder: tree path -> key -> parameters."""
    width = config.vision_config.hidden_size * len(config.vision_feature_layer)
    projector = vlm.module_params(Projector(config), (1, width))
    return {path: vlm.tower_params(config.vision_config, pixels), "multi_modal_projector": projector}


# ---- images of all sizes, as Pixtral's tower takes them: one slot a patch


def batch_patches(batch: Batch, dtype: Any) -> vision.Patches:
    return vision.Patches(batch["pixel_values"].astype(dtype), (batch["image_ids"],), batch["patch_grid"])


def patch_dummy(tower: vision.VisionConfig) -> vision.Patches:
    values = np.zeros((1, 1, tower.patch_size**2 * tower.num_channels), np.float32)
    return vision.Patches(values, (np.ones((1, 1), np.int32),), np.zeros((1, 1, 2), np.int32))


def mixed_media(hf: Any, config: LlavaConfig) -> Media:
    """An image is written as rows of image tokens, each ended by a break, the last by an end."""
    patch = config.vision_config.patch_size

    def show(size: tuple[int, int], assets: Any, count: int) -> Shown:
        rows, columns = (pixels // patch for pixels in resized(size, assets.processor.image_processor))
        line = "[IMG]"
        return Shown(rows * columns, (columns,) * rows, "[IMG_BREAK]".join([line] * rows) + "[IMG_END]")

    def pictures(processed: Mapping[str, Any]) -> list[Picture]:
        made = []
        for image, (height, width) in zip(np.asarray(processed["pixel_values"]), np.asarray(processed["image_sizes"])):
            grid = np.indices((height // patch, width // patch)).reshape(2, -1).T
            values = vision.cut(image[None, :, :height, :width].transpose(0, 2, 3, 1), patch)[0]
            made.append(Picture({"pixel_values": values, "patch_grid": grid}, np.arange(len(grid))))
        return made

    slot = {"pixel_values": ((patch * patch * 3,), np.float32), "patch_grid": ((2,), np.int32), "image_ids": ((), np.int32)}
    return Media(config.image_token_index, 1, patch, patch, slot=slot, show=show, pictures=pictures)


def resized(size: tuple[int, int], processor: Any) -> tuple[int, int]:
    """(height, width) to which Pixtral's processor brings an image of `size` (width, height).

    Raises:
        ValueError: a strip of which nothing is left once its longer side fits; the processor would refuse it too.
    """
    width, height = size
    longest, patch = processor.size["longest_edge"], processor.patch_size
    patch = patch["height"] if isinstance(patch, Mapping) else patch
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = int(np.floor(height / ratio)), int(np.floor(width / ratio))
    if not (height and width):
        raise ValueError(f"{size[0]} x {size[1]} pixels shrink to {width} x {height}, as longest_edge is {longest}")
    return tuple(patch * ((side - 1) // patch + 1) for side in (height, width))
