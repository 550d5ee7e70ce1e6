"""The matmul primitive against jnp, value and gradients, plain and inside a scan."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.matmul import FEW_ROWS, Turned, dot_turned, matmul, turn, turned, weight_gradient
from tests.models import tiny

BAR = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 2**-8}  # one rounding to bfloat16 is at most 2^-9, relative


def draw(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def close(found, expected, dtype):
    assert found.dtype == dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, atol=BAR[dtype] * np.abs(expected).max(initial=0), rtol=0)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", BAR)
def test_value_and_gradients(dtype, leading):
    with jax.enable_x64(True):
        x, w, g = draw(dtype, *leading, 7), draw(dtype, 7, 4, seed=1), draw(dtype, *leading, 4, seed=2)
        y, pull = jax.vjp(jax.jit(matmul), x, w)
        wide, pull_wide = jax.vjp(lambda x, w: jnp.matmul(x, w, precision="highest"), *(a.astype(jnp.float64) for a in (x, w)))
        close(y, wide, dtype)
        for found, expected in zip(pull(g), pull_wide(g.astype(jnp.float64))):
            close(found, expected, dtype)


def test_bfloat16_is_accumulated_in_float32():
    """1 + 255 times 2^-8 is 1.99609375; a bfloat16 running sum would stay at 1."""
    x = jnp.full((1, 256), 2.0**-8, jnp.bfloat16).at[0, 0].set(1)
    ones = jnp.ones((256, 1), jnp.bfloat16)
    assert matmul(x, ones)[0, 0] == jnp.bfloat16(1 + 255 * 2**-8)
    assert weight_gradient(x.T, ones)[0, 0] == np.float32(1 + 255 * 2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inside_a_scan_over_stacked_kernels(dtype):
    x, w = draw(dtype, 6, 5), draw(dtype, 3, 5, 5, seed=1)

    def loss(multiply, x, w):
        y, _ = jax.lax.scan(lambda h, kernel: (jnp.tanh(multiply(h, kernel)), None), x, w)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    plain = lambda a, b: jnp.matmul(a, b, precision="highest")
    expected = jax.grad(lambda x, w: loss(plain, x, w), argnums=(0, 1))(x.astype(jnp.float32), w.astype(jnp.float32))
    found = jax.jit(jax.grad(lambda x, w: loss(matmul, x, w), argnums=(0, 1)))(x, w)
    for a, b in zip(found, expected):
        assert a.dtype == dtype
        assert np.abs(np.asarray(a, np.float32) - b).max() <= (1e-5 if dtype == "float32" else 0.05) * np.abs(b).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_turned_in_memory_is_turned_by_a_pass_of_its_own(dtype):
    """Where it is a slice of a stack, as in a scan over layers, the slice is made first."""
    stack = draw(dtype, 3, 96, 64)
    compiled = jax.jit(lambda stack, i: turned(stack[i])).lower(stack, 1).compile(compiler_options=tiny.FULL)
    passes = [body for body in re.split(r"\n\n", compiled.as_text()) if " transpose(" in body]
    assert passes and not any("slice" in body for body in passes)
    np.testing.assert_array_equal(compiled(stack, 1), stack[1].T)
    broken = jnp.full((2, 3), jnp.nan, dtype).at[0, 1].set(-jnp.inf)
    np.testing.assert_array_equal(np.float32(turned(broken)), np.float32(broken.T))


@pytest.mark.parametrize("rows", [1, 6, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", BAR)
def test_turned(dtype, rows):
    with jax.enable_x64(True):
        x, w = draw(dtype, rows, 1, 7), draw(dtype, 5, 7, seed=1)
        found = jax.jit(dot_turned)(x, w).astype(dtype)
        close(found, jnp.matmul(x.astype(jnp.float64), w.T.astype(jnp.float64), precision="highest"), dtype)


def test_what_is_turned():
    """The maps of layers that stand apart, and the head; not what stands beside a kernel, not what other programs read."""
    w = jnp.ones((3, 2))
    layer = {"mlp": {"up_proj": {"kernel": w, "lora_a": w}}, "experts": {"kernel": jnp.ones((4, 3, 2))}}
    tree = {"lm_head": {"kernel": w}, "model": {"layers": {"0": layer}}, "projector": {"kernel": w}}
    leaves = jax.tree_util.tree_leaves_with_path(turn(tree), is_leaf=lambda x: isinstance(x, Turned))
    turned = [jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if isinstance(leaf, Turned)]
    assert turned == ["lm_head/kernel", "model/layers/0/mlp/up_proj/kernel"]
