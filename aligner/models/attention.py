"""Attention, one entry: `attention(q, k, v, spec)`.

A spec says who sees whom by a few small arrays; only the reference backend turns it into a dense mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aligner.models.layers import at_least_float32
from aligner.types import Batch


@struct.dataclass
class Spec:
    """A key is visible to a query if it is in the same segment, not later in the row, and its role is 0 (the prompt) or the query's.

    Attributes:
        segment_ids, role, positions: [B, T] as in a batch.
        mask: the same thing dense, [B, 1, T, T]; made once per forward pass by `dense` for the reference backend.
        key_positions: [B, C] of the columns of a cache, -1 where nothing stands; the keys are then those, one text a row. None: the
            keys are the batch's own columns.
    """

    segment_ids: Int[Array, "B T"]
    role: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    mask: Bool[Array, "B 1 T S"] | None = None
    key_positions: Int[Array, "B C"] | None = None


def spec_of(batch: Batch) -> Spec:
    return Spec(batch["segment_ids"], batch["role"], batch["positions"])


def dense(spec: Spec, window: int | None = None) -> Spec:
    """Fill in the dense mask. Padding (segment 0) sees padding, so that no row of the mask is empty.

    Args:
        window: a key further back than this many positions (not columns) is not visible; None has no limit.
    """
    if spec.key_positions is not None:
        distance = spec.positions[:, :, None] - spec.key_positions[:, None, :]
        visible = (spec.key_positions[:, None, :] >= 0) & (distance >= 0)
        return spec.replace(mask=(visible if window is None else visible & (distance < window))[:, None])
    segment, role = spec.segment_ids, spec.role
    column = jnp.arange(segment.shape[1])
    visible = segment[:, :, None] == segment[:, None, :]
    visible &= column[:, None] >= column[None, :]
    visible &= (role[:, None, :] == 0) | (role[:, :, None] == role[:, None, :])
    if window is not None:
        visible &= spec.positions[:, :, None] - spec.positions[:, None, :] < window
        visible |= jnp.eye(segment.shape[1], dtype=bool)  # padding's positions do not count up
    return spec.replace(mask=visible[:, None])


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slope of every head (arXiv 2108.12409): a geometric sequence, filled up from the next one where `heads` is no power of 2."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return tuple(slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)])


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: Spec | None,
    scale: float,
    softcap: float | None = None,
    slopes: Sequence[float] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads (N a multiple of K), softmax in float32; `spec=None` lets everything see everything.

    `softcap` c bends the logits to c * tanh(logits / c) before the mask (Gemma 2). `slopes` of the heads, times the distance in
    positions, are taken off them (ALiBi).
    """
    with jax.named_scope("attention"):
        batch, length, heads, width = q.shape
        groups = heads // k.shape[2]
        # the scale goes into q: [B,T,N,H] is smaller than [B,N,T,T]
        q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, k.shape[2], groups, width)
        wide = jnp.promote_types(q.dtype, jnp.float32)
        precision = None if q.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide, precision=precision)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if slopes is not None:
            keys = spec.positions if spec.key_positions is None else spec.key_positions
            distance = spec.positions[:, :, None] - keys[:, None, :]
            logits -= jnp.asarray(slopes, wide).reshape(-1, groups, 1, 1) * distance[:, None, None].astype(wide)
        if spec is not None:
            mask = (spec if spec.mask is not None else dense(spec)).mask
            logits = jnp.where(mask[:, :, None], logits, jnp.finfo(wide).min)
        weights = jax.nn.softmax(at_least_float32(logits), axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=wide, precision=precision)
        return out.astype(q.dtype).reshape(batch, length, heads, width)
