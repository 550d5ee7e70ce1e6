"""LLaVA-1.5 (arXiv 2310.03744): a vision tower's patch features through a two-layer projector, put where the `<image>` tokens stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aligner.models import clip, decoder, families
from aligner.models.layers import ACTIVATIONS, Linear, rngs
from aligner.types import Batch, Media, Model, Output, UserError


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: clip.VisionConfig
    image_token_index: int
    vision_feature_layer: tuple[int, ...]
    vision_feature_select_strategy: str  # "default" leaves the class token out, "full" keeps it
    projector_hidden_act: str
    multimodal_projector_bias: bool

    @property
    def features(self) -> int:
        """Features of one image."""
        return self.vision_config.num_patches + (self.vision_feature_select_strategy == "full")


def config_from_hf(hf: Any) -> LlavaConfig:
    """Read a Hugging Face `LlavaConfig` whose parts are CLIP and a text family."""
    for part, supported in ((hf.text_config, tuple(families.FAMILIES)), (hf.vision_config, ("clip_vision_model",))):
        if part.model_type not in supported:
            raise UserError(f"a llava checkpoint with a {part.model_type!r} part is not supported; that part may be {', '.join(supported)}")
    layer, depth = hf.vision_feature_layer, hf.vision_config.num_hidden_layers
    if outside := [index for index in np.ravel(layer).tolist() if not -depth - 1 <= index <= depth]:
        raise UserError(f"vision_feature_layer {outside[0]} is none of the vision tower, which has {depth} layers")
    text = families.FAMILIES[hf.text_config.model_type](hf.text_config)
    return LlavaConfig(
        text_config=dataclasses.replace(text, tie_word_embeddings=bool(hf.tie_word_embeddings or text.tie_word_embeddings)),
        vision_config=clip.config_from_hf(hf.vision_config),
        image_token_index=hf.image_token_index,
        vision_feature_layer=(layer,) if isinstance(layer, int) else tuple(layer),
        vision_feature_select_strategy=hf.vision_feature_select_strategy,
        projector_hidden_act=hf.projector_hidden_act,
        multimodal_projector_bias=hf.multimodal_projector_bias,
    )


class Projector(nn.Module):
    config: LlavaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... V"]) -> Float[Array, "... D"]:
        c, width = self.config, self.config.text_config.hidden_size
        x = ACTIVATIONS[c.projector_hidden_act](Linear(width, c.multimodal_projector_bias, name="linear_1")(x))
        return Linear(width, c.multimodal_projector_bias, name="linear_2")(x)


def encode(config: LlavaConfig, params, batch: Batch, key: Array | None = None, remat: str = "none") -> Float[Array, "B F D"] | None:
    """Features of all images of a row, one after the other: [B, I*P, D]. None when the batch holds no pixels."""
    if "pixel_values" not in batch:
        return None
    pixels = batch["pixel_values"]
    rows, images = pixels.shape[:2]
    dtype = params["multi_modal_projector"]["linear_1"]["kernel"].dtype
    with jax.named_scope("vision_tower"):
        flat = pixels.reshape(rows * images, *pixels.shape[2:]).astype(dtype)
        tower = params["vision_tower"]["vision_model"]
        states = clip.hidden_states(config.vision_config, tower, flat, config.vision_feature_layer, remat, rngs(key))
    if config.vision_feature_select_strategy == "default":
        states = [state[:, 1:] for state in states]
    projector = {"params": params["multi_modal_projector"]}
    features = Projector(config).apply(projector, jnp.concatenate(states, axis=-1), rngs=rngs(key))
    return features.reshape(rows, images * config.features, -1)


def inputs(config: LlavaConfig, processed: Mapping[str, Any]) -> Batch:
    """A `LlavaProcessor`'s output as a batch: the images, given one after the other, are dealt to the rows by their placeholders."""
    batch = decoder.text_batch(processed)
    if processed.get("pixel_values") is None:
        return batch
    pixels = np.asarray(processed["pixel_values"]).transpose(0, 2, 3, 1)
    return {**batch, **deal_images(np.asarray(batch["tokens"]), pixels, config.image_token_index, config.features)}


