"""Losses on pairs of answers, from sequence log-probabilities. Each gives one value per pair.

Throughout, for an answer y to a prompt x:
    log-ratio   h = log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens
    score       f'(pi/pi_ref) of an f-divergence (`f_score`); under reverse KL, the default, it is the log-ratio
    beta > 0    strength of the pull towards the reference
    label_smoothing e in [0, 0.5)  probability that a label is wrong
Arguments named `chosen` and `rejected` may have any shape, the same one; so does the result.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

Values = Float[Array, "..."]


def f_score(logratios: Values, divergence: str = "reverse_kl", alpha: float = 0.5) -> Values:
    """f'(pi/pi_ref) of a log-ratio (f-DPO, arXiv 2309.16240).

    Args:
        logratios: log pi - log pi_ref.
        divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        alpha: of the alpha divergence; at 1 it is the reverse KL.

    Exponents are held below 80, so that everything stays finite in float32.
    """
    match divergence:
        case "forward_kl":
            return -jnp.expm1(jnp.minimum(-logratios, 80.0))
        case "js_divergence":
            return math.log(2) + log_sigmoid(logratios)
        case "alpha_divergence" if abs(alpha - 1) >= 1e-6:
            return jnp.expm1(jnp.minimum((alpha - 1) * logratios, 80.0)) / (alpha - 1)
    return logratios


def sigmoid(chosen: Values, rejected: Values, beta: float, label_smoothing: float = 0.0) -> Values:
    """DPO (arXiv 2305.18290, equation 7), with conservative label smoothing (E. Mitchell, A note on DPO with noisy preferences, 2023).

    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), where h = chosen - rejected.

    TRL's `sigmoid` ignores label smoothing; at label_smoothing=0 the two are equal. On averages per token it is TRL's `sigmoid_norm`,
    on log-probabilities without a reference it is CPO's.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def hinge(chosen: Values, rejected: Values, beta: float) -> Values:
    """SLiC's hinge (arXiv 2305.10425): max(0, 1 - beta h)."""
    return jax.nn.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Values, rejected: Values, beta: float) -> Values:
    """IPO (arXiv 2310.12036, equation 17): (h - 1/(2 beta))^2. TRL's `ipo` takes scores per token, the paper's letter takes sums."""
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def exo_pair(chosen: Values, rejected: Values, beta: float, label_smoothing: float) -> Values:
    """EXO for pairs (arXiv 2402.00856, equation 16): KL((q, 1-q) || (1-e, e)), q = sigmoid(beta h); needs e > 0."""
    margin = beta * (chosen - rejected)
    right = jax.nn.sigmoid(margin) * (log_sigmoid(margin) - math.log1p(-label_smoothing))
    return right + jax.nn.sigmoid(-margin) * (log_sigmoid(-margin) - math.log(label_smoothing))


def nca_pair(chosen: Values, rejected: Values, beta: float) -> Values:
    """NCA for pairs (arXiv 2402.05369)."""
    return -log_sigmoid(beta * chosen) - 0.5 * log_sigmoid(-beta * chosen) - 0.5 * log_sigmoid(-beta * rejected)


def robust(chosen: Values, rejected: Values, beta: float, label_smoothing: float) -> Values:
    """Robust DPO (arXiv 2403.00409): unbiased under labels that are flipped with probability e."""
    margin = beta * (chosen - rejected)
    clean, flipped = -(1 - label_smoothing) * log_sigmoid(margin), -label_smoothing * log_sigmoid(-margin)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def bco_pair(chosen: Values, rejected: Values, beta: float, delta: Float[Array, ""] | float = 0.0) -> Values:
    """BCO on both answers of a pair (arXiv 2404.04656): each told from the reward shift `delta`, 0 in TRL's `bco_pair`."""
    return -log_sigmoid(beta * chosen - delta) - log_sigmoid(-(beta * rejected - delta))


