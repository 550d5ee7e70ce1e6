"""Losses on pairs of answers, from sequence log-probabilities."""

import jax
from jaxtyping import Array, Float


def sigmoid(
    chosen_logratios: Float[Array, "..."], rejected_logratios: Float[Array, "..."], beta: float, label_smoothing: float = 0.0
) -> Float[Array, "..."]:
    """DPO's loss of every pair (arXiv 2305.18290, equation 7), with conservative label smoothing (arXiv 2305.18290v3, section B.1).

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), where h = chosen_logratios - rejected_logratios.

    TRL's `sigmoid` ignores label smoothing; at label_smoothing=0 the two are equal.

    Args:
        chosen_logratios: log pi(y_w|x) - log pi_ref(y_w|x), summed over tokens, any shape.
        rejected_logratios: the same for y_l.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability e in [0, 0.5) that a label is wrong.
    """
    margin = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
