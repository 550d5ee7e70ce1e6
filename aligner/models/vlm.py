"""What all vision-language families share: a text decoder under `language_model/` into which features are merged, parts beside it that make
the features, and the names of both on disk."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aligner.models import decoder, families, pictures, towers, vision
from aligner.models.layers import rngs
from aligner.types import Array, Conversion, Media, Model, Output, Params, UserError

SHARDING_RULES = (
    (r"linear_1/kernel$", ("embed", "mlp")),
    (r"linear_1/bias$", ("mlp",)),
    (r"linear_2/kernel$", ("mlp", "embed")),
    (r"(multi_modal_projector(/linear)?|modality_projection/proj)/kernel$|mm_input_projection_weight$", ("mlp", "embed")),
    (r"tile_embedding/embedding$", (None, "embed")),
    (r"patch_embedding/kernel$", ()),
    *decoder.SHARDING_RULES,
)


# Fields of the larger config that need not be read: they say what a processor does, or stand in the parts' configs as well.
UNREAD = families.UNREAD | {
    *("image_seq_length", "image_token_index", "image_token_id", "boi_token_index", "eoi_token_index"),
    *("video_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id", "video_seq_length"),
    *("projection_dim", "hidden_size", "vocab_size", "initializer_range", "architectures"),
}


def read_text(
    hf: Any, reader: Callable[[Any], decoder.DecoderConfig] | None = None, text: Any = None, **flags: Any
) -> decoder.DecoderConfig:
    """The decoder's flags from `hf.text_config`.

    Args:
        hf: the larger config.
        reader: where the text is no family of its own.
        text: in place of `hf.text_config`.
        flags: what the larger model adds.
    """
    text = hf.text_config if text is None else text
    if reader is None:
        check_part(hf, text.model_type, tuple(families.FAMILIES))
    config = families.read(reader, text) if reader else families.FAMILIES[text.model_type](text)
    # `transformers` puts a plain head on the inner model: what its text family does to logits (Gemma 2, Granite, Phi) it leaves out, and
    # whether the head is tied the larger config says
    tied = bool(getattr(hf, "tie_word_embeddings", False))
    plain = dict(final_softcap=None, logits_scale=1.0, head_bias=False, tie_word_embeddings=tied)
    return dataclasses.replace(config, **plain | flags)


def read_tower(hf: Any, kinds: Sequence[str]) -> vision.VisionConfig:
    """The tower's flags from `hf.vision_config`, which must be one of `kinds`."""
    check_part(hf, hf.vision_config.model_type, kinds)
    return towers.read(hf.vision_config)