def sppo_hard(chosen: Values, rejected: Values, beta: float) -> Values:
    """SPPO (arXiv 2405.00675, equation 4.7) where the winner wins with probability 1."""
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def aot(values: Values, targets: Values, mask: Bool[Array, "..."], beta: float, label_smoothing: float = 0.0) -> Values:
    """AOT (arXiv 2406.05882): the distribution of `values` is to dominate that of `targets`, quantile by quantile.

    Each value is compared with the target of its own rank in the batch, so the loss is one of the whole batch; what one pair gets here
    belongs to its value.

    Args:
        values: paired AOT: log pi(y_w) - log pi(y_l); unpaired: the chosen log-ratio.
        targets: paired AOT: log pi_ref(y_w) - log pi_ref(y_l); unpaired: the rejected log-ratio.
        mask: which pairs there are; the others take no part and get 0.
        beta, label_smoothing: as in `sigmoid`.
    """
    flat, absent = mask.reshape(-1), jnp.inf  # absent pairs come last in both orders
    rank = jnp.argsort(jnp.argsort(jnp.where(flat, values.reshape(-1), absent)))
    ordered = jnp.sort(jnp.where(flat, targets.reshape(-1), absent))
    ordered = jnp.where(jnp.arange(flat.size) < jnp.sum(flat), ordered, 0)
    opposite = ordered[rank].reshape(mask.shape)
    return jnp.where(mask, sigmoid(jnp.where(mask, values, 0), opposite, beta, label_smoothing), 0)


def apo_zero(chosen: Values, rejected: Values, beta: float) -> Values:
    """APO-zero (arXiv 2408.06266, equation 7): chosen up, rejected down."""
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: Values, rejected: Values, beta: float) -> Values:
    """APO-down (arXiv 2408.06266, equation 8): both down, rejected more."""
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def discopop(chosen: Values, rejected: Values, beta: float, tau: float) -> Values:
    """DiscoPOP (arXiv 2406.08414, equation 5): logistic and exponential loss, blended by w = sigmoid(beta h / tau).

    The product w exp(-beta h) is taken as one exponential: apart, they are 0 and infinite for a pair far on the wrong side.
    """
    margin = beta * (chosen - rejected)
    return -log_sigmoid(margin) * jax.nn.sigmoid(-margin / tau) + jnp.exp(log_sigmoid(margin / tau) - margin)


def wpo_weight(logps: Values, log_sum_p2: Values, lengths: Values) -> Values:
    """How likely the policy itself is to write an answer (arXiv 2406.11827, equation 2), a constant to the gradient.

    Args:
        logps: log-probability of every token, summed over the answer.
        log_sum_p2: log of the sum over the vocabulary of p^2 at every token, summed over the answer.
        lengths: tokens of the answer.
    """
    return jax.lax.stop_gradient(jnp.exp((logps - log_sum_p2) / jnp.maximum(lengths, 1)))


def ld_weights(position: Float[Array, "..."], shared: Float[Array, "..."], alpha: float) -> Float[Array, "..."]:
    """LD-DPO's weight of a token (arXiv 2409.06411): 1 up to the length of the shorter answer, then alpha.

    Args:
        position: 1 for the first token of its answer.
        shared: tokens of the shorter answer of the pair.
        alpha: in [0, 1].
    """
    return jnp.where(position <= shared, 1.0, alpha).astype(position.dtype)


def nash_md(logps: Values, weighted: Values, preferred: Values, beta: float) -> Values:
    """Nash-MD's policy gradient (arXiv 2312.00886, section 7), one half as the baseline, as TRL's.

    Args:
        logps: log pi of the policy's answer, summed over its tokens.
        weighted: the same sum, every token weighted by its log-ratio to the reference, a constant.
        preferred: how likely the answer is preferred to the mixture's.
        beta: strength of the pull towards the reference.
    """
    return beta * weighted - (preferred - 0.5) * logps
