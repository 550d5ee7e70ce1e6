"""Losses of reward and cost models against float64 NumPy, written from the papers: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.losses import reward

BAR = 1e-10
RNG = np.random.default_rng(0)


def log1pexp(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    return np.exp(-log1pexp(-x))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def cases(*shape):
    """Ordinary scores, ties, and ones far out."""
    ordinary = RNG.normal(0, 2, shape)
    return [ordinary, np.zeros(shape), 300 * np.sign(ordinary), np.round(ordinary)]


def test_bradley_terry():
    for r in cases(7, 2):
        margin = RNG.normal(0, 1, 7)
        found, gradient = jax.vjp(lambda r, margin=margin: reward.bradley_terry(r[:, 0], r[:, 1], margin), jnp.asarray(r))
        z = r[:, 0] - r[:, 1] - margin
        np.testing.assert_allclose(found, log1pexp(-z), rtol=BAR, atol=BAR)
        slope = -sigmoid(-z)
        np.testing.assert_allclose(gradient(jnp.ones(7))[0], np.stack([slope, -slope], 1), rtol=BAR, atol=BAR)


@pytest.mark.parametrize("answers", [2, 3, 5])
def test_plackett_luce_of_ragged_lists(answers):
    for r in cases(6, answers):
        present = np.arange(answers) < np.array([answers, 2, 1, 0, answers - 1, answers])[:, None]
        present[5] = RNG.permutation(present[4])  # absent ones may stand anywhere
        expected, slope = np.zeros(6), np.zeros_like(r)
        for row in range(6):
            places = np.flatnonzero(present[row])
            s = r[row, places]
            for i in range(len(s)):
                top = s[i:].max()
                lse = top + np.log(np.exp(s[i:] - top).sum())
                expected[row] -= s[i] - lse
                slope[row, places[i]] -= 1
                slope[row, places[i:]] += np.exp(s[i:] - lse)
        found, gradient = jax.vjp(lambda r, present=present: reward.plackett_luce(r, present), jnp.asarray(r))
        np.testing.assert_allclose(found, expected, rtol=BAR, atol=BAR)
        np.testing.assert_allclose(gradient(jnp.ones(6))[0], slope, rtol=BAR, atol=BAR)


def test_plackett_luce_of_two_is_bradley_terry():
    r = jnp.asarray(RNG.normal(0, 3, (9, 2)))
    np.testing.assert_allclose(reward.plackett_luce(r, jnp.ones((9, 2), bool)), reward.bradley_terry(r[:, 0], r[:, 1]), rtol=BAR)


def test_squared_error_and_center():
    r, target = RNG.normal(0, 2, (2, 5, 3))
    present = RNG.random((5, 3)) < 0.7
    found, gradient = jax.vjp(lambda r: reward.squared_error(r, jnp.asarray(target)), jnp.asarray(r))
    np.testing.assert_allclose(found, (r - target) ** 2, rtol=BAR)
    np.testing.assert_allclose(gradient(jnp.ones((5, 3)))[0], 2 * (r - target), rtol=BAR)
    found, gradient = jax.vjp(lambda r: reward.center(r, jnp.asarray(present)), jnp.asarray(r))
    total = (r * present).sum(-1)
    np.testing.assert_allclose(found, total**2, rtol=BAR)
    np.testing.assert_allclose(gradient(jnp.ones(5))[0], 2 * total[:, None] * present, rtol=BAR)


def test_safety_sign():
    for c in cases(8):
        safe = np.where(np.arange(8) % 2, 1, -1)
        found, gradient = jax.vjp(lambda c, safe=safe: reward.safety_sign(c, safe), jnp.asarray(c))
        np.testing.assert_allclose(found, log1pexp(safe * c), rtol=BAR, atol=BAR)  # a safe answer's cost belongs below zero
        np.testing.assert_allclose(gradient(jnp.ones(8))[0], safe * sigmoid(safe * c), rtol=BAR, atol=BAR)