def check_part(hf: Any, found: str, kinds: Sequence[str]) -> None:
    """Refuse a part of a larger config whose `model_type` is none of `kinds`."""
    if found not in kinds:
        near = difflib.get_close_matches(str(found), kinds, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise UserError(f"a {hf.model_type} checkpoint with a {found!r} part is not supported{hint}; that part may be {', '.join(kinds)}")


def llava_names(name: str) -> str:
    """A decoder tensor's name in the layout that the LLaVA families have on the Hub."""
    return "language_model." + name


def inner_names(inner: str) -> Callable[[str], str]:
    """Names where the decoder lies inside the model: `model.embed_tokens` -> `model.<inner>.embed_tokens`, the head as it is."""
    return lambda name: re.sub(r"^model\b", f"model.{inner}", name)


def llava_renames(tower: str, parts: str = "multi_modal_projector") -> dict[str, Sequence[tuple[str, str]]]:
    """`renames` and `modules` of the LLaVA families: every layout that `transformers` ever wrote, turned into the one that all its releases
    read; and that one turned into the names in memory.

    Args:
        tower: the tower on disk, "vision_tower." or "vision_tower.vision_model.".
        parts: regex of what stands beside it.
    """
    renames = [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (rf"^model\.(vision_tower|{parts})\b", r"\1"),
    ]
    modules = [
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (rf"^(vision_tower|{parts})\b", r"model.\1"),
    ]
    if tower.endswith("vision_model."):
        renames.append((r"^vision_tower\.(?!vision_model\.)", tower))
        modules.append((r"^model\.vision_tower\.vision_model\.", "model.vision_tower."))
    return dict(renames=tuple(renames), modules=tuple(modules))


def conversion(
    hf: Any, text: decoder.DecoderConfig, names: Callable[[str], str], parts: Sequence[tuple[dict[str, str], tuple]], **more: Any
) -> Conversion:
    """How the tree maps to Hugging Face names.

    Args:
        hf: the model's config.
        text: the decoder's.
        names: a decoder tensor's name in a model of text alone -> in this one.
        parts: (stacks, exceptions) of what stands beside the decoder, such as `towers.names` gives.
        more: `renames` and `modules` of Conversion.
    """
    base = families.conversion(hf.text_config.model_type, text, "language_model/", names)
    stacks, exceptions = dict(base.stacks), base.exceptions
    for more_stacks, more_exceptions in parts:
        stacks, exceptions = stacks | more_stacks, (*exceptions, *more_exceptions)
    ignored = (*base.ignored, *towers.IGNORED)
    return dataclasses.replace(base, stacks=stacks, exceptions=exceptions, ignored=ignored, **more)


def assemble(
    hf: Any,
    config: Any,
    *,
    parts: Mapping[str, Callable[[jax.Array], Params]],
    encode: Callable[..., Array],
    conversion: Conversion,
    media: Media,
    trained_layers: Mapping[str, int] | None = None,
    roles: Callable[[Mapping[str, Any], dict], dict] | None = None,
) -> Model:
    """A Model from its parts.

    Args:
        hf: the Hugging Face config.
        config: the family's; its `text_config` is the decoder's.
        parts: tree path -> key -> the parameters there, for all but the decoder.
        encode: (params, batch, rngs, remat) -> features [B,F,D].
        conversion, media, trained_layers: as in Model.
        roles: (processed, text batch) -> arrays that replace the batch's, where a processor says more of the text.
    """
    text = config.text_config

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 1 + len(parts))
        made: dict[str, Any] = {"language_model": decoder.CausalLM(text).init(keys[0], decoder.dummy_batch())["params"]}
        for part_key, (path, make) in zip(keys[1:], parts.items()):
            *outer, last = path.split("/")
            inside = made
            for name in outer:
                inside = inside.setdefault(name, {})
            inside[last] = make(part_key)
        return made

    def features_of(params, batch, key=None, remat="none"):
        return encode(params, batch, rngs(key), remat) if "pixel_values" in batch else None

    def apply(params, batch, *, features=None, cache=None, key=None, remat="none") -> Output:
        return decoder.run(text, params["language_model"], batch, features, cache, key, remat)

    def inputs(processed: Mapping[str, Any]) -> dict[str, Array]:
        batch = decoder.text_batch(processed, text.positions_from_mask)
        batch |= roles(processed, batch) if roles else {}
        if all(processed.get(name) is None for name in ("pixel_values", "pixel_values_videos", "input_features")):
            return batch
        return batch | {name: jnp.asarray(array) for name, array in pictures.deal(batch, processed, media).items()}

    return Model(
        family=hf.model_type,
        config=config,
        init=init,
        encode=features_of,
        apply=apply,
        head=lambda params: decoder.head(text, params["language_model"]),
        inputs=inputs,
        conversion=conversion,
        sharding_rules=SHARDING_RULES,
        trained_layers=trained_layers or {},
        media=media,
    )


def tower_params(config: vision.VisionConfig, pixels: Any = None) -> Callable[[jax.Array], Params]:
    """key -> the tower's parameters. `pixels` is the smallest input, where that is not one whole image."""
    size = config.image_size
    whole = np.zeros((1, size, size, config.num_channels), np.float32) if pixels is None else None
    return lambda key: vision.VisionTransformer(config).init(key, whole if pixels is None else pixels)["params"]


def module_params(module: Any, *shapes: tuple[int, ...]) -> Callable[[jax.Array], Params]:
    """key -> the parameters of a module that is called with arrays of these shapes."""
    return lambda key: module.init(key, *(jnp.zeros(shape) for shape in shapes))["params"]


def flat_images(batch: Mapping[str, Array], dtype: Any) -> Array:
    """All slots of all rows, [B*I, H, W, C]."""
    pixels = batch["pixel_values"]
    return pixels.reshape(-1, *pixels.shape[2:]).astype(dtype)


def tower_layers(path: str, config: vision.VisionConfig, layers: tuple) -> dict[str, int]:
    """`Model.trained_layers` of a tower of which these hidden states are used."""
    trained = {f"{path}/encoder/layers": vision.layers_run(config, layers)}
    trained |= {f"{path}/head": 0} if config.pooling_head else {}
    return trained | ({f"{path}/post_layernorm": 0} if config.post_norm and vision.NORMED not in layers else {})