def deal_images(tokens: np.ndarray, pixels: np.ndarray, placeholder: int, features: int) -> dict[str, Array]:
    """Images [n,H,W,3] in reading order -> `pixel_values`, `image_mask`, `media_index` of the rows whose placeholders they fill."""
    is_media = tokens == placeholder
    per_row = is_media.sum(axis=1)
    if (per_row % features).any() or per_row.sum() != len(pixels) * features:
        raise UserError(f"{len(pixels)} images of {features} features each do not fit placeholder counts {per_row.tolist()} of the rows")
    counts = per_row // features
    slots = max(int(counts.max()), 1)
    values = np.zeros((len(tokens), slots, *pixels.shape[1:]), pixels.dtype)
    mask = np.arange(slots) < counts[:, None]
    values[mask] = pixels
    index = np.where(is_media, np.cumsum(is_media, axis=1) - 1, -1).astype(np.int32)
    return dict(pixel_values=jnp.asarray(values), image_mask=jnp.asarray(mask), media_index=jnp.asarray(index))


SHARDING_RULES = (
    (r"linear_1/kernel$", ("embed", "mlp")),
    (r"linear_1/bias$", ("mlp",)),
    (r"linear_2/kernel$", ("mlp", "embed")),
    (r"patch_embedding/kernel$", ("embed",)),
    *decoder.SHARDING_RULES,
)

# Every layout that `transformers` ever wrote, turned into the one that all its releases read.
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

# The layout that we write, turned into the names of `transformers`' modules in memory.
MODULES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


def make(hf: Any) -> Model:
    """A LLaVA-1.5 model from its Hugging Face config."""
    config = config_from_hf(hf)
    text, vision = config.text_config, config.vision_config

    def init(key):
        keys = jax.random.split(key, 3)
        pixels = jnp.zeros((1, vision.image_size, vision.image_size, vision.num_channels))
        selected = jnp.zeros((1, vision.hidden_size * len(config.vision_feature_layer)))
        return {
            "language_model": decoder.CausalLM(text).init(keys[0], decoder.dummy_batch())["params"],
            "vision_tower": {"vision_model": clip.VisionTransformer(vision).init(keys[1], pixels)["params"]},
            "multi_modal_projector": Projector(config).init(keys[2], selected)["params"],
        }

    def apply(params, batch, *, features=None, cache=None, key=None, remat="none") -> Output:
        hidden = decoder.CausalLM(text, remat).apply({"params": params["language_model"]}, batch, features, rngs=rngs(key))
        return Output(hidden, {}, cache)

    base = families.conversion(hf.text_config.model_type, text, "language_model/", "language_model.")
    tower = {"vision_tower/vision_model/encoder/layers": "vision_tower.vision_model.encoder.layers.{i}"}
    ignored = (*base.ignored, r"embeddings\.position_ids$")
    return Model(
        family=hf.model_type,
        config=config,
        init=init,
        encode=lambda params, batch, key=None, remat="none": encode(config, params, batch, key, remat),
        apply=apply,
        head=lambda params: decoder.head(text, params["language_model"]),
        inputs=lambda processed: inputs(config, processed),
        conversion=dataclasses.replace(base, stacks={**base.stacks, **tower}, renames=RENAMES, modules=MODULES, ignored=ignored),
        sharding_rules=SHARDING_RULES,
        trained_layers={
            "vision_tower/vision_model/encoder/layers": clip.layers_run(vision, config.vision_feature_layer),
            "vision_tower/vision_model/post_layernorm": 0,
        },
        media=Media(config.image_token_index, config.features, vision.image_size, vision.image_size),
    )
