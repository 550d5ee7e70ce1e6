"""Losses of reward and cost models, from one score an answer. Each returns a value per group of answers, or per answer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def bradley_terry(
    chosen: Float[Array, "..."], rejected: Float[Array, "..."], margin: Float[Array, "..."] | float = 0.0
) -> Float[Array, "..."]:
    """-log sigmoid(r_w - r_l - margin): the better answer scores higher (arXiv 2203.02155, equation 1; margin: 2307.09288, equation 2).

    Args:
        chosen, rejected: scores r_w, r_l of each pair.
        margin: by how much they should differ; TRL's `margin` column.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def plackett_luce(scores: Float[Array, "... R"], present: Bool[Array, "... R"]) -> Float[Array, "..."]:
    """-sum_i log(e^{r_i} / sum_{j>=i} e^{r_j}): the order of a ranked list, best first; `bradley_terry` at two answers.

    Args:
        scores: r_i, in the order of preference.
        present: which of them there are; absent ones may stand anywhere and count for nothing.
    """
    low = jnp.finfo(scores.dtype).min
    scores = jnp.where(present, scores, low)
    # log of the sum over j >= i, from behind; where i is absent the value is thrown away
    rest = jax.lax.associative_scan(jnp.logaddexp, scores, reverse=True, axis=scores.ndim - 1)
    return jnp.sum(jnp.where(present, rest - scores, 0), axis=-1)


def squared_error(scores: Float[Array, "..."], targets: Float[Array, "..."]) -> Float[Array, "..."]:
    """(r - target)^2 of each answer, for rows that bring the score itself."""
    return jnp.square(scores - targets)


def center(scores: Float[Array, "... R"], present: Bool[Array, "... R"]) -> Float[Array, "..."]:
    """(sum of a group's scores)^2, which keeps rewards around zero (arXiv 2312.09244, equation 2; TRL's `center_rewards_coefficient`)."""
    return jnp.square(jnp.sum(jnp.where(present, scores, 0), axis=-1))


def safety_sign(costs: Float[Array, "..."], safe: Array) -> Float[Array, "..."]:
    """-log sigmoid(-s c): a safe answer (s = 1) costs less than zero, a harmful one (s = -1) more (Safe RLHF, arXiv 2310.12773).

    Args:
        costs: c of each answer.
        safe: s, 1 or -1.
    """
    return -jax.nn.log_sigmoid(-safe * costs)
