"""PaliGemma 1 and 2 (arXiv 2407.07726, 2412.03555) and Gemma 3 with images (arXiv 2503.19786): SigLIP's normed features, and text that does
not only look back: PaliGemma's prompt sees all of itself, Gemma 3's images see all of themselves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aligner.models import decoder, towers, vision, vlm
from aligner.models.layers import Linear, RMSNorm, leaf
from aligner.models.pictures import Shown
from aligner.types import Batch, Media, Model, UserError

_PATH = "vision_tower/vision_model"


@dataclasses.dataclass(frozen=True)
class GemmaVLConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    image_token_index: int
    pooled: int  # patches whose mean makes a feature, along each side; 0 neither pools nor norms (PaliGemma)

    @property
    def features(self) -> int:
        """Features of one image."""
        return self.vision_config.num_patches // max(self.pooled, 1) ** 2


def config_from_hf(hf: Any) -> GemmaVLConfig:
    """Read a `PaliGemmaConfig` or a `Gemma3Config`."""
    tower = vlm.read_tower(hf, ("siglip_vision_model",))
    if hf.model_type == "paligemma":
        if hf.text_config.model_type not in ("gemma", "gemma2"):
            raise UserError(f"a paligemma checkpoint with a {hf.text_config.model_type!r} part is not implemented, gemma and gemma2 are")
        text = copy.copy(hf.text_config)
        text.use_bidirectional_attention = None  # of the prompt, it means
        softcap = getattr(text, "final_logit_softcapping", None)
        return GemmaVLConfig(vlm.read_text(hf, text=text, both_ways="prompt", final_softcap=softcap), tower, hf.image_token_index, 0)
    side = tower.image_size // tower.patch_size
    pooled = side // int(hf.mm_tokens_per_image**0.5)
    text = vlm.read_text(hf, both_ways="pictures", picture_tokens=(side // pooled) ** 2)
    return GemmaVLConfig(text, tower, hf.image_token_index, pooled)


class Projector(nn.Module):
    config: GemmaVLConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N P V"]) -> Float[Array, "N F D"]:
        c, width = self.config, self.config.text_config.hidden_size
        if not c.pooled:
            return Linear(width, True, name="linear")(x)
        side = c.vision_config.image_size // c.vision_config.patch_size
        blocks = vision.cut(x.reshape(len(x), side, side, -1), c.pooled)
        x = jnp.mean(blocks.reshape(*blocks.shape[:2], c.pooled**2, -1), axis=2)
        x = RMSNorm(c.vision_config.layer_norm_eps, plus_one=True, name="mm_soft_emb_norm")(x)
        kernel = leaf(self, "mm_input_projection_weight", nn.initializers.normal(0.02), (x.shape[-1], width))
        return x @ kernel.astype(x.dtype)


def make(hf: Any) -> Model:
    """A PaliGemma or a Gemma 3 from its Hugging Face config."""
    config = config_from_hf(hf)
    tower = config.vision_config

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        tree = params["vision_tower"]["vision_model"]
        with jax.named_scope("vision_tower"):
            pixels = vlm.flat_images(batch, tree["post_layernorm"]["bias"].dtype)
            [state] = vision.hidden_states(tower, tree, pixels, (vision.NORMED,), remat, rngs)
        features = Projector(config).apply({"params": params["multi_modal_projector"]}, state, rngs=rngs)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    def roles(processed: Mapping[str, Any], batch: dict) -> dict:
        """What a processor calls type 0 is the prompt; without types all looks back, as in `transformers`."""
        types = processed.get("token_type_ids")
        return {"role": jnp.ones_like(batch["tokens"]) if types is None else jnp.asarray(types, jnp.int32)}

    def show(size: tuple[int, int], assets: Any, count: int) -> Shown:
        token = assets.tokenizer.convert_ids_to_tokens
        return Shown(1, (config.features,), f"\n\n{token(hf.boi_token_index)}{token(hf.image_token_index)}{token(hf.eoi_token_index)}\n\n")

    gemma3 = bool(config.pooled)
    disk = "vision_tower.vision_model."
    return vlm.assemble(
        hf,
        config,
        parts={_PATH: vlm.tower_params(tower),
               "multi_modal_projector": vlm.module_params(Projector(config), (1, tower.num_patches, tower.hidden_size))},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.llava_names, [towers.names("siglip_vision_model", _PATH + "/", disk)],
                                  **vlm.llava_renames(disk)),
        media=Media(config.image_token_index, config.features, tower.image_size, tower.image_size, show=show if gemma3 else None),
        trained_layers=vlm.tower_layers(_PATH, tower, (vision.NORMED,)),
        roles=None if gemma3 else roles,
    )  # fmt: skip
