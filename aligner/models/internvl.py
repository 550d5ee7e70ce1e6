"""InternVL (arXiv 2504.10479, the `-hf` checkpoints): a tower with layer scale, four neighbouring patches joined to one feature."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from aligner.models import decoder, towers, vision, vlm
from aligner.models.layers import ACTIVATIONS, LayerNorm, Linear
from aligner.models.pictures import Shown
from aligner.types import Batch, Media, Model, UserError


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    image_token_id: int
    joined: int  # patches that make a feature, along each side
    projector_hidden_act: str
    layer: int | str  # hidden state of the tower that is used

    @property
    def features(self) -> int:
        """Features of one tile."""
        return self.vision_config.num_patches // self.joined**2


def config_from_hf(hf: Any) -> InternVLConfig:
    """Read an `InternVLConfig`."""
    if hf.vision_feature_select_strategy != "default" or not isinstance(hf.vision_feature_layer, int):
        raise UserError(
            f"vision_feature_select_strategy={hf.vision_feature_select_strategy!r} with vision_feature_layer={hf.vision_feature_layer} of "
            "the internvl config is not implemented; 'default' with one layer is"
        )
    return InternVLConfig(
        text_config=vlm.read_text(hf),
        vision_config=vlm.read_tower(hf, ("internvl_vision",)),
        image_token_id=hf.image_token_id,
        joined=int(1 / hf.downsample_ratio),
        projector_hidden_act=hf.projector_hidden_act,
        layer=vision.NORMED if hf.vision_feature_layer == -1 else hf.vision_feature_layer,
    )


class Projector(nn.Module):
    config: InternVLConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... V"]) -> Float[Array, "... D"]:
        c, width = self.config, self.config.text_config.hidden_size
        x = Linear(width, True, name="linear_1")(LayerNorm(name="layer_norm")(x))
        return Linear(width, True, name="linear_2")(ACTIVATIONS[c.projector_hidden_act](x))


def make(hf: Any) -> Model:
    """An InternVL model from its Hugging Face config."""
    config = config_from_hf(hf)
    tower, side = config.vision_config, config.vision_config.image_size // config.vision_config.patch_size

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        projector = params["multi_modal_projector"]
        with jax.named_scope("vision_tower"):
            pixels = vlm.flat_images(batch, projector["linear_1"]["kernel"].dtype)
            [state] = vision.hidden_states(tower, params["vision_tower"], pixels, (config.layer,), remat, rngs)
        joined = vision.cut(state[:, 1:].reshape(len(state), side, side, -1), config.joined)
        features = Projector(config).apply({"params": projector}, joined, rngs=rngs)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    def show(size: tuple[int, int], assets: Any, count: int) -> Shown:
        tiles = assets.processor.image_processor.get_number_of_image_patches(size[1], size[0], {})
        token = assets.tokenizer.convert_ids_to_tokens(config.image_token_id)
        return Shown(tiles, (tiles * config.features,), f"<img>{token}</img>")

    names = towers.names("internvl_vision", "vision_tower/", "vision_tower.")
    return vlm.assemble(
        hf,
        config,
        parts={"vision_tower": vlm.tower_params(tower),
               "multi_modal_projector": vlm.module_params(Projector(config), (1, tower.hidden_size * config.joined**2))},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.llava_names, [names], **vlm.llava_renames("vision_tower.")),
        media=Media(config.image_token_id, config.features, tower.image_size, tower.image_size, show=show),
        trained_layers=vlm.tower_layers("vision_tower", tower, (config.layer,)),
    )  # fmt: skip
