"""Chunked token statistics against the dense computation: values, gradients, what is compiled, and memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import logprobs
from aligner.logprobs import DIFFERENTIABLE, NAMES, token_stats
from aligner.matmul import after
from aligner.types import Head
from tests.models.tiny import FULL, quick

B, S, D, V = 2, 7, 5, 37  # nothing divides anything
HEADS = {
    "plain": {},
    "transposed": dict(transposed=True),
    "bias": dict(bias=True),
    "scale": dict(scale=0.7),
    "softcap": dict(softcap=2.0),
    "everything": dict(transposed=True, bias=True, scale=1.3, softcap=3.0),
}


def make(name, dtype):
    options = dict(HEADS[name])
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    hidden, targets = draw(B, S, D), jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    weight = draw(V, D) if options.get("transposed") else draw(D, V)
    bias = draw(V) if options.pop("bias", False) else None
    return hidden, Head(weight, bias=bias, **options), targets


def dense(hidden, head, targets):
    """All statistics from [B,S,V] logits, by autodiff."""
    weight = head.weight.T if head.transposed else head.weight
    wide = jnp.promote_types(hidden.dtype, "float32")
    logits = jnp.einsum("bsd,dv->bsv", hidden, weight, precision="highest", preferred_element_type=wide)
    logits = logits if head.bias is None else logits + head.bias
    logits = logits * head.scale
    logits = logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    return {
        "logp": jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0],
        "lse": jax.nn.logsumexp(logits, axis=-1),
        "entropy": -jnp.sum(p * log_p, axis=-1),
        "correct": (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype),
        "mean_logit": jnp.mean(logits, axis=-1),
        "sum_p2": jnp.sum(p * p, axis=-1),
    }


def weighted(stats, names=DIFFERENTIABLE):
    """A scalar in which every token and every statistic has a weight of its own."""
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal((B, S)) for name in DIFFERENTIABLE}
    return sum(jnp.sum(weights[name].astype(stats[name].dtype) * stats[name]) for name in names)


def evaluate(function, hidden, head):
    """`function(hidden, head)`, compiled."""
    of = lambda hidden, weight, bias: function(hidden, head._replace(weight=weight, bias=bias))
    return quick(of)(hidden, head.weight, head.bias)


def gradients(function, hidden, head):
    """Those of a scalar function by hidden, weight and bias."""
    of = lambda hidden, weight, bias: function(hidden, head._replace(weight=weight, bias=bias))
    argnums = (0, 1) if head.bias is None else (0, 1, 2)
    found = quick(jax.grad(of, argnums=argnums))(hidden, head.weight, head.bias)
    return dict(zip(("hidden", "weight", "bias"), found))


def assert_close(found, expected, bar):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, atol=bar * max(1, np.abs(value).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype,bar", [("float64", 1e-10), ("float32", 1e-5)])
def test_equals_dense(name, dtype, bar):
    with jax.enable_x64(dtype == "float64"):
        hidden, head, targets = make(name, dtype)
        found = evaluate(lambda h, head: token_stats(h, head, targets, NAMES, chunk=3), hidden, head)
        assert_close(found, evaluate(lambda h, head: dense(h, head, targets), hidden, head), bar)
        found = gradients(lambda h, head: weighted(token_stats(h, head, targets, NAMES, chunk=3)), hidden, head)
        assert_close(found, gradients(lambda h, head: weighted(dense(h, head, targets)), hidden, head), bar)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 7, 100, None])
def test_any_chunk(chunk):
    """Also those that do not divide S, and one that is longer."""
    with jax.enable_x64(True):
        hidden, head, targets = make("everything", "float64")
        found = gradients(lambda h, head: weighted(token_stats(h, head, targets, DIFFERENTIABLE, chunk)), hidden, head)
        assert_close(found, gradients(lambda h, head: weighted(dense(h, head, targets)), hidden, head), 1e-10)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_statistic_alone(name):
    with jax.enable_x64(True):
        hidden, head, targets = make("everything", "float64")
        found = evaluate(lambda h, head: token_stats(h, head, targets, (name,), 3), hidden, head)
        assert_close(found, {name: evaluate(lambda h, head: dense(h, head, targets), hidden, head)[name]}, 1e-10)
        for names in ((name,), NAMES):  # the others without a cotangent
            found = gradients(lambda h, head, names=names: weighted(token_stats(h, head, targets, names, 3), (name,)), hidden, head)
            assert_close(found, gradients(lambda h, head: weighted(dense(h, head, targets), (name,)), hidden, head), 1e-10)


def test_the_others_are_constants():
    hidden, head, targets = make("plain", "float32")
    constant = [name for name in NAMES if name not in DIFFERENTIABLE]
    found = gradients(lambda h, head: sum(map(jnp.sum, token_stats(h, head, targets, constant, 3).values())), hidden, head)
    assert not any(gradient.any() for gradient in found.values())


def test_far_out_logits_stay_finite():
    hidden, head, targets = make("plain", "float32")
    found = evaluate(lambda h, head: token_stats(1e4 * h, head, targets, NAMES, chunk=3), hidden, head)
    assert all(np.isfinite(stat).all() for stat in found.values())
    assert_close({"logp": found["logp"]}, {"logp": evaluate(lambda h, head: dense(1e4 * h, head, targets), hidden, head)["logp"]}, 1e-5)


def test_bfloat16():
    """Operands in bfloat16, statistics in float32: as the dense computation from the same rounded operands."""
    hidden, head, targets = make("everything", "bfloat16")
    found = evaluate(lambda h, head: token_stats(h, head, targets, NAMES, chunk=3), hidden, head)
    assert_close(found, evaluate(lambda h, head: dense(h, head, targets), hidden, head), 1e-5)
    found = gradients(lambda h, head: weighted(token_stats(h, head, targets, NAMES, chunk=3)), hidden, head)
    assert_close(found, gradients(lambda h, head: weighted(dense(h, head, targets)), hidden, head), 0.03)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (hidden, head.weight, head.bias))
    wide = gradients(lambda h, head: weighted(dense(h, head, targets)), single[0], head._replace(weight=single[1], bias=single[2]))
    assert_close({name: g.astype(jnp.float32) for name, g in found.items()}, wide, 0.03)


def test_a_frozen_head_has_no_gradient_matmul():
    """Told by the compiled program: a product of the head's shape, and its work, are there only where the head trains."""
    B, S, D, V = 3, 16, 40, 112
    targets = jnp.zeros((B, S), jnp.int32)
    hidden, weight = jnp.ones((B, S, D)), jnp.ones((D, V))
    loss = lambda hidden, weight: jnp.sum(token_stats(hidden, Head(weight), targets)["logp"])
    frozen, trains = (jax.jit(jax.grad(loss, argnums=n)).lower(hidden, weight).compile(compiler_options=FULL) for n in (0, (0, 1)))
    work = [program.cost_analysis()["flops"] / (2 * B * S * D * V) for program in (frozen, trains)]
    assert 1.9 < work[0] < 2.5 and 0.95 < work[1] - work[0] < 1.1  # logits, gradient of hidden; gradient of the head
    of_head = [re.findall(rf"f32\[(?:{D},{V}|{V},{D})\]\S* (?:dot|fusion|custom-call)\(", p.as_text()) for p in (frozen, trains)]
    assert not of_head[0] and of_head[1]
    scratch = [program.memory_analysis() for program in (frozen, trains)]
    assert scratch[1].output_size_in_bytes - scratch[0].output_size_in_bytes >= 4 * D * V
    assert scratch[0].temp_size_in_bytes - scratch[1].temp_size_in_bytes < 0.05 * 4 * D * V  # but for how arrays fit side by side


