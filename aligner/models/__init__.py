"""Model families by Hugging Face's `model_type`. A family is one file with `make(hf_config) -> Model`."""

import difflib
import importlib
from typing import Any

from aligner.types import Model, UserError

# model_type -> the file of this package that makes it
WITH_MEDIA = {
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), "llava_next"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "qwen_vl"),
    **dict.fromkeys(("paligemma", "gemma3"), "gemma_vl"),
    **dict.fromkeys(("idefics3", "smolvlm"), "idefics"),
    **{name: name for name in ("llava", "idefics2", "internvl", "mllama", "vision_llm", "qwen2_audio")},
}
SUPPORTED = (
    *("baichuan", "bloom", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral"),
    *("mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
    *WITH_MEDIA,
)


def from_hf(hf_config: Any, score_head: bool = False) -> Model:
    """The model that a Hugging Face config describes.

    Args:
        hf_config: a `transformers` config, already normalised by `AutoConfig`.
        score_head: with a head that gives one score instead of logits (a reward or cost model); see `aligner.models.score_head`.

    Raises:
        UserError: the family, or a setting of it that changes the numbers, is not supported.
    """
    from aligner.models import decoder, families  # imported late: flax is slow to import
    from aligner.models.score_head import with_score_head

    if score_head:
        return with_score_head(from_hf(hf_config))

    family = hf_config.model_type
    if family in families.FAMILIES:
        config = families.FAMILIES[family](hf_config)
        return decoder.make(config, family, families.conversion(family, config))
    if family not in WITH_MEDIA:
        near = difflib.get_close_matches(str(family), SUPPORTED, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise UserError(f"model_type {family!r} is not supported{hint}; supported are {', '.join(SUPPORTED)}")
    from aligner.models.vlm import UNREAD

    return families.read(importlib.import_module(f"aligner.models.{WITH_MEDIA[family]}").make, hf_config, UNREAD)
