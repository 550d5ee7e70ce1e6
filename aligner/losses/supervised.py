"""Losses on the tokens that are imitated, from their log-probabilities. Each is a token's; the mean is taken over all scored tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def nll(logp: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log p(token): cross-entropy."""
    return -logp


def dft(logp: Float[Array, "..."]) -> Float[Array, "..."]:
    """-sg(p) log p: dynamic fine-tuning (arXiv 2508.05629, equation 9), which undoes the 1/p in the gradient of cross-entropy."""
    return -jax.lax.stop_gradient(jnp.exp(logp)) * logp


LOSSES = {"nll": nll, "dft": dft}