def test_only_the_bias_trains():
    hidden, head, targets = make("bias", "float32")
    loss = lambda stats: lambda bias: weighted(stats(hidden, head._replace(bias=bias), targets))
    by_bias = lambda stats: quick(jax.grad(loss(stats)))(head.bias)
    found = by_bias(functools.partial(token_stats, names=DIFFERENTIABLE, chunk=3))
    assert_close({"bias": found}, {"bias": by_bias(dense)}, 1e-5)


def test_memory_at_llama3_vocabulary():
    """4096 tokens, D=1024, V=128256, value and gradients of hidden and head: at most a fifth of the dense computation's scratch."""
    hidden = jax.ShapeDtypeStruct((1, 4096, 1024), jnp.float32)
    weight = jax.ShapeDtypeStruct((1024, 128256), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def scratch(stats):
        loss = lambda hidden, weight, targets: jnp.sum(stats(hidden, Head(weight), targets)["logp"])
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, weight, targets).compile(compiler_options=FULL)
        return compiled.memory_analysis().temp_size_in_bytes

    def lean(hidden, head, targets):  # `dense` itself takes half as much again
        logits = logprobs.dense_logits(hidden, head)
        return {"logp": jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)}

    ours, theirs = scratch(token_stats), scratch(lean)
    print(f"{ours / 2**20:.0f} of {theirs / 2**20:.0f} MiB")
    assert ours <= theirs / 5


