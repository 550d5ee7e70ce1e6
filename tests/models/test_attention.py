"""Who sees whom, and what comes out, against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from aligner.models.attention import attention, dense, spec_of
from tests.models import tiny


def visible(batch, row, query, key):
    """The rule, in words: same segment, not later in the row, and the key in the prompt or in the query's own answer."""
    segment, role = batch["segment_ids"][row], batch["role"][row]
    if segment[query] != segment[key] or key > query:
        return False
    return role[key] == 0 or role[key] == role[query]


def mask_of(batch):
    """[B, T, T], queries along the second axis."""
    return np.asarray(tiny.quick(lambda batch: dense(spec_of(batch)).mask)(batch))[:, 0]


@pytest.mark.parametrize("options", [{}, dict(shared=False), dict(per_row=2, empty_rows=1), dict(per_row=4, more=(3, 0, 0))], ids=str)
def test_mask(llava, options):
    batch = tiny.make_batch(llava, **options)
    mask = mask_of(batch)
    rows, length = batch["tokens"].shape
    expected = [[[visible(batch, r, q, k) for k in range(length)] for q in range(length)] for r in range(rows)]
    np.testing.assert_array_equal(mask, expected)
    assert mask.any(axis=-1).all()  # padding too sees something: no softmax over nothing


def test_an_answer_never_sees_the_other(llama):
    batch = tiny.make_batch(llama)
    mask = mask_of(batch)
    role = batch["role"]
    assert not (mask & (role[:, :, None] == 2) & (role[:, None, :] == 1)).any()
    assert (mask & (role[:, :, None] == 2) & (role[:, None, :] == 0) & (batch["segment_ids"][:, None] > 0)).any()


@pytest.mark.parametrize("with_spec", [True, False])
@pytest.mark.parametrize("heads,groups", [(4, 1), (4, 2), (4, 4)])
def test_values(llama, with_spec, heads, groups):
    """Grouped heads: query head n reads key head n // (N / K)."""
    batch = tiny.make_batch(llama, per_row=2)
    rows, length = batch["tokens"].shape
    rng = np.random.default_rng(0)
    draw = lambda n: rng.standard_normal((rows, length, n, 6)).astype(np.float32)
    q, k, v = draw(heads), draw(groups), draw(groups)
    spec = spec_of(batch) if with_spec else None
    found = np.asarray(tiny.quick(lambda q, k, v, spec: attention(q, k, v, spec, scale=0.3))(q, k, v, spec))
    mask = mask_of(batch) if with_spec else np.ones((rows, length, length), bool)
    for n in range(heads):
        shared = n // (heads // groups)
        logits = np.where(mask, 0.3 * np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, shared]), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[:, :, n], np.einsum("bts,bsh->bth", weights, v[:, :, shared]), atol=1e-5)


def test_bfloat16_softmax_is_in_float32(llama):
    """A thousand equal keys: each weight is 2^-10 to the bit, which a bfloat16 sum of a thousand ones would miss."""
    q = jnp.zeros((1, 1024, 1, 2), jnp.bfloat16)
    v = jnp.ones((1, 1024, 1, 2), jnp.bfloat16)
    out = tiny.quick(lambda q, v: attention(q, q, v, None, scale=1.0))(q, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


@pytest.mark.parametrize("width", [64, 72, 144])
def test_bfloat16_keeps_the_scale(width):
    """A scale that is rounded to bfloat16 itself would make all logits too large or too small, by up to 0.2 % for these widths."""
    rng, n = np.random.default_rng(1), 20000
    q, k = rng.normal(size=(n, 1, 1, width)), rng.normal(size=(n, 2, 1, width))
    v = np.zeros((n, 2, 1, width))
    v[:, 0, 0, 0] = v[:, 1, 0, 1] = 1  # the first two numbers of the result are the two weights
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    weights = np.asarray(attention(q, k, v, None, width**-0.5), np.float64)[:, 0, 0, :2]
    found = np.log(weights[:, 0] / weights[:, 1])
    logits = np.einsum("nh,nkh->nk", np.float64(q)[:, 0, 0], np.float64(k)[:, :, 0]) * width**-0.5
    wanted = logits[:, 0] - logits[:, 1]
    near = np.abs(wanted) < 3
    slope = (found * wanted)[near].sum() / (wanted**2)[near].sum()
    assert slope == pytest.approx(1, abs=4e-4)
