"""Losses of answers that a policy wrote itself. Each gives one value per token.

Throughout, for a token of an answer:
    log_ratio   log pi - log pi_old, pi_old being the policy that wrote it; or what the answer's log-ratios come to, the same at each token
    advantages  how much better the answer (or the token) was than expected; constants
Arguments may have any shape, the same one; so does the result.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Values = Float[Array, "..."]


def clipped(
    log_ratio: Values, advantages: Values, low: float, high: float, delta: float | None = None, dual: float | None = None
) -> Values:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), to be minimised.

    Args:
        low, high: the ratio is held in [1 - low, 1 + high]; high above low is clip-higher (DAPO, arXiv 2503.14476).
        delta: the unclipped ratio is held below this too (two-sided clipping, arXiv 2505.07291); None does not.
        dual: c > 1: where the advantage is negative, the loss is held below -c * advantage (dual clip, arXiv 1912.09729); None does not.
    """
    ratio = jnp.exp(log_ratio)
    inside = jnp.clip(ratio, 1 - low, 1 + high)
    ratio = ratio if delta is None else jnp.minimum(ratio, delta)
    loss = -jnp.minimum(ratio * advantages, inside * advantages)
    return loss if dual is None else jnp.where(advantages < 0, jnp.minimum(loss, -dual * advantages), loss)


def cispo(log_ratio: Values, logps: Values, advantages: Values, high: float) -> Values:
    """REINFORCE weighted by the ratio, held below `high` and constant (CISPO, arXiv 2506.13585, equation 4)."""
    return -jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), high)) * advantages * logps


def sapo(log_ratio: Values, advantages: Values, temperature_pos: float, temperature_neg: float) -> Values:
    """A soft gate in place of the clip (SAPO, arXiv 2511.20347): 4 / t * sigmoid(t * (ratio - 1))."""
    t = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return -jax.nn.sigmoid(t * (jnp.exp(log_ratio) - 1)) * 4 / t * advantages


def vespo(
    sequence_log_ratio: Values,
    logps: Values,
    advantages: Values,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Values:
    """REINFORCE weighted by phi(w) = e^lambda * w^k * e^(-lambda w) of the answer's ratio w, constant (VESPO).

    Args:
        sequence_log_ratio: log w, summed over the answer's tokens.
        k_pos, lambda_pos: where the advantage is not negative.
        k_neg, lambda_neg: where it is.
    """
    log_w = jnp.clip(sequence_log_ratio, math.log(1e-8), 20.0)
    good = advantages >= 0
    k, rate = jnp.where(good, k_pos, k_neg), jnp.maximum(jnp.where(good, lambda_pos, lambda_neg), 1e-4)
    log_phi = rate + k * log_w - rate * jnp.exp(log_w)
    phi = jnp.nan_to_num(jnp.exp(log_phi), nan=0.0, posinf=0.0, neginf=0.0)
    return -jax.lax.stop_gradient(phi) * advantages * logps


def gmpo(log_ratio: Values, advantages: Values, low: float, high: float) -> Values:
    """A token's log-ratio as GMPO's geometric mean takes it (arXiv 2507.20673): held below `high` where the answer is good,
    above -`low` where it is bad. The answer's loss is -exp(their mean) * advantage."""
    return jnp.where(advantages > 0, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, -low))


def a2po(log_ratio: Values, rewards: Values, optimal_values: Values, beta: float) -> Values:
    """A*-PO (arXiv 2505.20686): the answer's implicit reward is regressed onto its optimal advantage.

    Args:
        log_ratio: log pi - log pi_ref, summed over the answer.
        rewards: of the answer.
        optimal_values: of its prompt, see `optimal_value`.
        beta: strength of the pull towards the reference.
    """
    return jnp.square(beta * log_ratio - (rewards - optimal_values))


def optimal_value(rewards: Float[Array, "... N"], beta: float) -> Values:
    """V* = beta log mean_i exp(r_i / beta) over N answers of the reference to a prompt (A*-PO, arXiv 2505.20686)."""
    return beta * (jax.nn.logsumexp(rewards / beta, axis=-1) - math.log(rewards.shape[-1]))


def kl(logps: Values, reference_logps: Values, estimator: str) -> Values:
    """An estimate per token of KL(policy || reference) from the policy's own tokens (Schulman, "Approximating KL divergence").

    Args:
        estimator: k1 = log p - log q, unbiased; k2 = k1^2 / 2; k3 = q/p - 1 - log q/p, unbiased and never negative.
    """
    difference = reference_logps - logps
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return jnp.square(difference) / 2
        case "k3":
            return jnp.expm1(difference) - difference
    raise ValueError(f"unknown estimator {estimator!r}; there is k1, k2, k3")


KL_ESTIMATORS = ("k1", "k2", "k3")


def value(values: Values, old_values: Values, returns: Values, clip: float | None) -> Values:
    """Half the squared error of the critic; with `clip` the larger of that and of the values held within `clip` of the old ones."""
    squared = jnp.square(values - returns)
    if clip is not None:
        held = jnp.clip(values, old_values - clip, old_values + clip)
        squared = jnp.maximum(squared, jnp.square(held - returns))
    return squared / 2
