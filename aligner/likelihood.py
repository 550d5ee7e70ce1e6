"""What a model says of a batch: media encoded, the model run, the scored positions gathered, token statistics, sums per answer."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aligner.logprobs import dense_logits, token_stats
from aligner.types import Batch, Head, Int, Model, Output, Params, Scores


def cast(params: Params, dtype: str) -> Params:
    """Floating-point leaves, but for an adapter's constants, in the dtype of the computation. Done once a step, before anything reads."""
    dtype = jnp.dtype(dtype)

    def one(path, leaf):
        keep = not jnp.issubdtype(leaf.dtype, jnp.floating) or getattr(path[-1], "key", None) in ("lora_scale", "lora_dropout")
        return leaf if keep else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def make_likelihood(
    model: Model, answers: int, stats: Sequence[str] = ("logp",), remat: str = "none", temperature: float = 1.0
) -> Callable[..., Scores]:
    """The likelihood of a text model, with or without media.

    Args:
        model: whose `encode`, `apply` and `head` are used.
        answers: R, how many answers an example has.
        stats: token statistics besides "logp" to return, by their names in `aligner.logprobs`.
        remat: what the backward pass recomputes, a key of `aligner.models.layers.REMAT`.
        temperature: that the logits are divided by.

    Returns:
        (params, batch, key) -> Scores; parameters already in the dtype of the computation.
    """
    names = tuple(dict.fromkeys(("logp", *stats)))

    def likelihood(params: Params, batch: Batch, key: Array | None = None) -> Scores:
        if answers == 1 and batch["example_id"].shape[1] == 1:
            batch = {**batch, "alone": ()}  # no array: the program itself is another one where every row is one text
        output = read(model, params, batch, batch["score_from"], key, remat)
        tokens = token_stats(output.hidden, tempered(model.head(params), temperature), batch["score_token"], names)
        scored = batch["score_segment"] > 0
        tokens = {name: jnp.where(scored, value, 0) for name, value in tokens.items()}
        return Scores(sum_answers(tokens["logp"], batch, answers), answer_lengths(batch, answers), tokens, output.aux)

    return likelihood


def read(model: Model, params: Params, batch: Batch, columns: Int[Array, "B S"], key: Array | None = None, remat: str = "none") -> Output:
    """What a model makes of a batch, media encoded, at some columns: its `hidden` is [B,S,D]."""
    features = model.encode(params, batch, key, remat=remat)
    return model.apply(params, {**batch, "read": columns}, features=features, key=key, remat=remat)


def tempered(head: Head, temperature: float) -> Head:
    """The head whose logits are divided by a temperature."""
    return head._replace(scale=head.scale / temperature, softcap=head.softcap and head.softcap / temperature)


def make_scorer(model: Model, answers: int, remat: str = "none") -> Callable[..., Scores]:
    """What a score head says of every answer, read from the hidden state of the answer's last token.

    Args:
        model: with a score head.
        answers: R, how many answers an example has at most.
        remat: as in `make_likelihood`.

    Returns:
        (params, batch, key) -> Scores with `values`; parameters already in the dtype of the computation. `logps` is zero: such a model
        gives no probabilities.
    """

    def scorer(params: Params, batch: Batch, key: Array | None = None) -> Scores:
        columns = last_columns(batch, answers)
        output = read(model, params, batch, columns.reshape(len(columns), -1), key, remat)
        values = dense_logits(output.hidden, model.head(params))[..., 0].reshape(columns.shape)
        lengths = answer_lengths(batch, answers)
        return Scores(jnp.zeros_like(lengths), lengths, {}, output.aux, values=jnp.where(lengths > 0, values, 0))

    return scorer


def last_columns(batch: Batch, answers: int) -> Int[Array, "B G R"]:
    """The column of each answer's last token; 0 where there is no answer."""
    rows, examples = batch["example_id"].shape
    slot = (batch["score_segment"] - 1) * answers + batch["score_role"] - 1  # negative where nothing is scored
    member = slot[..., None] == jnp.arange(examples * answers)
    # an example is one segment, or one per answer where the prompt is not shared: its scored positions say which
    segments = jnp.take_along_axis(batch["segment_ids"], batch["score_from"], axis=1)
    segment = jnp.max(jnp.where(member, segments[..., None], 0), axis=1)
    role = jnp.tile(jnp.arange(1, answers + 1), examples)
    of_answer = (batch["segment_ids"][..., None] == segment[:, None]) & (batch["role"][..., None] == role) & (segment[:, None] > 0)
    column = jnp.arange(batch["tokens"].shape[1])[:, None]
    return jnp.max(jnp.where(of_answer, column, 0), axis=1).reshape(rows, examples, answers)


def answer_members(batch: Batch, answers: int, dtype: Any = jnp.float32) -> Float[Array, "B S G*R"]:
    """1 where a scored token belongs to an answer (example * R + role - 1), else 0. A scored token of the prompt belongs to none."""
    examples = batch["example_id"].shape[1]
    place = (batch["score_segment"] - 1) * answers + batch["score_role"] - 1  # negative where nothing is scored
    return jax.nn.one_hot(jnp.where(batch["score_role"] > 0, place, -1), examples * answers, dtype=dtype)


def sum_answers(values: Float[Array, "B S"], batch: Batch, answers: int) -> Float[Array, "B G R"]:
    """Sum per-token values over each answer of each example of a row."""
    member = answer_members(batch, answers, values.dtype)
    total = jnp.einsum("bs,bsx->bx", values, member, precision=jax.lax.Precision.HIGHEST)
    return total.reshape(*batch["example_id"].shape, answers)


def spread(values: Float[Array, "B G R"], batch: Batch) -> Float[Array, "B S"]:
    """Each answer's value at each of its scored tokens, 0 elsewhere."""
    member = answer_members(batch, values.shape[-1], values.dtype)
    return jnp.einsum("bx,bsx->bs", values.reshape(len(values), -1), member, precision=jax.lax.Precision.HIGHEST)


def answer_lengths(batch: Batch, answers: int) -> Float[Array, "B G R"]:
    """Scored tokens of each answer: known from masks alone."""
    return sum_answers((batch["score_segment"] > 0).astype(jnp.float32), batch, answers)
