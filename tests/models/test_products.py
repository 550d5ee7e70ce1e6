"""The two products of attention against plain ones and their autodiff, for as many rows as take each form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.matmul import FEW_ROWS
from aligner.models import products


def plain(q, k, v):
    logits = jnp.einsum("bkth,bksh->bkts", q, k, precision="highest")
    return logits, jnp.einsum("bkts,bksh->bkth", jax.nn.softmax(logits), v, precision="highest")


def ours(q, k, v):
    logits = products.logits(q, k)
    return logits, products.mix(logits, v)


@pytest.mark.parametrize("rows", [3, FEW_ROWS, FEW_ROWS + 1, 2 * FEW_ROWS])
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_products_and_gradients(rows, dtype, apart):
    draw = np.random.default_rng(rows).normal
    q, k, v = (jnp.asarray(draw(size=(2, 3, length, 4)), dtype) for length in (rows, 5, 5))
    seeds = [jnp.asarray(draw(size=(2, 3, rows, width)), to) for width, to in ((5, "float32"), (4, dtype))]
    found, backward = jax.vjp(jax.jit(ours), q, k, v)
    wanted, backward_plain = jax.vjp(plain, *(x.astype("float32") for x in (q, k, v)))
    assert found[0].dtype == jnp.float32 and found[1].dtype == q.dtype
    gradients, wanted_gradients = backward(tuple(seeds)), backward_plain(tuple(seed.astype("float32") for seed in seeds))
    for one, other in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.astype("float32"), other, atol=apart * np.abs(other).max(), rtol=0)
    assert {gradient.dtype for gradient in gradients} == {q.dtype}
