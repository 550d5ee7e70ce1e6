"""What ORPO, SimPO and AlphaPO add to the losses on pairs: they compare log-probabilities of the policy alone."""

import math

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

Values = Float[Array, "..."]


def log1mexp(x: Values) -> Values:
    """log(1 - exp(x)) for x <= 0, without cancellation at either end; at 0, where it is -infinity, x is held at the largest number
    below, so that value and gradient stay finite."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    small = x > -math.log(2)
    # each branch is kept away from where it has no gradient
    return jnp.where(small, jnp.log(-jnp.expm1(jnp.where(small, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(small, -1.0, x))))


def log_odds_ratio(chosen: Values, rejected: Values) -> Values:
    """log(odds(chosen) / odds(rejected)), odds = p / (1 - p) (arXiv 2403.07691, equation 4).

    Args:
        chosen, rejected: log-probability per token, averaged over the answer.
    """
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def odds_ratio(chosen: Values, rejected: Values) -> Values:
    """ORPO's loss on a pair (arXiv 2403.07691, equation 7), without its weight: -log sigmoid(log odds ratio)."""
    return -log_sigmoid(log_odds_ratio(chosen, rejected))


def simpo(chosen: Values, rejected: Values, beta: float, gamma: float, label_smoothing: float = 0.0) -> Values:
    """SimPO (arXiv 2405.14734): -log sigmoid(beta (chosen - rejected) - gamma), smoothed as in `preference.sigmoid`.

    Args:
        chosen, rejected: log-probability per token, averaged over the answer.
        gamma: the margin of rewards that is asked for.
    """
    margin = beta * (chosen - rejected) - gamma
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def alpha_reward(logps: Values, alpha: float) -> Values:
    """AlphaPO's reward before its scale (arXiv 2501.03884): (1 - p^-alpha) / alpha, which is log p as alpha goes to 0."""
    return logps if alpha == 0 else -jnp.expm1(-alpha * logps) / alpha
