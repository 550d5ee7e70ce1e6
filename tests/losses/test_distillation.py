"""Divergences from hidden states, in chunks, against dense float64 NumPy; and how little memory they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.logprobs import divergence
from aligner.types import Head
from tests.models import tiny

BAR = 1e-10
B, S, D, E, V = 2, 7, 5, 4, 11
BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(student, teacher, beta, temperature):
    """(divergence, its gradient by the student's logits): equation 1 of arXiv 2306.13649, differentiated by p and then by softmax."""
    log_p, log_q = log_softmax(student / temperature), log_softmax(teacher / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    if beta == 0:
        value, by_p = (q * (log_q - log_p)).sum(-1), -q / p
    elif beta == 1:
        value, by_p = (p * (log_p - log_q)).sum(-1), log_p - log_q + 1
    else:
        m = beta * q + (1 - beta) * p
        value = beta * (q * (log_q - np.log(m))).sum(-1) + (1 - beta) * (p * (log_p - np.log(m))).sum(-1)
        by_p = -beta * (1 - beta) * q / m + (1 - beta) * (log_p - np.log(m) + 1 - (1 - beta) * p / m)
    return value, p * (by_p - (p * by_p).sum(-1, keepdims=True)) / temperature


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("temperature", "transposed", "bias", "softcap", "chunk"), [
    (1.0, False, False, None, 3), (2.0, True, True, None, None), (0.7, False, True, 3.0, 1),
])  # fmt: skip
def test_value_and_gradient(beta, temperature, transposed, bias, softcap, chunk):
    rng = np.random.default_rng(1)
    hidden, teacher_hidden = rng.normal(size=(B, S, D)), rng.normal(size=(B, S, E))
    weight, teacher_weight, b = rng.normal(size=(D, V)), rng.normal(size=(E, V)), rng.normal(size=V) * bias
    g = rng.normal(size=(B, S))
    logits = 1.3 * (hidden @ weight + b)
    capped = softcap * np.tanh(logits / softcap) if softcap else logits
    value, by_logits = reference(capped, teacher_hidden @ teacher_weight, beta, temperature)
    d = by_logits * g[..., None] * 1.3 * ((1 - (capped / softcap) ** 2) if softcap else 1)

    def ours(hidden, weight, b):
        head = Head(weight.T if transposed else weight, transposed, b if bias else None, scale=1.3, softcap=softcap)
        return divergence(hidden, head, jnp.asarray(teacher_hidden), Head(jnp.asarray(teacher_weight)), beta, temperature, chunk)

    def both(*inputs):
        found, back = jax.vjp(ours, *inputs)
        return found, back({"divergence": jnp.asarray(g), "agreement": jnp.zeros((B, S))})

    found, (d_hidden, d_weight, d_bias) = jax.jit(both)(*map(jnp.asarray, (hidden, weight, b)))
    np.testing.assert_allclose(found["divergence"], value, rtol=BAR, atol=BAR)
    agree = capped.argmax(-1) == (teacher_hidden @ teacher_weight).argmax(-1)
    np.testing.assert_array_equal(found["agreement"], agree)
    np.testing.assert_allclose(d_hidden, d @ weight.T, rtol=BAR, atol=BAR)
    np.testing.assert_allclose(d_weight, np.einsum("bsd,bsv->dv", hidden, d), rtol=BAR, atol=BAR)
    np.testing.assert_allclose(d_bias, d.sum((0, 1)) * bias, rtol=BAR, atol=BAR)


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_stay_finite_and_a_twin_has_no_divergence(beta):
    hidden = jnp.asarray(100 * np.random.default_rng(2).normal(size=(1, 4, D)))
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(D, V)))
    total = lambda h, other: jnp.sum(divergence(h, Head(weight), other, Head(weight), beta)["divergence"])
    both = tiny.quick(jax.value_and_grad(total))
    value, gradient = both(hidden, hidden)
    assert abs(value) < 1e-9 and np.abs(gradient).max() < 1e-9
    value, gradient = both(hidden, -hidden)
    assert np.isfinite(value) and np.isfinite(gradient).all() and value > 0.1


def test_the_teacher_gets_no_gradient_and_a_frozen_head_none():
    hidden, weight = jnp.ones((1, 2, D)), jnp.ones((D, V))
    teacher = jax.grad(lambda h: jnp.sum(divergence(hidden, Head(weight), h, Head(weight))["divergence"]))(2 * hidden)
    assert not teacher.any()
    program = jax.jit(jax.grad(lambda h: jnp.sum(divergence(h, Head(weight), 2 * hidden, Head(weight))["divergence"])))
    assert np.isfinite(program(hidden)).all()


def test_memory_at_a_large_vocabulary():
    """Value and gradient over [1, 512] positions of 32000 words: far less than one dense [B, S, V] in float32, let alone two."""
    with jax.enable_x64(False):
        struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        shapes = struct(1, 512, 32), struct(32, 32000), struct(1, 512, 32), struct(32, 32000)

        def loss(hidden, weight, teacher_hidden, teacher_weight, chunk):
            return jnp.sum(divergence(hidden, Head(weight), teacher_hidden, Head(teacher_weight), 0.5, chunk=chunk)["divergence"])

        def temporary(chunk):
            program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=4, compiler_options=tiny.FULL)
            return program.lower(*shapes, chunk).compile().memory_analysis().temp_size_in_bytes

        dense, chunked = 512 * 32000 * 4, temporary(8)
        print(f"dense [B,S,V] {dense / 2**20:.0f} MiB, one chunk of all {temporary(512) / 2**20:.0f} MiB, chunks {chunked / 2**20:.1f} MiB")
        assert chunked < 0.25 * dense
        assert temporary(512) > 1.5 * dense
