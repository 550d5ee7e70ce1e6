"""Losses on single answers that are labelled good or bad, from log-ratios h = log pi(y|x) - log pi_ref(y|x) summed over tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def kl_estimate(logratios: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """KTO's reference point (arXiv 2402.01306): the mean log-ratio of answers to other prompts over the whole batch, at
    least 0; a constant to the gradient.

    Args:
        logratios: log pi(y'|x) - log pi_ref(y'|x) of the mismatched answer of every example.
        mask: which examples there are.
    """
    mean = jnp.sum(jnp.where(mask, logratios, 0)) / jnp.maximum(jnp.sum(mask), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def kto(logratios: Float[Array, "..."], label: Bool[Array, "..."], kl: Float[Array, ""], beta: float) -> Float[Array, "..."]:
    """KTO (arXiv 2402.01306, equation 7) without its weights: 1 - sigmoid(beta (h - kl)) for a good answer, 1 - sigmoid(beta (kl - h))
    for a bad one."""
    return jax.nn.sigmoid(jnp.where(label, -1.0, 1.0) * beta * (logratios - kl))


def apo_zero_unpaired(logratios: Float[Array, "..."], label: Bool[Array, "..."], beta: float) -> Float[Array, "..."]:
    """APO-zero of one answer (arXiv 2408.06266, equation 7): KTO with its reference point at 0."""
    return kto(logratios, label, jnp.zeros((), logratios.dtype), beta)


def bco(logratios: Float[Array, "..."], label: Bool[Array, "..."], delta: Float[Array, ""], beta: float) -> Float[Array, "..."]:
    """BCO (arXiv 2404.04656): -log sigmoid(beta h - delta) for a good answer, -log sigmoid(delta - beta h) for a bad one."""
    return -jax.nn.log_sigmoid(jnp.where(label, 1.0, -1.0) * (beta * logratios - delta))


def running_mean(
    mean: Float[Array, ""], count: Float[Array, ""], values: Float[Array, "..."], mask: Bool[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(mean, count) of all values seen so far, those of this batch included; constants to the gradient.

    Args:
        mean, count: of the batches before; 0 and 0 at the start.
        values: BCO's rewards, beta * log-ratio.
        mask: which of them there are.
    """
    here = jnp.sum(mask).astype(count.dtype)
    total = count + here
    change = jnp.sum(jnp.where(mask, values - mean, 0)) / jnp.maximum(total, 1)
    return jax.lax.stop_gradient((mean + change).astype(mean.dtype)), total
