"""Model families by Hugging Face's `model_type`. A family is one file with `make(hf_config, score_head=False) -> Model`."""

import difflib
from typing import Any

from aligner.types import Model, UserError

SUPPORTED = ("llama", "llava")


def from_hf(hf_config: Any, score_head: bool = False) -> Model:
    """The model that a Hugging Face config describes.

    Args:
        hf_config: a `transformers` config, already normalised by `AutoConfig`.
        score_head: with a head that gives one score instead of logits (a reward or cost model): the tree then holds `score/kernel`
            [D, 1] and no language-model head.

    Raises:
        UserError: the family, or a setting of it that changes the numbers, is not supported.
    """
    from aligner.models import decoder, llava  # imported late: flax is slow to import

    families = {"llama": decoder.make, "llava": llava.make}
    family = hf_config.model_type
    if family not in families:
        near = difflib.get_close_matches(str(family), families, n=1)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise UserError(f"model_type {family!r} is not supported{hint}; supported are {', '.join(sorted(families))}")
    return families[family](hf_config, score_head)
