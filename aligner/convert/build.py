"""Put a vision-language model together from a text checkpoint and a vision tower's: `python -m aligner.convert build`.

The projector between them is new. Train it alone first (`--config.optim.freeze="('language_model/.*', 'vision_tower/.*')"`), then the rest.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from aligner.convert import disk
from aligner.convert.assets import Assets
from aligner.convert.export import save
from aligner.convert.hf import find_folder, load, load_params, model_from_folder
from aligner.convert.vocabulary import copy_companions, resized, with_vocabulary
from aligner.types import Conversion, Model, UserError

# A tower that came with a text tower: what is left aside of its checkpoint.
_OTHERS = (r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_(scale|bias)$", r"(^|\.)head\.", r"position_ids$")


def build(
    text: str | Path, vision: str | Path, out_dir: str | Path, *, projector: str = "mlp", mmca: bool = False, latents: int = 64,
    layer: int = -2, image_token: str = "<image>", dtype: str | None = None,
) -> str:  # fmt: skip
    """Write a folder that `aligner` trains, and that `transformers` reads if it is a LLaVA.

    Args:
        text: folder or Hub id of a decoder with its tokenizer.
        vision: of a tower: CLIP, SigLIP (also with their text towers) or DINOv2, with its image processor.
        out_dir: folder to write.
        projector: "linear", "mlp" (two layers), "transformer" or "perceiver".
        mmca: text reads text and images by two softmaxes.
        latents: features of an image, with the perceiver.
        layer: hidden state of the tower that is used.
        image_token: what stands for an image in the text; added to the vocabulary if it is new.
        dtype: of the tensors; the text checkpoint's when None.

    Returns:
        The model_type that was written.
    """
    language, params = load(text, dtype=None)
    folder = find_folder(vision)
    tower = _tower_config(folder)
    tokenizer, known = language.assets.tokenizer, len(language.assets.tokenizer)
    tokenizer.add_tokens([image_token], special_tokens=True)
    rows = max(language.config.vocab_size, len(tokenizer))
    plain = projector == "mlp" and not mmca
    config = {
        "model_type": "llava" if plain else "vision_llm",
        "architectures": ["LlavaForConditionalGeneration"] if plain else None,
        "text_config": with_vocabulary(language.assets.config_dict, rows),
        "vision_config": tower,
        "image_token_index": tokenizer.convert_tokens_to_ids(image_token),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full" if tower["model_type"] == "siglip_vision_model" else "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": language.config.tie_word_embeddings,
        "dtype": dtype or language.source_dtype,
        **({} if plain else {"projector": projector, "projector_latents": latents, "mmca": mmca}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        copy_companions(folder, scratch, ("preprocessor_config.json",))
        copy_companions(language.assets.folder, scratch, ("generation_config.json",))
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=2))
        if plain:
            processor = _processor_config(model_from_folder(scratch), image_token)
            (Path(scratch) / "processor_config.json").write_text(json.dumps(processor, indent=2))
        model = dataclasses.replace(model_from_folder(scratch), assets=Assets(Path(scratch)), source_dtype=dtype or language.source_dtype)
        made = jax.jit(model.init)(jax.random.key(0))
        made["language_model"] = resized(params, known, made["language_model"])
        _place(made, _tower_params(model, folder, tower["model_type"]))
        save(model, made, out_dir)
    return config["model_type"]


def _processor_config(model: Model, image_token: str) -> dict[str, Any]:
    """What `LlavaProcessor` must know to write as many image tokens as the model has features."""
    tower, strategy = model.config.vision_config, model.config.vision_feature_select_strategy
    left_out = int(strategy == "default")  # which it takes away again
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": tower.patch_size,
        "num_additional_image_tokens": model.media.features + left_out - tower.num_patches,
        "vision_feature_select_strategy": strategy,
    }


def _tower_config(folder: Path) -> dict[str, Any]:
    from aligner.models.llava import TOWERS

    config = Assets(folder).config_dict
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        config = {**config["vision_config"], "model_type": f"{kind}_vision_model"}
    if config.get("model_type") not in TOWERS[:4]:
        raise UserError(f"{folder} has model_type {kind!r}; a vision tower may be clip, siglip, {', '.join(TOWERS[:4])}.")
    return config


def _tower_params(model: Model, folder: Path, kind: str) -> dict[str, Any]:
    """The tower's leaves by our names, from its own checkpoint."""
    from aligner.models import towers, vlm

    path = "vision_tower/vision_model" if kind in ("clip_vision_model", "siglip_vision_model") else "vision_tower"
    prefix = path.rpartition("/")[2] + "."  # which many checkpoints leave out, DINOv2's all
    stacks, exceptions = towers.names(kind, path + "/", prefix)
    renames = ((rf"^(?!{re.escape(prefix)}|text_model\.|logit|visual_projection|text_projection)", prefix),)
    alone = dataclasses.replace(
        model,
        init=lambda key: _nested(path, vlm.tower_params(model.config.vision_config)(key)),
        conversion=Conversion(stacks=stacks, exceptions=exceptions, renames=renames, ignored=_OTHERS),
    )
    return load_params(alone, disk.open_checkpoint(folder), None)


def _nested(path: str, tree: Any) -> dict[str, Any]:
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return tree


def _place(tree: dict[str, Any], part: dict[str, Any]) -> None:
    for name, child in part.items():
        if isinstance(child, dict) and isinstance(tree.get(name), dict):
            _place(tree[name], child)
        else:
            tree[name] = child
