"""Attention that never makes its mask, one Pallas kernel each way for TPUs (FlashAttention-2, arXiv 2307.08691).

Who sees whom is three numbers a token, compared block by block: so packed rows, windows and the answers that share a prompt cost only the
blocks of which something is seen, and those of which all is seen are spared the comparing, which is up to half of the work. Everywhere
else the same kernels run in Pallas' interpreter, which is for tests.

Inside, logits stand turned, [keys, queries]: what belongs to a query is then a row, which the hardware spreads over the keys for nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

SIZES = (512, 384, 256, 128)  # tokens of a block
ROLES = 2**12  # roles of a segment at most; segments of a row: 2**19
UNSEEN = -1e30  # a logit that is masked; finite, so that differences of two are numbers
LEAST = -1e29  # what a query's greatest logit is taken for at least: beside it an unseen one has no weight, and need not be masked again


class Tokens(NamedTuple):
    """Who sees whom: a key's `own` must be the query's `own` or its `prompt`, its column no later, its position less than `window` back.

    Attributes:
        queries: [B, 3, T] own, prompt, position.
        keys: [B, 2, T] own, position.
        live: [B, T / block, T / block] 1 where a block of queries sees something of a block of keys, 2 where each of them sees all of it.
        window: [1].
    """

    queries: Int[Array, "B 3 T"]
    keys: Int[Array, "B 2 T"]
    live: Int[Array, "B q k"]
    window: Int[Array, "1"]


class _Static(NamedTuple):
    block: int
    softcap: float | None


def flash(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    role: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B K G T H"]:
    """Softmax attention among the tokens of a row; see `aligner.models.attention.Spec` for who sees whom.

    Args:
        q: queries, scaled; G heads share a key's.
        k, v: keys and values.
        segment_ids, role, positions: as in a batch; padding (segment 0) sees nothing and becomes 0.
        window: a key this many positions back, or more, is not seen; None has no limit.
        softcap: c bends logits to c * tanh(logits / c).
    """
    length = q.shape[3]
    padded = -(-length // SIZES[-1]) * SIZES[-1]
    block = next(size for size in SIZES if padded % size == 0)
    longer = lambda x, axis: jnp.pad(x, [(0, padded - length if i == axis else 0) for i in range(x.ndim)])
    tokens = _tokens(*(longer(x, 1) for x in (segment_ids, role, positions)), window, block)
    out = _flash(_Static(block, softcap), longer(q, 3), longer(k, 2), longer(v, 2), tokens)
    return out[..., :length, :]


def _tokens(segment: Array, role: Array, positions: Array, window: int | Array | None, block: int) -> Tokens:
    segment, role, positions = (x.astype(jnp.int32) for x in (segment, role, positions))
    real, own, prompt = segment > 0, segment * ROLES + role, segment * ROLES
    unlimited = jnp.iinfo(jnp.int32).max
    window = jnp.asarray(unlimited if window is None else window, jnp.int32).reshape(1)
    queries = jnp.stack([jnp.where(real, own, -2), jnp.where(real, prompt, -2), positions], axis=1)
    keys = jnp.stack([jnp.where(real, own, -1), positions], axis=1)
    cut = lambda x: x.reshape(len(x), -1, block)

    def span(x: Array) -> tuple[Array, Array]:
        """The least and the greatest of every block's real tokens."""
        return jnp.min(cut(jnp.where(real, x, unlimited)), axis=2), jnp.max(cut(jnp.where(real, x, -1)), axis=2)

    def meet(x: Array) -> Array:
        """Where a block of queries and one of keys may hold the same number."""
        least, most = span(x)
        return (least[:, :, None] <= most[:, None, :]) & (least[:, None, :] <= most[:, :, None])

    def same(x: Array) -> Array:
        """Where a block of queries and one of keys hold one number, the same."""
        least, most = span(x)
        return (least[:, :, None] == most[:, None, :]) & (most[:, :, None] == least[:, None, :])

    (first_role, last_role), (first_position, last_position) = span(role), span(positions)
    number = jnp.arange(first_role.shape[1])
    live = meet(segment) & (number[:, None] >= number[None, :])
    live &= meet(role) | (first_role == 0)[:, None, :]
    live &= first_position[:, :, None] - last_position[:, None, :] < window
    full = jnp.all(cut(real), axis=2)
    whole = full[:, :, None] & full[:, None, :] & same(segment) & (number[:, None] > number[None, :])
    whole &= same(role) | (last_role == 0)[:, None, :]
    whole &= last_position[:, :, None] - first_position[:, None, :] < window
    return Tokens(queries, keys, live.astype(jnp.int32) + whole, window)


