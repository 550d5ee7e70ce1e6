"""Rotary position embedding: the frequencies of every `rope_type` that decoder checkpoints use, and their application.

Sources: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), YaRN (2309.00071), LongRoPE (2402.13753), Llama 3.1's
piecewise scaling. `rope_parameters` is the dict that Hugging Face's config normalisation produces.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aligner.matmul import apart, on_one_cpu
from aligner.types import UserError

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def check(parameters: Mapping[str, Any]) -> None:
    """Refuse a rope type that we would silently compute as another."""
    kind = parameters.get("rope_type", "default")
    if kind not in TYPES:
        raise UserError(f"rope_type {kind!r} is not supported; supported are {', '.join(TYPES)}")


def length_limit(parameters: Mapping[str, Any] | None, max_position_embeddings: int) -> int | None:
    """How long a text may be before all of it, from its first token on, is turned otherwise (dynamic, longrope: the former ever more with
    each token, the latter once); None where only positions count."""
    parameters = parameters or {}
    limits = {"dynamic": max_position_embeddings, "longrope": parameters.get("original_max_position_embeddings")}
    return limits.get(parameters.get("rope_type"))


def frequencies(
    parameters: Mapping[str, Any], dim: int, max_position_embeddings: int, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "... half"], float]:
    """Inverse frequencies of the rotation and the factor on its cosine and sine.

    Args:
        parameters: `rope_type`, `rope_theta` and what the type needs.
        dim: rotated width of a head.
        max_position_embeddings: from the model's config.
        positions, segment_ids: [B, T]; the types that go by the length of a text (dynamic, longrope) read it from here, every segment
            for itself: a packed row gives what its segments give alone.

    Returns:
        [dim / 2], or [B, T, dim / 2] where segments differ; and the attention factor.
    """
    kind, base = parameters.get("rope_type", "default"), parameters["rope_theta"]
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    inverse = (1.0 / base**exponents).astype(np.float32)
    if kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / parameters["factor"], 1.0
    if kind == "llama3":
        return _llama3(parameters, inverse), 1.0
    if kind == "yarn":
        return _yarn(parameters, dim, max_position_embeddings)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1)[..., None] + 1  # [B, T, 1]
    if kind == "dynamic":  # the base grows with the row once it is longer than what the model was trained on
        factor, limit = parameters["factor"], max_position_embeddings
        length = jnp.maximum(length, limit).astype(jnp.float32)
        grown = base * (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / grown**exponents, 1.0
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position_embeddings / original
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (inverse / np.asarray(parameters[key], np.float32) for key in ("short_factor", "long_factor"))
    return jnp.where(length > original, long, short), scale


def _llama3(parameters: Mapping[str, Any], inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (inverse * (smooth + (1 - smooth) / parameters["factor"])).astype(np.float32)


def _yarn(parameters: Mapping[str, Any], dim: int, max_position_embeddings: int) -> tuple[np.ndarray, float]:
    """YaRN, section 3.2: interpolate the slow rotations, keep the fast ones, with a ramp between, and a temperature."""
    base, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position_embeddings / original

    def temperature(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = parameters.get("attention_factor")
    if scale is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scale = temperature(mscale) / temperature(all_dim) if mscale and all_dim else temperature()

    def dimension(rotations: float) -> float:  # the dimension that turns so many times over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (max(high - low, 0) or 0.001), 0, 1)
    power = base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    return (ramp / (factor * power) + (1 - ramp) / power).astype(np.float32), scale


def tables(
    parameters: Mapping[str, Any] | None,
    width: int,
    max_position_embeddings: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    dtype,
) -> tuple[Float[Array, "B T 1 W"], Float[Array, "B T 1 W"]]:
    """Cosine and sine for every position, computed in float32 and rounded to `dtype`, with an axis for the heads.

    Args:
        parameters: of one kind of rotary embedding; None rotates nothing.
        width: W, the rotated part of a head.
        max_position_embeddings: from the model's config.
        positions: [B, T], or [B, T, 3] in time, rows and columns.
        segment_ids: [B, T].
        dtype: of the activations.
    """
    if parameters is None:
        ones = jnp.ones((*positions.shape, 1, width), dtype)
        return ones, jnp.zeros_like(ones)
    inverse, scale = frequencies(parameters, width, max_position_embeddings, positions, segment_ids)
    if positions.ndim == 3:  # M-RoPE: every frequency turns by one of time, row and column
        positions = positions[..., sections(parameters, width // 2)]
        angles = positions.astype(jnp.float32) * inverse
    else:
        angles = positions[..., None].astype(jnp.float32) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    turn = lambda angles: ((jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype))
    return on_one_cpu(functools.partial(apart, turn), turn, angles)  # or every layer makes them again, for every head


def sections(parameters: Mapping[str, Any], half: int) -> np.ndarray:
    """Which axis (0 time, 1 row, 2 column) each of `half` frequencies turns by: one block after another, or in turns (Qwen3-VL)."""
    sizes = parameters["mrope_section"]
    if not parameters.get("mrope_interleaved"):
        return np.repeat(np.arange(len(sizes)) % 3, sizes)
    axes = np.zeros(half, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sizes[axis] : 3] = axis
    return axes


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 W"], sin: Float[Array, "B T 1 W"], interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + W/2]) of every head, or (x[2i], x[2i + 1]) when interleaved; beyond W a head passes unchanged."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        cos, sin = (jnp.repeat(y[..., : width // 2], 2, axis=-1) for y in (cos, sin))
        pairs = turned.reshape(*turned.shape[:-1], width // 2, 2)
        other = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        other = jnp.concatenate([-second, first], axis=-1)
    turned = turned * cos + other * sin
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
