"""What a model says of a batch: media encoded, the model run, the scored positions gathered, token statistics, sums per answer."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aligner.logprobs import token_stats
from aligner.types import Batch, Model, Params, Scores


def cast(params: Params, dtype: str) -> Params:
    """Floating-point leaves in the dtype of the computation. Done once a step, before anything reads them."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)


def make_likelihood(model: Model, answers: int, stats: Sequence[str] = ("logp",), remat: str = "none") -> Callable[..., Scores]:
    """The likelihood of a text model, with or without media.

    Args:
        model: whose `encode`, `apply` and `head` are used.
        answers: R, how many answers an example has.
        stats: token statistics besides "logp" to return, by their names in `aligner.logprobs`.
        remat: what the backward pass recomputes, a key of `aligner.models.layers.REMAT`.

    Returns:
        (params, batch, key) -> Scores; parameters already in the dtype of the computation.
    """
    names = tuple(dict.fromkeys(("logp", *stats)))

    def likelihood(params: Params, batch: Batch, key: Array | None = None) -> Scores:
        features = model.encode(params, batch, remat=remat)
        output = model.apply(params, batch, features=features, key=key, remat=remat)
        hidden = jnp.take_along_axis(output.hidden, batch["score_from"][..., None], axis=1)
        tokens = token_stats(hidden, model.head(params), batch["score_token"], names)
        scored = batch["score_segment"] > 0
        tokens = {name: jnp.where(scored, value, 0) for name, value in tokens.items()}
        return Scores(sum_answers(tokens["logp"], batch, answers), answer_lengths(batch, answers), tokens, output.aux)

    return likelihood


def sum_answers(values: Float[Array, "B S"], batch: Batch, answers: int) -> Float[Array, "B G R"]:
    """Sum per-token values over each answer of each example of a row."""
    rows, examples = batch["example_id"].shape
    slot = (batch["score_segment"] - 1) * answers + batch["score_role"] - 1  # negative where nothing is scored
    member = jax.nn.one_hot(slot, examples * answers, dtype=values.dtype)
    total = jnp.einsum("bs,bsx->bx", values, member, precision=jax.lax.Precision.HIGHEST)
    return total.reshape(rows, examples, answers)


def answer_lengths(batch: Batch, answers: int) -> Float[Array, "B G R"]:
    """Scored tokens of each answer: known from masks alone."""
    return sum_answers((batch["score_segment"] > 0).astype(jnp.float32), batch, answers)
