"""Losses on pairs against the paper's formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.losses import preference


def logistic(x):
    return 1 / (1 + np.exp(-x))


def reference(chosen, rejected, beta, smoothing):
    """Equation 7 of arXiv 2305.18290, the labels flipped with probability `smoothing`, and its derivative by the chosen log-ratio."""
    h = beta * (chosen - rejected)
    loss = -(1 - smoothing) * np.log(logistic(h)) - smoothing * np.log(logistic(-h))
    return loss, beta * (-(1 - smoothing) * logistic(-h) + smoothing * logistic(h))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_sigmoid(beta, smoothing):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 8, (2, 50))
    with jax.enable_x64(True):
        loss, pull = jax.vjp(lambda c, r: preference.sigmoid(c, r, beta, smoothing), jnp.asarray(chosen), jnp.asarray(rejected))
        by_chosen, by_rejected = pull(jnp.ones(50))
    expected, gradient = reference(chosen, rejected, beta, smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(by_chosen, gradient, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(by_rejected, -gradient, rtol=1e-10, atol=1e-10)


def test_sigmoid_of_equal_models_is_log_two():
    found = preference.sigmoid(jnp.full((2, 3), -7.5), jnp.full((2, 3), -7.5), 0.1, 0.2)
    np.testing.assert_allclose(found, np.full((2, 3), np.log(2)), rtol=1e-7)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_sigmoid_stays_finite_far_out(far):
    loss, gradient = jax.value_and_grad(lambda h: preference.sigmoid(h, 0.0, 1.0, 0.1))(jnp.float32(far))
    np.testing.assert_allclose(loss, (0.1 if far > 0 else 0.9) * abs(far), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.1 if far > 0 else -0.9, rtol=1e-6)
