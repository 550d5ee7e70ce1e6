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

from aligner.types import Batch

BLOCK, MAX_BLOCKS = 128, 8  # queries that are multiplied with their keys at once, and how many such products there are at most


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
        q = q.transpose(0, 2, 3, 1, 4)  # [B,K,G,T,H]: with heads leading the products need no copies of their own
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        if spec is None:
            out = _attend(q, k, v, None, None, softcap)
        else:
            mask = (spec if spec.mask is not None else dense(spec)).mask
            cached = spec.key_positions is not None
            keys = spec.key_positions if cached else spec.positions
            bend = None if slopes is None else (jnp.asarray(slopes, jnp.float32).reshape(-1, groups, 1, 1), spec.positions, keys)
            # no query sees a later column: each block of queries is multiplied by the columns up to its end alone; a cache's columns
            # are in no such order
            size = length if cached else max(BLOCK, -(-length // MAX_BLOCKS))
            ends = [min(start + size, length) for start in range(0, length, size)]
            spans = [(start, end, k.shape[2] if cached else end) for start, end in zip([0, *ends], ends)]
            blocks = [
                _attend(q[..., start:end, :], k[:, :, :to], v[:, :, :to], mask[..., start:end, :to], _bias(bend, start, end, to), softcap)
                for start, end, to in spans
            ]
            out = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _bias(bend: tuple | None, start: int, end: int, to: int) -> Float[Array, "B K G t s"] | None:
    """ALiBi's part of the logits of the queries from `start` to `end` and the keys up to `to`."""
    if bend is None:
        return None
    slopes, positions, keys = bend
    distance = positions[:, start:end, None] - keys[:, None, :to]
    return -slopes * distance[:, None, None].astype(slopes.dtype)


def _attend(
    q: Float[Array, "B K G t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s H"],
    mask: Bool[Array, "B 1 t s"] | None,
    bias: Float[Array, "B K G t s"] | None,
    softcap: float | None,
) -> Float[Array, "B K G t H"]:
    """Softmax of all logits of these queries and keys at once; q is already scaled."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precision = None if q.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])  # the heads that share a key are one matrix
    logits = jnp.einsum("bkth,bksh->bkts", flat, k, preferred_element_type=wide, precision=precision)
    logits = logits.reshape(*q.shape[:-1], k.shape[2])
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.astype(wide)
    if mask is not None:
        logits = jnp.where(mask[:, :, None], logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(*flat.shape[:-1], k.shape[2])
    out = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=wide, precision=precision)
    return out.astype(q.dtype).reshape(q.shape)
