"""Every loss against its paper's equation in NumPy, float64: value and gradient.

The reference's gradient is exact too: f is analytic, so d f(x)/dx = Im f(x + ih) / h with h far below rounding (complex step).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.losses import preference, reference_free, reward, unpaired

BAR = 1e-10
N = 9
BETA, E, TAU, GAMMA, ALPHA = 0.3, 0.1, 0.7, 0.5, 0.4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ls(x):
    """log sigmoid, written so that it keeps its digits where x is far below 0."""
    return np.where(x.real > 0, -np.log1p(np.exp(-np.where(x.real > 0, x, 0))), x - np.log1p(np.exp(np.where(x.real > 0, 0, x))))


def smoothed(margin):
    return -(1 - E) * ls(margin) - E * ls(-margin)


def by_real(x):
    """Ascending order of a complex-stepped array."""
    return x[np.argsort(x.real, kind="stable")]


def paper_aot(values, targets):
    """The loss of quantile i, at the place of the value that is quantile i."""
    order = np.argsort(values.real, kind="stable")
    losses = np.empty_like(values)
    losses[order] = smoothed(BETA * (values[order] - by_real(targets)))
    return losses


def paper_plackett_luce(*rewards):
    total = 0
    for k in range(len(rewards) - 1):
        total = total - np.log(np.exp(rewards[k]) / sum(np.exp(r) for r in rewards[k:]))
    return total


def odds(logp):
    return np.exp(logp) / (1 - np.exp(logp))


def margin(c, r):
    return BETA * (c - r)


def exo(c, r):
    q, p = sigmoid(margin(c, r)), 1 - E
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def kto_pairs(c, r):
    """Good answers `c` and bad ones `r`, reference point 0.2."""
    return (1 - sigmoid(BETA * (c - 0.2))) + (1 - sigmoid(BETA * (0.2 - r)))


def both(loss: Callable) -> Callable:
    """A loss of labelled answers as one of (good, bad)."""
    label = lambda x, value: jnp.full(x.shape, value)
    return lambda c, r: loss(c, label(c, True)) + loss(r, label(r, False))


MASK = np.ones(N, bool)
# name -> (ours, the paper's); both take (chosen, rejected)
CASES = {
    "sigmoid": (lambda c, r: preference.sigmoid(c, r, BETA), lambda c, r: -ls(margin(c, r))),
    "sigmoid, smoothed": (lambda c, r: preference.sigmoid(c, r, BETA, E), lambda c, r: smoothed(margin(c, r))),
    "hinge": (lambda c, r: preference.hinge(c, r, BETA), lambda c, r: np.where((1 - margin(c, r)).real > 0, 1 - margin(c, r), 0)),
    "ipo": (lambda c, r: preference.ipo(c, r, BETA), lambda c, r: (c - r - 1 / (2 * BETA)) ** 2),
    "exo_pair": (lambda c, r: preference.exo_pair(c, r, BETA, E), exo),
    "nca_pair": (
        lambda c, r: preference.nca_pair(c, r, BETA), lambda c, r: -ls(BETA * c) - (ls(-BETA * c) + ls(-BETA * r)) / 2,
    ),
    "robust": (
        lambda c, r: preference.robust(c, r, BETA, E), lambda c, r: (-(1 - E) * ls(margin(c, r)) + E * ls(-margin(c, r))) / (1 - 2 * E),
    ),
    "bco_pair": (lambda c, r: preference.bco_pair(c, r, BETA), lambda c, r: -ls(BETA * c) - ls(-BETA * r)),
    "bco_pair, shifted": (
        lambda c, r: preference.bco_pair(c, r, BETA, 0.7), lambda c, r: -ls(BETA * c - 0.7) - ls(-(BETA * r - 0.7)),
    ),
    "sppo_hard": (
        lambda c, r: preference.sppo_hard(c, r, BETA), lambda c, r: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    ),
    "aot": (lambda c, r: preference.aot(c, r, MASK, BETA, E), paper_aot),
    "apo_zero": (lambda c, r: preference.apo_zero(c, r, BETA), lambda c, r: 1 - sigmoid(BETA * c) + sigmoid(BETA * r)),
    "apo_down": (lambda c, r: preference.apo_down(c, r, BETA), lambda c, r: sigmoid(BETA * c) + 1 - sigmoid(margin(c, r))),
    "discopop": (
        lambda c, r: preference.discopop(c, r, BETA, TAU),
        lambda c, r: -ls(margin(c, r)) * (1 - sigmoid(margin(c, r) / TAU)) + np.exp(-margin(c, r)) * sigmoid(margin(c, r) / TAU),
    ),
    "forward_kl": (lambda c, r: preference.f_score(c - r, "forward_kl"), lambda c, r: 1 - np.exp(-(c - r))),
    "js_divergence": (
        lambda c, r: preference.f_score(c - r, "js_divergence"), lambda c, r: np.log(2 * np.exp(c - r) / (np.exp(c - r) + 1)),
    ),
    "alpha_divergence": (
        lambda c, r: preference.f_score(c - r, "alpha_divergence", ALPHA),
        lambda c, r: (np.exp(c - r) ** (ALPHA - 1) - 1) / (ALPHA - 1),
    ),
    "alpha_divergence at 1": (lambda c, r: preference.f_score(c - r, "alpha_divergence", 1.0), lambda c, r: c - r),
    "plackett_luce of 2": (
        lambda c, r: reward.plackett_luce(jnp.stack([c, r], -1), np.ones((N, 2), bool)), lambda c, r: -ls(c - r),
    ),
    "plackett_luce of 4": (
        lambda c, r: reward.plackett_luce(jnp.stack([c, r, -c, r / 2], -1), np.ones((N, 4), bool)),
        lambda c, r: paper_plackett_luce(c, r, -c, r / 2),
    ),
    "plackett_luce, one absent": (
        lambda c, r: reward.plackett_luce(jnp.stack([c, 9 * c, r, -c], -1), np.array([[True, False, True, True]] * N)),
        lambda c, r: paper_plackett_luce(c, r, -c),
    ),
    "kto": (both(lambda h, label: unpaired.kto(h, label, 0.2, BETA)), kto_pairs),
    "apo_zero_unpaired": (
        both(lambda h, label: unpaired.apo_zero_unpaired(h, label, BETA)), lambda c, r: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    ),
    "bco": (both(lambda h, label: unpaired.bco(h, label, 0.3, BETA)), lambda c, r: -ls(BETA * c - 0.3) - ls(0.3 - BETA * r)),
    "simpo": (lambda c, r: reference_free.simpo(c, r, BETA, GAMMA, E), lambda c, r: smoothed(BETA * (c - r) - GAMMA)),
}  # fmt: skip
# of log-probabilities per token, which are below 0
NEGATIVE = {
    "orpo": (reference_free.odds_ratio, lambda c, r: -ls(np.log(odds(c) / odds(r)))),
    "log odds": (reference_free.log_odds_ratio, lambda c, r: np.log(odds(c) / odds(r))),
    "alphapo": (
        lambda c, r: reference_free.alpha_reward(c, ALPHA) - reference_free.alpha_reward(r, ALPHA),
        lambda c, r: ((1 - np.exp(c) ** -ALPHA) - (1 - np.exp(r) ** -ALPHA)) / ALPHA,
    ),
    "alphapo at 0": (lambda c, r: reference_free.alpha_reward(c, 0.0) - r, lambda c, r: c - r),
}  # fmt: skip


def inputs(negative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Near 0, on both sides and far out."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 4, (2, N))
    chosen[:3], rejected[:3] = [1e-3, 30.0, -30.0], [-2e-3, -4.0, 3.0]
    return (-np.abs(chosen) / 3 - 1e-3, -np.abs(rejected) / 3 - 1e-3) if negative else (chosen, rejected)


def close(found, expected) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == np.float64 and np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= BAR * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", [*CASES, *NEGATIVE])
def test_value_and_gradient(name):
    ours, paper = {**CASES, **NEGATIVE}[name]
    chosen, rejected = inputs(name in NEGATIVE)
    with jax.enable_x64(True):
        value, gradients = jax.value_and_grad(lambda c, r: jnp.sum(ours(c, r)), (0, 1))(jnp.asarray(chosen), jnp.asarray(rejected))
        close(ours(jnp.asarray(chosen), jnp.asarray(rejected)), paper(chosen + 0j, rejected + 0j).real)
    step = 1e-40
    complex_step = lambda c, r: [np.imag(np.sum(paper(*x))) / step for x in zip(c, r)]
    eye = np.eye(N) * 1j * step
    close(value, np.sum(paper(chosen + 0j, rejected + 0j).real))
    close(gradients[0], complex_step(chosen + eye, [rejected + 0j] * N))
    close(gradients[1], complex_step([chosen + 0j] * N, rejected + eye))


def test_aot_of_some_pairs_is_aot_of_those_alone():
    chosen, rejected = inputs(False)
    mask = np.arange(N) % 3 != 1
    wild = lambda x: jnp.asarray(np.where(mask, x, np.nan))  # what stands where there is no pair must not matter
    with jax.enable_x64(True):
        value = lambda c, r, m: jnp.sum(preference.aot(c, r, m, BETA))
        found, gradients = jax.value_and_grad(value, (0, 1))(wild(chosen), wild(rejected), jnp.asarray(mask))
        alone, expected = jax.value_and_grad(value, (0, 1))(*map(jnp.asarray, (chosen[mask], rejected[mask], mask[mask])))
        close(found, alone)
        for ours, theirs in zip(gradients, expected):
            close(np.asarray(ours)[mask], theirs)
            assert not np.asarray(ours)[~mask].any()


def test_kl_is_a_clamped_mean_without_gradient():
    logratios, mask = jnp.array([0.5, 9.0, -0.1]), jnp.array([True, False, True])
    assert unpaired.kl_estimate(logratios, mask) == pytest.approx(0.2)
    assert unpaired.kl_estimate(-logratios, mask) == 0
    assert not jax.grad(lambda x: unpaired.kl_estimate(x, mask))(logratios).any()


def test_running_mean_is_that_of_all_values():
    rng = np.random.default_rng(3)
    mean = count = jnp.zeros(())
    seen = []
    for size in (3, 8, 1):
        values, mask = rng.normal(2, 5, size), rng.random(size) < 0.7
        seen.extend(values[mask])
        mean, count = unpaired.running_mean(mean, count, jnp.asarray(values), jnp.asarray(mask))
    assert count == len(seen)
    assert mean == pytest.approx(np.mean(seen), rel=1e-5)
    assert not jax.grad(lambda x: unpaired.running_mean(mean, count, x, x == x)[0])(jnp.ones(2)).any()


def test_wpo_weight_is_a_probability_ratio_without_gradient():
    """Where the policy puts all on one token, p^2 sums to 1 and the weight is the likelihood per token."""
    p = np.array([0.5, 0.25])
    weight = preference.wpo_weight(jnp.log(p).sum(), jnp.log(p**2 + (1 - p) ** 2).sum(), jnp.float32(2))
    assert weight == pytest.approx(np.sqrt(np.prod(p / (p**2 + (1 - p) ** 2))), rel=1e-5)
    assert jax.grad(lambda x: preference.wpo_weight(x, x, jnp.float32(1)))(1.0) == 0


@pytest.mark.parametrize("name", [*CASES, *NEGATIVE])
def test_far_out_nothing_overflows(name):
    """Values of a policy gone astray: finite in float32, gradients too."""
    ours = {**CASES, **NEGATIVE}[name][0]
    chosen = jnp.tile(jnp.array([0.0, -1e-9, -60.0], jnp.float32), N // 3)
    rejected = jnp.tile(jnp.array([0.0, -60.0, -1e-9], jnp.float32), N // 3)
    value, gradients = jax.value_and_grad(lambda c, r: jnp.sum(ours(c, r)), (0, 1))(chosen, rejected)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
