"""Losses of one's own answers against float64 NumPy written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.losses import policy_gradient as pg

RNG = np.random.default_rng(0)
LOG_RATIO, ADVANTAGES, LOGPS = RNG.normal(0, 0.4, 200), RNG.normal(0, 1, 200), -RNG.gamma(2, 1, 200)
RATIO = np.exp(LOG_RATIO)


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-10, atol=1e-14)


def surrogate(a, r, low, high, delta=None, dual=None):
    loss = max(-(r if delta is None else min(r, delta)) * a, -min(max(r, 1 - low), 1 + high) * a)
    return min(loss, -dual * a) if dual is not None and a < 0 else loss


@pytest.mark.parametrize("more", [{}, dict(delta=1.3), dict(dual=1.5), dict(delta=2.0, dual=1.2)], ids=str)
def test_clipped(more):
    with jax.enable_x64(True):
        close(pg.clipped(LOG_RATIO, ADVANTAGES, 0.1, 0.3, **more), [surrogate(a, r, 0.1, 0.3, **more) for a, r in zip(ADVANTAGES, RATIO)])


def test_cispo_sapo_vespo():
    with jax.enable_x64(True):
        close(pg.cispo(LOG_RATIO, LOGPS, ADVANTAGES, 1.2), -np.minimum(RATIO, 1.2) * ADVANTAGES * LOGPS)
        t = np.where(ADVANTAGES > 0, 0.9, 1.4)
        close(pg.sapo(LOG_RATIO, ADVANTAGES, 0.9, 1.4), -4 / t / (1 + np.exp(-t * (RATIO - 1))) * ADVANTAGES)
        k, rate = np.where(ADVANTAGES >= 0, 2.0, 3.0), np.where(ADVANTAGES >= 0, 3.0, 2.0)
        close(pg.vespo(LOG_RATIO, LOGPS, ADVANTAGES), -np.exp(rate) * RATIO**k * np.exp(-rate * RATIO) * ADVANTAGES * LOGPS)


def test_kl_estimators_and_that_k1_and_k3_are_unbiased():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    exact = np.sum(p * np.log(p / q))
    with jax.enable_x64(True):
        values = {name: np.asarray(pg.kl(jnp.log(p), jnp.log(q), name)) for name in pg.KL_ESTIMATORS}
    close(values["k1"], np.log(p / q))
    close(values["k2"], np.log(p / q) ** 2 / 2)
    close(values["k3"], q / p - 1 - np.log(q / p))
    for name in ("k1", "k3"):
        assert np.sum(p * values[name]) == pytest.approx(exact)


def test_value_loss_takes_the_worse_of_the_two():
    values, old, returns = RNG.normal(size=(3, 100))
    held = np.clip(values, old - 0.2, old + 0.2)
    with jax.enable_x64(True):
        close(pg.value(values, old, returns, 0.2), np.maximum((values - returns) ** 2, (held - returns) ** 2) / 2)
        close(pg.value(values, old, returns, None), (values - returns) ** 2 / 2)


def test_nothing_but_the_policy_gets_a_gradient():
    for loss in (lambda x: pg.cispo(x, jnp.zeros(()), 1.0, 5.0), lambda x: pg.vespo(x, jnp.asarray(-1.0), 1.0)):
        assert jax.grad(loss)(0.3) == 0
