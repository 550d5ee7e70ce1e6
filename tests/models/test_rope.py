"""Every rope type against its formula, written out one dimension at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.models import rope
from aligner.types import UserError

DIM, BASE, LIMIT = 16, 10000.0, 64
POSITIONS = jnp.arange(10)[None]


def found(positions=POSITIONS, limit=LIMIT, **parameters):
    inverse, scale = rope.frequencies({"rope_theta": BASE, **parameters}, DIM, limit, positions, jnp.ones_like(positions))
    return np.asarray(inverse, np.float64), scale


def plain(base=BASE):
    return [base ** (-2 * i / DIM) for i in range(DIM // 2)]


def test_default():
    inverse, scale = found()
    np.testing.assert_allclose(inverse, plain(), rtol=1e-6)
    assert scale == 1
    np.testing.assert_array_equal(found(rope_type="default")[0], inverse)


def test_linear():
    np.testing.assert_allclose(found(rope_type="linear", factor=2.5)[0], np.array(plain()) / 2.5, rtol=1e-6)


def test_llama3():
    """Wavelengths above 32 / 1 are stretched by 8, those below 32 / 4 kept, between them a blend."""
    options = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    expected = []
    for frequency in plain():
        wavelength = 2 * math.pi / frequency
        if wavelength < 32 / 4.0:
            expected.append(frequency)
        elif wavelength > 32 / 1.0:
            expected.append(frequency / 8)
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    inverse, scale = found(rope_type="llama3", **options)
    np.testing.assert_allclose(inverse, expected, rtol=1e-6)
    assert scale == 1 and 0 < sum(abs(a - b) < 1e-9 for a, b in zip(expected, plain())) < DIM // 2


@pytest.mark.parametrize("length", [10, 64, 65, 200])
def test_dynamic(length):
    """NTK by length: the base grows once a row is longer than the model was trained on."""
    inverse, scale = found(jnp.arange(length)[None], rope_type="dynamic", factor=2.0)
    longest = max(length, LIMIT)
    base = BASE * (2.0 * longest / LIMIT - 1.0) ** (DIM / (DIM - 2))
    np.testing.assert_allclose(inverse[0], np.broadcast_to(plain(base), inverse[0].shape), rtol=1e-5)
    assert scale == 1


def test_dynamic_goes_row_by_row():
    positions = jnp.stack([jnp.arange(100), jnp.minimum(jnp.arange(100), 20)])
    inverse, _ = found(positions, rope_type="dynamic", factor=2.0)
    assert inverse.shape == (2, 100, DIM // 2)
    np.testing.assert_allclose(inverse[1, 0], plain(), rtol=1e-5)
    assert (inverse[0, 0][1:] < inverse[1, 0][1:]).all()


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize("fast,slow", [(32, 1), (8, 2)])
def test_yarn(fast, slow):
    """arXiv 2309.00071, equations 17 to 22."""

    def dimension(rotations):
        return DIM * math.log(16 / (rotations * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), DIM - 1)
    expected = []
    for i, frequency in enumerate(plain()):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        expected.append((1 - ramp) * frequency + ramp * frequency / 4.0)
    inverse, scale = found(beta_fast=fast, beta_slow=slow, **YARN)
    np.testing.assert_allclose(inverse, expected, rtol=1e-6)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_temperatures():
    assert found(attention_factor=0.7, **YARN)[1] == 0.7
    expected = (0.1 * 0.8 * math.log(4) + 1) / (0.1 * 0.6 * math.log(4) + 1)
    assert found(mscale=0.8, mscale_all_dim=0.6, **YARN)[1] == pytest.approx(expected)
    assert found(**{**YARN, "factor": 1.0})[1] == 1.0


def test_longrope():
    """arXiv 2402.13753: each dimension has its own factor, one list up to the original length and one beyond."""
    short, long = np.linspace(1, 2, DIM // 2), np.linspace(3, 9, DIM // 2)
    options = dict(rope_type="longrope", short_factor=short, long_factor=long, original_max_position_embeddings=32)
    positions = jnp.stack([jnp.arange(33), jnp.minimum(jnp.arange(33), 31)])
    inverse, scale = found(positions, **options)
    np.testing.assert_allclose(inverse[0, 0], np.array(plain()) / long, rtol=1e-6)
    np.testing.assert_allclose(inverse[1, 0], np.array(plain()) / short, rtol=1e-6)
    assert scale == pytest.approx(math.sqrt(1 + math.log(LIMIT / 32) / math.log(32)))
    assert found(positions, attention_factor=1.5, **options)[1] == 1.5


def test_an_unknown_type_is_refused():
    with pytest.raises(UserError, match="'mystery' is not supported; supported are default"):
        rope.check({"rope_type": "mystery"})


def test_rotation():
    """The pair (x[i], x[i + H/2]) turns by position * frequency; scores then depend on the distance alone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 10, 2, DIM)).astype(np.float32)
    inverse, _ = found()
    ones, yarn = jnp.ones_like(POSITIONS), {"rope_type": "yarn", "rope_theta": BASE, "factor": 1.0, "attention_factor": 1.25}
    cos, sin = rope.tables({**yarn, "original_max_position_embeddings": LIMIT}, DIM, LIMIT, POSITIONS, ones, jnp.float32)
    y = np.asarray(rope.rotate(jnp.asarray(x), cos, sin))
    for position in range(10):
        for i in range(DIM // 2):
            turned = (x[0, position, :, i] + 1j * x[0, position, :, i + DIM // 2]) * np.exp(1j * position * inverse[i]) * 1.25
            np.testing.assert_allclose(y[0, position, :, i], turned.real, atol=1e-5)
            np.testing.assert_allclose(y[0, position, :, i + DIM // 2], turned.imag, atol=1e-5)
    same = jnp.broadcast_to(jnp.asarray(x[:, :1]), x.shape)
    cos, sin = rope.tables({"rope_theta": BASE}, DIM, LIMIT, POSITIONS, ones, jnp.float32)
    turned = rope.rotate(same, cos, sin)[0, :, 0]
    scores = turned @ turned.T
    np.testing.assert_allclose(scores[2, 5], scores[6, 9], atol=1e-4)


def test_the_table_is_float32_until_the_end():
    """Positions beyond 256 would collapse in bfloat16."""
    positions = jnp.array([[1000, 1001]])
    cos, _ = rope.tables({"rope_theta": BASE}, 2, LIMIT, positions, jnp.ones_like(positions), jnp.bfloat16)
    np.testing.assert_allclose(cos.astype(jnp.float32)[0, :, 0, 0], np.cos([1000.0, 1001.0]), atol=4e-3)
    assert cos.dtype == jnp.bfloat16 and jax.tree.leaves(cos)[0].shape == (1, 2, 1, 2)
