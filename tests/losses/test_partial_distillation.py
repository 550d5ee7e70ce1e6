"""Distillation from parts of a teacher against NumPy written from the papers, float64: value, and gradient by complex step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.losses import partial_distillation as partial
from aligner.losses import policy_gradient
from tests.everyday import everyday
from tests.models import tiny

BAR = 1e-10
T, V, W = 6, 7, 9  # tokens of an answer, words of the student and of another vocabulary
RNG = np.random.default_rng(0)
LOGITS, TEACHER, OTHER = RNG.normal(0, 2, (T, V)), RNG.normal(0, 2, (T, V)), RNG.normal(0, 2, (T - 1, W))
TOKEN, OLD = RNG.integers(0, V, T), -RNG.gamma(2, 1, T)
HERE = np.arange(T)
STEP = 1e-40


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def log_q():
    return np.log(softmax(TEACHER))


def top(x, k):
    """Ids of the k largest of a position."""
    return [int(i) for i in np.argsort(-x.real, kind="stable")[:k]]


def jsd(p, q, beta):
    """Equation 1 of arXiv 2306.13649 over whatever sums of probabilities p and q are."""
    kl = lambda a, b: sum(x * np.log(x / y) for x, y in zip(a, b))
    if beta in (0, 1):
        return kl(q, p) if beta == 0 else kl(p, q)
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def few(z, beta, k, of, tail):
    total = 0
    for p, q in zip(softmax(z), softmax(TEACHER)):
        chosen = sorted({*(top(p, k) if of != "teacher" else []), *(top(q, k) if of != "student" else [])})
        a, b = [p[i] for i in chosen], [q[i] for i in chosen]
        if tail:
            a, b = [*a, 1 - sum(a)], [*b, 1 - sum(b)]
        else:
            a, b = [x / sum(a) for x in a], [x / sum(b) for x in b]
        total = total + jsd(a, b, beta)
    return total


def iw_opd(z, gamma):
    """-w a log p with a = log q - log p_old, w = 1 + gamma (1 - sum_{s<t} |a_s| / sum_s |a_s|)."""
    a = log_q()[HERE, TOKEN] - OLD
    weight = [1 + gamma * (1 - np.abs(a[:t]).sum() / np.abs(a).sum()) for t in range(T)]
    return -sum(w * x * np.log(softmax(z)[t, TOKEN[t]]) for t, (w, x) in enumerate(zip(weight, a)))


def modulus(x):
    """|x|, analytic off 0."""
    return np.where(x.real < 0, -x, x)


def sorted_distance(p, q):
    q = np.concatenate([q, np.zeros((len(q), p.shape[1] - q.shape[1]))], 1) if p.shape[1] > q.shape[1] else q
    p = np.concatenate([p, np.zeros((len(p), q.shape[1] - p.shape[1]))], 1)
    down = lambda x: x[np.argsort(-x.real, kind="stable")]
    return sum(modulus(down(a) - down(b)).sum() for a, b in zip(p, q))


OURS, THEIRS = np.array([0, 2, 5]), np.array([8, 1, 3])


def hybrid(z, beta, weights):
    p, q = softmax(z)[: T - 1], softmax(OTHER)
    known = sum(jsd(a, b, beta) for a, b in zip(p[:, OURS], q[:, THEIRS]))
    rest = sorted_distance(np.delete(p, OURS, 1), np.delete(q, THEIRS, 1))
    shared, other = weights or (3 / W, 1 - 3 / W)
    return shared * known + other * rest


GROUP = np.array([0, 0, 1, 2, 2, 2])


def merged(z, last):
    p = softmax(z)
    made = []
    for group in range(3):
        places = np.flatnonzero(group == GROUP)
        keep = places[-1 if last else 0]
        made.append(p[keep] * np.prod([p[t, TOKEN[t]] for t in places if t != keep]))
    return sum(i * row @ np.arange(V) for i, row in enumerate(made, 1))


def ours_few(z, beta, k, of, tail):
    log_p = jax.nn.log_softmax(z)
    return partial.few_tokens_jsd(log_p, log_q(), partial.likeliest(log_p, log_q(), k, of), beta, tail)


def ours_iw_opd(z, gamma):
    a = log_q()[HERE, TOKEN] - OLD
    size = np.abs(a)
    weight = partial.iw_opd_weight(np.cumsum(size) - size, np.full(T, size.sum()), gamma)
    return partial.iw_opd(jax.nn.log_softmax(z)[HERE, TOKEN], a, weight)


def ours_merged(z, last):
    p = jax.nn.softmax(z)
    return (partial.merge_tokens(p, p[HERE, TOKEN], jnp.asarray(GROUP), 3, last) @ jnp.arange(V)) * jnp.arange(1, 4)


def shortened(z):
    return jax.nn.softmax(z)[: T - 1]


CASES = {f"{k} tokens of {of}, beta {beta}, tail {tail}": (
    lambda z, a=(beta, k, of, tail): ours_few(z, *a), lambda z, a=(beta, k, of, tail): few(z, *a))
    for beta, k, of, tail in ((0.0, 3, "teacher", True), (0.4, 2, "both", True), (1.0, 3, "student", True), (0.5, 3, "both", False))
}  # fmt: skip
CASES |= {
    "iw_opd": (lambda z: ours_iw_opd(z, 0.7), lambda z: iw_opd(z, 0.7)),
    "uld": (lambda z: partial.uld(shortened(z), jax.nn.softmax(OTHER)), lambda z: sorted_distance(softmax(z)[: T - 1], softmax(OTHER))),
    "uld, other way round": (
        lambda z: partial.uld(jnp.pad(shortened(z), ((0, 0), (0, 5))), jax.nn.softmax(OTHER)),
        lambda z: sorted_distance(np.pad(softmax(z)[: T - 1], ((0, 0), (0, 5))), softmax(OTHER)),
    ),
    "hybrid": (lambda z: partial.hybrid_uld(shortened(z), jax.nn.softmax(OTHER), OURS, THEIRS, 0.3), lambda z: hybrid(z, 0.3, None)),
    "hybrid, weights": (
        lambda z: partial.hybrid_uld(shortened(z), jax.nn.softmax(OTHER), OURS, THEIRS, 1.0, (0.2, 3.0)), lambda z: hybrid(z, 1.0, (0.2, 3.0)),
    ),
    "merged at the first": (lambda z: ours_merged(z, False), lambda z: merged(z, False)),
    "merged at the last": (lambda z: ours_merged(z, True), lambda z: merged(z, True)),
    "gmpo": (
        lambda z: jnp.exp(jnp.mean(policy_gradient.gmpo(z, jnp.asarray(TEACHER), 0.4, 0.3), axis=1)),
        lambda z: np.prod(
            np.where(TEACHER > 0, np.where(z.real > 0.3, np.exp(0.3), np.exp(z)), np.where(z.real < -0.4, np.exp(-0.4), np.exp(z))) ** (1 / V),
            axis=1,
        ).sum(),
    ),
    "a2po": (
        lambda z: policy_gradient.a2po(z.sum(1), jnp.ones(T), policy_gradient.optimal_value(jnp.asarray(TEACHER), 0.6), 0.05),
        lambda z: ((0.05 * z.sum(1) - (1 - 0.6 * np.log(np.mean(np.exp(TEACHER / 0.6), axis=1)))) ** 2).sum(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", everyday(CASES, "iw_opd", "hybrid", "merged at the first", "gmpo", "a2po"))
def test_value_and_gradient(name):
    ours, paper = CASES[name]
    with jax.enable_x64(True):
        value, gradient = tiny.quick(jax.value_and_grad(lambda z: jnp.sum(ours(z))))(jnp.asarray(LOGITS))
    assert value.dtype == np.float64
    expected = np.sum(paper(LOGITS + 0j)).real
    assert abs(float(value) - expected) <= BAR * max(1, abs(expected))
    slope = np.zeros_like(LOGITS)
    for place in np.ndindex(LOGITS.shape):
        stepped = LOGITS + 0j
        stepped[place] += STEP * 1j
        slope[place] = np.imag(np.sum(paper(stepped))) / STEP
    assert np.abs(slope).max() > 1e-3
    assert np.abs(np.asarray(gradient) - slope).max() <= BAR * max(1, np.abs(slope).max())


def test_all_tokens_are_the_whole_divergence():
    with jax.enable_x64(True):
        whole = [jsd(p, q, 0.5) for p, q in zip(softmax(LOGITS), softmax(TEACHER))]
        np.testing.assert_allclose(ours_few(jnp.asarray(LOGITS), 0.5, V, "student", False), whole, rtol=1e-12)


@pytest.mark.slow
def test_the_sampled_reverse_kl_has_the_gradient_of_the_whole_in_expectation():
    with jax.enable_x64(True):
        weight = softmax(LOGITS[0])
        one = lambda z, i: partial.sampled_reverse_kl(jax.nn.log_softmax(z)[i], log_q()[0, i])
        mean = sum(w * jax.grad(one)(jnp.asarray(LOGITS[0]), i) for i, w in enumerate(weight))
        whole = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - log_q()[0])))(jnp.asarray(LOGITS[0]))
        np.testing.assert_allclose(mean, whole, atol=1e-12)


def test_weights_are_constants_and_held():
    assert partial.importance(jnp.float32(0.3), jnp.float32(0.0), 1.1) == np.float32(1.1)
    assert partial.importance(jnp.float32(-90.0), jnp.float32(0.0), 1.1) == pytest.approx(np.exp(-20), rel=1e-5)
    assert jax.grad(lambda x: partial.importance(x, 0.0, 2.0))(0.3) == 0
    assert jax.grad(lambda x: partial.iw_opd(-1.0, x, x))(0.3) == 0


@pytest.mark.parametrize("of", everyday(partial.SUPPORTS, "both"))
def test_far_out_nothing_overflows(of):
    far = jnp.array([[0.0, -200.0, -200.0], [300.0, -300.0, 0.0]], jnp.float32)

    def loss(z):
        log_p, q = jax.nn.log_softmax(z), jax.nn.log_softmax(-z)
        return jnp.sum(partial.few_tokens_jsd(log_p, q, partial.likeliest(log_p, q, 1, of), 0.5))

    value, gradient = tiny.quick(jax.value_and_grad(loss))(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()
