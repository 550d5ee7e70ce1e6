"""Sampling against plain NumPy: which tokens filters leave, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.generation.sampling import Sampling, check, draw, filtered_weights, sample
from aligner.types import UserError
from tests.models import tiny


def kept_by_sorting(logits, top_k=0, top_p=1.0, min_p=0.0):
    """The filters as they are usually written, one after the other."""
    p = np.exp(logits - logits.max())
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    if top_p < 1:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p * p.sum()]] = 0
    return np.where(p >= min_p * p.max(), p, 0)


@pytest.mark.parametrize("filters", [dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2), dict(top_k=40, top_p=0.9, min_p=0.02), dict()], ids=str)
def test_filters_keep_what_sorting_keeps(filters):
    logits = np.random.default_rng(0).normal(0, 2, (6, 333)).astype(np.float32)
    found = np.asarray(filtered_weights(Sampling(**filters), jnp.asarray(logits)))
    wanted = np.stack([kept_by_sorting(row.copy(), **filters) for row in logits])
    assert ((found > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_draws_follow_the_distribution(size):
    """Chi-square of 200 000 draws; its mean is the degrees of freedom, five standard deviations above it never happen."""
    rng = np.random.default_rng(size)
    weights = rng.exponential(size=size).astype(np.float32)
    weights[rng.random(size) < 0.3] = 0
    draws = 200_000
    uniform = jax.random.uniform(jax.random.key(1), (draws,))
    one = lambda u: draw(jnp.asarray(weights)[None], u[None])[0]
    every = jax.jit(lambda uniform: jax.lax.map(one, uniform, batch_size=4096), compiler_options=tiny.FULL)  # so many want it fast
    tokens = np.asarray(every(uniform))
    counts = np.bincount(tokens, minlength=size)
    expected = draws * weights / weights.sum()
    assert (counts[weights == 0] == 0).all()
    held = expected > 0
    chi = ((counts[held] - expected[held]) ** 2 / expected[held]).sum()
    freedom = held.sum() - 1
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_draw_never_lands_where_there_is_no_weight():
    weights = np.zeros((3, 300), np.float32)
    weights[0, 7], weights[1, [0, 299]], weights[2, 128] = 1e-30, 1, 1
    for uniform in (0.0, np.float32(1) - np.float32(2**-24), 0.5):
        tokens = np.asarray(draw(jnp.asarray(weights), jnp.full(3, uniform)))
        assert (weights[np.arange(3), tokens] > 0).all()


def test_logps_are_the_models_at_the_temperature_whatever_the_filters():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 50)), jnp.float32)
    sampling = Sampling(temperature=0.7, top_k=3, repetition_penalty=1.5)
    tokens, logps = sample(sampling, logits, jnp.array([0.1, 0.5, 0.7, 0.9]), jnp.ones((4, 50), bool))
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits / 0.7)[jnp.arange(4), tokens], rtol=1e-5)


def test_repetition_penalty_turns_the_model_away_from_what_stands_there():
    logits = jnp.array([[2.0, 1.9, -1.0], [-0.1, -0.2, -3.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    tokens, _ = sample(Sampling(temperature=0, repetition_penalty=3.0), logits, jnp.zeros(2), seen)
    assert tokens.tolist() == [1, 1]


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(top_p=0.0), dict(top_k=-2), dict(min_p=2.0), dict(max_new_tokens=0)], ids=str)
def test_a_setting_without_sense_is_refused_by_name(wrong):
    with pytest.raises(UserError, match=f"config.generation.{next(iter(wrong))} is"):
        check(Sampling(**wrong))