def _add_up(live: Array, add: Callable[[bool], None]) -> None:
    """What a block of queries has of a block of keys, without comparing tokens where all is seen."""
    pl.when(live == 1)(lambda: add(False))
    pl.when(live == 2)(lambda: add(True))


def _logits(
    static: _Static, whole: bool, q: Array, k: Array, queries: Array, keys: Array, window: Array, i: Any, j: Any
) -> tuple[Array, Array | None]:
    """(logits, what of them is seen, None is all) of block i of the queries and block j of the keys, each [keys, queries]."""
    logits = _product(k, q, 1, 1)
    if static.softcap is not None:
        logits = static.softcap * jnp.tanh(logits / static.softcap)
    if whole:
        return logits, None
    keys = keys.T
    code, position = keys[:, :1], keys[:, 1:]
    key = j * static.block + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    query = i * static.block + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    seen = ((code == queries[:1]) | (code == queries[1:2])) & (key <= query) & (queries[2:] - position < window)
    return jnp.where(seen, logits, UNSEEN), seen


def _product(x: Array, y: Array, axis: int, other: int) -> Array:
    """x and y contracted over one axis each, in float32."""
    precision = lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return lax.dot_general(x, y, (((axis,), (other,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _forward_kernel(static, live, window, q, k, v, queries, keys, out, lse, top, total, sums):
    b, i, j = pl.program_id(0), pl.program_id(3), pl.program_id(4)

    @pl.when(j == 0)
    def start():
        top[...] = jnp.full_like(top, LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def add(whole: bool):
        logits, _ = _logits(static, whole, q[...], k[...], queries[...], keys[...], window[0], i, j)
        highest = jnp.maximum(top[...], jnp.max(logits, axis=0, keepdims=True))
        weights = jnp.exp(logits - highest)
        fade = jnp.exp(top[...] - highest)
        top[...] = highest
        total[...] = total[...] * fade + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * fade + _product(v[...], weights.astype(v.dtype), 0, 0)

    _add_up(live[b, i, j], add)

    @pl.when(j == pl.num_programs(4) - 1)
    def end():
        out[...] = (sums[...] / jnp.maximum(total[...], 1e-30)).T.astype(out.dtype)
        lse[...] = top[...] + jnp.log(jnp.maximum(total[...], 1e-30))


def _gradients(static, whole, window, q, k, v, queries, keys, d_out, lse, inner, i, j) -> tuple[Array, Array]:
    """(weights, gradient by the logits) of two blocks; the weights are made again from the log-sum-exp of the forward pass."""
    logits, seen = _logits(static, whole, q[...], k[...], queries[...], keys[...], window[0], i, j)
    weights = jnp.exp(logits - lse[...])
    d_logits = weights * (_product(v[...], d_out[...], 1, 1) - inner[...])
    if static.softcap is not None:
        d_logits = d_logits * (1.0 - jnp.square(logits / static.softcap))
        d_logits = d_logits if whole else jnp.where(seen, d_logits, 0.0)
    return weights, d_logits


def _queries_kernel(static, live, window, q, k, v, queries, keys, d_out, lse, inner, d_q, sums):
    b, i, j = pl.program_id(0), pl.program_id(3), pl.program_id(4)

    @pl.when(j == 0)
    def start():
        sums[...] = jnp.zeros_like(sums)

    def add(whole: bool):
        _, d_logits = _gradients(static, whole, window, q, k, v, queries, keys, d_out, lse, inner, i, j)
        sums[...] += _product(d_logits.astype(k.dtype), k[...], 0, 0)

    _add_up(live[b, i, j], add)

    @pl.when(j == pl.num_programs(4) - 1)
    def end():
        d_q[...] = sums[...].astype(d_q.dtype)


def _keys_kernel(static, live, window, q, k, v, queries, keys, d_out, lse, inner, d_k, d_v, sums_k, sums_v):
    b, j, group, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((group == 0) & (i == 0))
    def start():
        sums_k[...] = jnp.zeros_like(sums_k)
        sums_v[...] = jnp.zeros_like(sums_v)

    def add(whole: bool):
        weights, d_logits = _gradients(static, whole, window, q, k, v, queries, keys, d_out, lse, inner, i, j)
        sums_v[...] += _product(weights.astype(v.dtype), d_out[...], 1, 0)
        sums_k[...] += _product(d_logits.astype(q.dtype), q[...], 1, 0)

    _add_up(live[b, i, j], add)

    @pl.when((group == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
    def end():
        d_k[...] = sums_k[...].astype(d_k.dtype)
        d_v[...] = sums_v[...].astype(d_v.dtype)


def _call(kernel, static: _Static, grid, places, tokens: Tokens, arrays, out, scratch) -> Any:
    """Run a kernel over a grid of blocks: compiled on TPUs, interpreted elsewhere.

    Args:
        kernel: of (static, live, window, blocks of the arrays, blocks of the results, scratch).
        grid: programs along every axis; the first is the row's, the last two run one after the other.
        places: place in the grid -> (row, key's head, head of its group, block of queries, block of keys). Where no query sees any of
            the keys it says what was there before, or will be next, so that nothing is fetched for nothing.
        tokens: who sees whom.
        arrays: (kind of block, array) pairs.
        out: (kind of block, shape and dtype) pairs.
        scratch: shapes of what a program keeps from one of its blocks to the next, float32.
    """
    block = static.block

    def spec(name: str, width: int) -> pl.BlockSpec:
        shapes = {
            "query": ((None, None, None, block, width), lambda b, h, g, i, j: (b, h, g, i, 0)),
            "key": ((None, None, block, width), lambda b, h, g, i, j: (b, h, j, 0)),
            "row": ((None, None, None, 1, block), lambda b, h, g, i, j: (b, h, g, 0, i)),
            "queries": ((None, 3, block), lambda b, h, g, i, j: (b, 0, i)),
            "keys": ((None, 2, block), lambda b, h, g, i, j: (b, 0, j)),
        }
        shape, place = shapes[name]
        return pl.BlockSpec(shape, lambda *at: place(*places(*at[: len(grid)])))

    given = [array for _, array in arrays]
    q = given[0]
    pairs = math.prod(q.shape[:3]) * q.shape[3] ** 2 // 2
    cost = pl.CostEstimate(
        flops=2 * pairs * q.shape[-1] * (2 if kernel is _forward_kernel else 3 if kernel is _queries_kernel else 4),
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in given),
        transcendentals=pairs,
    )

    def run(interpret: bool, *arguments: Array) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, static),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=[spec(name, array.shape[-1]) for name, array in arrays],
                out_specs=[spec(name, shape.shape[-1]) for name, shape in out],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[shape for _, shape in out],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2),
            cost_estimate=cost,
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*arguments)

    arguments = (tokens.live, tokens.window, *given)
    return lax.platform_dependent(*arguments, tpu=functools.partial(run, False), default=functools.partial(run, True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, q, k, v, tokens: Tokens):
    return _forward(static, q, k, v, tokens)[0]


def _up_to_query(b, h, g, i, j):
    return b, h, g, i, jnp.minimum(i, j)


def _forward(static: _Static, q, k, v, tokens: Tokens):
    B, K, G, T, H = q.shape
    blocks, block = T // static.block, static.block
    arrays = [("query", q), ("key", k), ("key", v), ("queries", tokens.queries), ("keys", tokens.keys)]
    out = [("query", jax.ShapeDtypeStruct(q.shape, q.dtype)), ("row", jax.ShapeDtypeStruct((B, K, G, 1, T), jnp.float32))]
    grid = (B, K, G, blocks, blocks)
    scratch = [(1, block), (1, block), (H, block)]
    found = _call(_forward_kernel, static, grid, _up_to_query, tokens, arrays, out, scratch)
    out, lse = (checkpoint_name(x, "context") for x in found)  # with both kept, the backward pass need not run this again
    return out, (q, k, v, tokens, out, lse)


def _backward(static: _Static, residuals, d_out):
    q, k, v, tokens, out, lse = residuals
    B, K, G, T, H = q.shape
    blocks, block = T // static.block, static.block
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, :, None]
    arrays = [("query", q), ("key", k), ("key", v), ("queries", tokens.queries), ("keys", tokens.keys), ("query", d_out)]
    arrays += [("row", lse), ("row", inner)]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    rest = (tokens, arrays)
    grid = (B, K, G, blocks, blocks)
    [d_q] = _call(_queries_kernel, static, grid, _up_to_query, *rest, [("query", like(q))], [(block, H)])
    grid, places = (B, K, blocks, G, blocks), lambda b, h, j, g, i: (b, h, g, jnp.maximum(i, j), j)
    d_k, d_v = _call(_keys_kernel, static, grid, places, *rest, [("key", like(k)), ("key", like(v))], [(block, H)] * 2)
    return d_q, d_k, d_v, None


_flash.defvjp(_forward, _backward)
