"""Models that score: any family with one linear map from the last hidden state to a number instead of its language-model head.

The tree keeps all else and holds `score/kernel` [D, 1] at its top, `score.weight` on disk: the layout of `transformers`'
`*ForSequenceClassification` with one label. Where `transformers` has no such class (LLaVA), the layout is the same: every tensor of the
model under its usual name, so that the bare model class reads the folder, and `score.weight` beside them.
"""

import dataclasses

import jax

from aligner.models.decoder import text_config
from aligner.types import Head, Model, Params

LM_HEAD = r"(^|\.)(lm_head|embed_out)\."  # tensors that such a model has no use for


def with_score_head(model: Model) -> Model:
    """The model with a score head; a fresh one is random as Hugging Face's `score` layer is."""
    text = text_config(model)

    def init(key: jax.Array) -> Params:
        width = text.embedding_size or text.hidden_size
        kernel = text.initializer_range * jax.random.normal(jax.random.fold_in(key, 1), (width, 1))
        return {**without_lm_head(model.init(key)), "score": {"kernel": kernel}}

    return dataclasses.replace(
        model,
        init=init,
        head=lambda params: Head(params["score"]["kernel"]),
        conversion=dataclasses.replace(model.conversion, ignored=(*model.conversion.ignored, LM_HEAD), tied=()),
        sharding_rules=((r"score/kernel$", ("embed", None)), *model.sharding_rules),
        has_score_head=True,
    )


def without_lm_head(tree: Params) -> Params:
    """The tree without its language-model head, wherever it stands."""
    return {name: without_lm_head(child) if isinstance(child, dict) else child for name, child in tree.items() if name != "lm_head"}
