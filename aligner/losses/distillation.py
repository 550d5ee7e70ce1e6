"""The generalised Jensen-Shannon divergence of a student from a teacher (arXiv 2306.13649, equation 1), and its gradient.

With student p, teacher q and m = beta q + (1 - beta) p:

    beta KL(q || m) + (1 - beta) KL(p || m),     KL(q || p) at beta = 0 (forward),     KL(p || q) at beta = 1 (reverse)

`aligner.logprobs.divergence` calls these on a chunk of positions at a time.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def generalized_jsd(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"], beta: float) -> Float[Array, "..."]:
    """The divergence at each position.

    Args:
        log_p, log_q: log-probabilities of student and teacher.
        beta: in [0, 1].
    """
    if beta == 0:
        return _kl(log_q, log_p)
    if beta == 1:
        return _kl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def generalized_jsd_gradient(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"], beta: float) -> Float[Array, "... V"]:
    """Its gradient by the logits of which `log_p` is the log-softmax: w p (log p/m - KL(p || m)), where w = 1 - beta.

    The mixture's own dependence on p drops out, as its terms sum to a constant. At beta = 1 the same holds with m = q and w = 1.
    """
    p = jnp.exp(log_p)
    if beta == 0:
        return p - jnp.exp(log_q)
    weight, log_m = (1, log_q) if beta == 1 else (1 - beta, _log_mixture(log_p, log_q, beta))
    return weight * p * (log_p - log_m - _kl(log_p, log_m)[..., None])


def _log_mixture(log_p, log_q, beta):
    return jnp.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _kl(log_a, log_b):
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