def test_a_chunk_is_as_large_as_memory_allows(monkeypatch):
    seen = []
    monkeypatch.setattr(logprobs, "_stats", lambda static, *arguments: seen.append(static.chunk) or {})
    hidden, head, targets = make("plain", "float32")
    for elements in (1, 2 * B * V, 4 * B * V, 100 * B * V):
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
        token_stats(hidden, head, targets)
    assert seen == [1, 2, 4, 7]


def test_dense_logits_and_unknown_names():
    hidden, head, targets = make("everything", "float32")
    logits = logprobs.dense_logits(hidden, head)
    assert logits.shape == (B, S, V)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), dense(hidden, head, targets)["lse"], rtol=1e-5)
    with pytest.raises(ValueError, match="unknown token statistics"):
        token_stats(hidden, head, targets, ("perplexity",))


@pytest.mark.parametrize("names", [("logp",), ("logp", "entropy")], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_the_gradient_takes_the_logits_place(transposed, names):
    """On one CPU a chunk that is kept for the backward pass is there once, not a second time as what its gradient is."""
    rows, length, width, vocabulary = 4, 64, 8, 4096
    shapes = [(rows, length, width), (vocabulary, width) if transposed else (width, vocabulary)]
    hidden, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    loss = lambda hidden, weight, targets: sum(map(jnp.sum, token_stats(hidden, Head(weight, transposed), targets, names).values()))
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, weight, targets).compile(compiler_options=FULL)
    logits = 4 * rows * length * vocabulary
    assert logits <= program.memory_analysis().temp_size_in_bytes < 1.2 * logits


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_cpu_multiplies_for_the_states_before_it_multiplies_for_the_head(dtype, transposed):
    """Of the two products of the backward pass the second depends on the first in the compiled program, and is not changed by it."""
    hidden, weight, targets = (jnp.ones(shape, dtype) for shape in ((2, 96, 64), (512, 64) if transposed else (64, 512), (2, 96)))
    function = lambda hidden, weight: jnp.sum(token_stats(hidden, Head(weight, transposed=transposed), targets.astype(int))["logp"])
    compiled = jax.jit(jax.grad(function, argnums=(0, 1))).lower(hidden, weight).compile(compiler_options=FULL)
    lines = re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = (\S+) \S+?\((.*)$", compiled.as_text().partition("ENTRY")[2], re.MULTILINE)
    products = {shape.partition("{")[0]: name for name, shape, rest in lines if "dot_general" in rest and "transpose(" in rest}
    of_states, of_head = products["f32[192,64]"], products["f32[512,64]" if transposed else "f32[64,512]"]
    operands = {name: re.findall(r"%([\w.\-]+)", rest.partition("metadata=")[0]) for name, _, rest in lines}
    seen, ahead = set(), [of_head]
    while ahead:
        name = ahead.pop()
        ahead += [] if name in seen else operands.get(name, [])
        seen.add(name)
    assert of_states in seen

    broken = jnp.full_like(hidden, jnp.nan)
    np.testing.assert_array_equal(after(broken, hidden), hidden)
    np.testing.assert_array_equal(after(broken.at[0, 0, 0].set(-jnp.inf), hidden), hidden)
