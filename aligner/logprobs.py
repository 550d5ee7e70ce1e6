"""Token statistics from hidden states and the head, a chunk at a time: the only place where vocabulary-sized arrays exist.

A chunk of positions is multiplied by the head in full, reduced to a few numbers per token, and forgotten; the backward pass makes it
again, or keeps it where there is but one. Values and gradients equal those of the dense computation; memory is one chunk of logits and
the head's gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from aligner.losses.distillation import generalized_jsd, generalized_jsd_gradient
from aligner.losses.partial_distillation import few_tokens_jsd, likeliest
from aligner.matmul import after, dot, dot_turned, weight_gradient, wide
from aligner.sharding import alone, constrain, parts_of
from aligner.types import Head

CHUNK_ELEMENTS = 2**26  # logits held at once, per part of the batch: 256 MiB in float32

# What can be asked for, each [B,S] in float32 or wider. Only DIFFERENTIABLE ones carry a gradient.
NAMES = (
    "logp",  # log-probability of the target
    "lse",  # log-sum-exp of the logits
    "entropy",  # of the next-token distribution, in nats
    "correct",  # 1.0 where no token is more likely than the target
    "mean_logit",  # mean over the vocabulary
    "sum_p2",  # sum over the vocabulary of p^2
)
DIFFERENTIABLE = ("logp", "lse", "entropy")


class _Static(NamedTuple):
    names: tuple[str, ...]
    chunk: int
    transposed: bool
    scale: float
    softcap: float | None


def token_stats(
    hidden: Float[Array, "B S D"],
    head: Head,
    targets: Int[Array, "B S"],
    names: Sequence[str] = ("logp",),
    chunk: int | None = None,
) -> dict[str, Float[Array, "B S"]]:
    """Statistics of the next-token distribution at every position.

    Args:
        hidden: [B, S, D] states that predict the targets.
        head: weight [D, V] or, transposed, [V, D]. When it is not differentiated (frozen), its gradient is not computed.
        targets: [B, S] token ids.
        names: which of NAMES to compute; `logp`, `lse` and `entropy` are differentiable, the others are constants.
        chunk: positions per chunk along S; default: as many as keep a chunk of logits within CHUNK_ELEMENTS.

    Returns:
        {name: [B, S]} in float32, or wider if `hidden` is.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown token statistics {unknown}; known are {NAMES}")
    rows, length, _ = hidden.shape
    static = _Static(tuple(names), _size(rows, length, head, chunk), head.transposed, head.scale, head.softcap)
    with jax.named_scope("token_stats"):
        weight = head.weight.astype(hidden.dtype)
        return _stats(static, hidden, weight, head.bias, targets)


DIVERGENCE = ("divergence", "agreement")  # what `divergence` returns; only the first carries a gradient


class TopK(NamedTuple):
    """Which tokens a divergence is taken over; see `aligner.losses.partial_distillation`."""

    k: int
    of: str  # student, teacher or both
    add_tail: bool


class _Divergence(NamedTuple):
    student: _Static
    teacher: _Static
    beta: float
    temperature: float
    top_k: TopK | None


def divergence(
    hidden: Float[Array, "B S D"],
    head: Head,
    teacher_hidden: Float[Array, "B S E"],
    teacher_head: Head,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int | None = None,
    top_k: TopK | None = None,
) -> dict[str, Float[Array, "B S"]]:
    """The generalised Jensen-Shannon divergence of next-token distributions at every position; see `aligner.losses.distillation`.

    Args:
        hidden: [B, S, D] states of the student; carries a gradient, and so does its head.
        head: of the student.
        teacher_hidden: [B, S, E] states of the teacher at the same positions; constant, and so is its head.
        teacher_head: over the same vocabulary.
        beta: in [0, 1]; 0 is the forward, 1 the reverse Kullback-Leibler divergence.
        temperature: > 0; all logits are divided by it. The divergence is not multiplied by its square.
        chunk: positions per chunk along S, as in `token_stats`.
        top_k: only the likeliest tokens are compared; None compares all.

    Returns:
        `divergence` [B, S], and `agreement` [B, S]: 1.0 where both think the same token the likeliest; float32 or wider.
    """
    rows, length, _ = hidden.shape
    size = _size(rows, length, head, chunk, held=2)
    sides = [_Static((), size, h.transposed, h.scale, h.softcap) for h in (head, teacher_head)]
    with jax.named_scope("divergence"):
        teacher = jax.lax.stop_gradient((teacher_hidden, teacher_head.weight.astype(teacher_hidden.dtype), teacher_head.bias))
        static = _Divergence(*sides, float(beta), float(temperature), top_k)
        return _divergence(static, hidden, head.weight.astype(hidden.dtype), head.bias, *teacher)


def dense_logits(hidden: Float[Array, "... D"], head: Head) -> Float[Array, "... V"]:
    """All logits at once, for looking, testing and sampling one position."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    static = _Static((), 0, head.transposed, head.scale, head.softcap)
    return _logits(static, flat, head.weight.astype(hidden.dtype), head.bias).reshape(*hidden.shape[:-1], -1)


def _parts(rows: int) -> tuple[int, int]:
    """Over how many devices the rows lie, and the columns of each: every device holds only its part of a chunk."""
    by_row = parts_of("batch")
    return by_row if rows % by_row == 0 else 1, parts_of("length")


def _size(rows: int, length: int, head: Head, chunk: int | None, held: int = 1) -> int:
    """Columns of a chunk, as many of every part of a row; by default as many as keep `held` chunks of logits within CHUNK_ELEMENTS."""
    by_row, by_column = _parts(rows)
    if chunk is None:
        vocabulary = head.weight.shape[0 if head.transposed else 1]
        chunk = max(1, CHUNK_ELEMENTS * by_row * by_column // (held * vocabulary * rows))
    own = -(-length // by_column)
    pieces = -(-length // min(chunk, length))
    return -(-own // pieces) * by_column  # even pieces, so that little is padded


def _logits(static: _Static, hidden, weight, bias):
    """Logits of a chunk in float32 or wider: [..., V]."""
    if hidden.ndim == 3:
        hidden = constrain(hidden, "batch", "length", None)
    logits = dot_turned(hidden, weight) if static.transposed else dot(hidden, weight, ((hidden.ndim - 1,), (0,)))
    if bias is not None:
        logits = logits + bias
    if static.scale != 1.0:
        logits = logits * static.scale
    if static.softcap is not None:
        logits = static.softcap * jnp.tanh(logits / static.softcap)
    return logits


def _axes(static: _Static, width: str | None = None) -> tuple[str | None, ...]:
    return ("vocab", width) if static.transposed else (width, "vocab")


def _gathered(static: _Static, weight):
    """The head whole, but for the vocabulary's parts: a loop would gather again in every turn what it reads."""
    return constrain(weight, *_axes(static))


def _chunks(x: Array, size: int) -> Array:
    """[B, S, ...] -> [pieces, B, size, ...], padded with zeros: a piece of each part of a row, so that devices keep their own columns."""
    rows, rest, parts = len(x), x.shape[2:], _parts(len(x))[1]
    pad = lambda x, axis, to: jnp.pad(x, [(0, -x.shape[axis] % to if i == axis else 0) for i in range(x.ndim)])
    x = pad(x, 1, parts).reshape(rows, parts, -1, *rest)
    x = pad(x, 2, size // parts).reshape(rows, parts, -1, size // parts, *rest)
    return jnp.moveaxis(x, 2, 0).reshape(-1, rows, size, *rest)


def _unchunk(x: Array, length: int) -> Array:
    """Inverse of `_chunks`."""
    (pieces, rows, size), rest, parts = x.shape[:3], x.shape[3:], _parts(x.shape[1])[1]
    x = jnp.moveaxis(x.reshape(pieces, rows, parts, size // parts, *rest), 0, 2)
    x = x.reshape(rows, parts, -1, *rest)[:, :, : -(-length // parts)]
    return x.reshape(rows, -1, *rest)[:, :length]


def _scan(body, carry, chunks):
    """`lax.scan`, without a loop where there is one chunk."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, chunks)
    carry, out = body(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], out)


def _target_logit(logits, targets):
    """The logit of every target. Where the vocabulary may be sharded, by a mask, which stays local; else by a gather."""
    if alone():
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)


def _is_target(logits, targets):
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


def _chunk_stats(static: _Static, logits, targets) -> dict[str, Array]:
    top = jnp.max(logits, axis=-1)
    exp = jnp.exp(logits - top[..., None])
    total = jnp.sum(exp, axis=-1)
    lse = top + jnp.log(total)
    target = _target_logit(logits, targets)
    computed = {"logp": lambda: target - lse, "lse": lambda: lse, "correct": lambda: (target >= top).astype(lse.dtype)}
    # by an exponential of its own, which the barrier keeps apart: of one with two readers the compiler makes an array of all of it
    relative = logits - jax.lax.optimization_barrier(lse)[..., None]
    computed["entropy"] = lambda: -jnp.sum(jnp.exp(relative) * relative, axis=-1)
    computed["mean_logit"] = lambda: jnp.mean(logits, axis=-1)
    computed["sum_p2"] = lambda: jnp.sum(jnp.square(exp), axis=-1) / jnp.square(total)
    return {name: computed[name]() for name in static.names}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(static: _Static, hidden, weight, bias, targets):
    return _stats_and_logits(static, hidden, weight, bias, targets, keep=False)[0]


def _stats_and_logits(static: _Static, hidden, weight, bias, targets, keep: bool):
    weight = _gathered(static, weight)

    def body(_, chunk):
        states, ids = chunk
        logits = _logits(static, states, weight, bias)
        return None, (_chunk_stats(static, logits, ids), logits if keep else None)

    _, (stats, logits) = _scan(body, None, (_chunks(hidden, static.chunk), _chunks(targets, static.chunk)))
    return {name: _unchunk(stat, hidden.shape[1]) for name, stat in stats.items()}, logits


def _stats_forward(static: _Static, hidden, weight, bias, targets):
    kept = static._replace(names=tuple(dict.fromkeys([*static.names, "lse", *(["entropy"] if "entropy" in static.names else [])])))
    one = static.chunk >= hidden.value.shape[1]  # chunk: what was allowed to be held at once may as well be kept
    values = (hidden.value, weight.value, bias and bias.value, targets.value)
    stats, logits = _stats_and_logits(kept, *values, keep=one)
    residuals = (*values, stats["lse"], stats.get("entropy"), logits, _trains(weight, bias))
    return {name: stats[name] for name in static.names}, residuals


def _trains(weight, bias) -> tuple | None:
    """Whether the head is differentiated, told by structure, which survives as a residual: () is true, None false."""
    return () if weight.perturbed or (bias is not None and bias.perturbed) else None


def _head_zeros(static: _Static, weight, bias, trains, parts: tuple[int, int]):
    """What the gradient of the head starts from, in at least float32; (None, None) where it does not train.

    Each part of a batch has its own, so that it is sent once, not for every chunk.
    """
    if trains is None:
        return None, None
    zeros = lambda x, *logical: constrain(jnp.zeros((math.prod(parts), *x.shape), wide(weight.dtype)), "parts", *logical)
    return zeros(weight, *_axes(static)), None if bias is None else zeros(bias, "vocab")


def _through_head(static: _Static, d, logits, states, weight, bias, trains, parts: tuple[int, int]):
    """A chunk's gradient by its logits -> (by its states, (weight's, bias's) of each part of the batch)."""
    if static.softcap is not None:
        d = d * (1 - jnp.square(logits / static.softcap))
    d = d * static.scale if static.scale != 1.0 else d
    low = d.astype(states.dtype)
    d_states = dot(low, weight, ((low.ndim - 1,), (0 if static.transposed else 1,))).astype(states.dtype)
    if trains is None:
        return d_states, (None, None)
    states = after(d_states, states)
    factors = (low, states) if static.transposed else (states, low)
    # not mapped over one part: what a CPU turns in memory for its product cannot be
    d_weight = weight_gradient(*factors)[None] if parts == (1, 1) else jax.vmap(weight_gradient)(*(_by_part(x, parts) for x in factors))
    return d_states, (d_weight, None if bias is None else jnp.sum(_by_part(d, parts), axis=tuple(range(1, d.ndim))))


def _by_part(x: Array, parts: tuple[int, int]) -> Array:
    """[B, size, N] -> [parts, B of one, size of one, N]."""
    rows, columns = parts
    if parts == (1, 1):
        return x[None]
    x = x.reshape(rows, -1, columns, x.shape[1] // columns, x.shape[2])
    return jnp.moveaxis(x, 2, 1).reshape(rows * columns, x.shape[1], x.shape[3], x.shape[4])


def _summed(static: _Static, d_head, weight, bias):
    """The head's gradient over all parts of the batch, added up before it is rounded, and by each device the part of it that it trains."""
    total = lambda d, like, *logical: None if d is None else constrain(jnp.sum(d, axis=0), *logical).astype(like.dtype)
    return total(d_head[0], weight, *_axes(static, "embed")), total(d_head[1], bias, "vocab")


def _stats_backward(static: _Static, residuals, gradients):
    hidden, weight, bias, targets, lse, entropy, kept, trains = residuals
    gradients = {n: g for n, g in gradients.items() if n in DIFFERENTIABLE and not isinstance(g, SymbolicZero)}
    weight, parts = _gathered(static, weight), _parts(len(hidden))

    # tokens one after the other, as the product has them: the gradient by the logits then takes the place of the logits in memory
    flat = lambda x: x.reshape(-1, *x.shape[2:]) if alone() else x

    def body(carry, chunk):
        states, ids, lse, entropy, g, logits = jax.tree.map(flat, chunk)
        logits = _logits(static, states, weight, bias) if logits is None else logits
        p = jnp.exp(logits - lse[..., None])
        # d logp = onehot - p; d lse = p; d entropy = -p (log p + entropy)
        from_p = g.get("lse", 0.0) - g.get("logp", 0.0)
        d = p * jnp.broadcast_to(from_p, lse.shape)[..., None]
        if "logp" in g:
            d = d + jnp.where(_is_target(logits, ids), g["logp"][..., None], 0)
        if "entropy" in g:
            d = d - g["entropy"][..., None] * p * (logits - lse[..., None] + entropy[..., None])
        d_states, d_head = _through_head(static, d, logits, states, weight, bias, trains, parts)
        return jax.tree.map(jnp.add, carry, d_head), d_states.reshape(chunk[0].shape)

    arrays = (hidden, targets, lse, lse if entropy is None else entropy, gradients)
    chunks = (*jax.tree.map(lambda x: _chunks(x, static.chunk), arrays), kept)
    d_head, d_hidden = _scan(body, _head_zeros(static, weight, bias, trains, parts), chunks)
    return (_unchunk(d_hidden, hidden.shape[1]), *_summed(static, d_head, weight, bias), None)


_stats.defvjp(_stats_forward, _stats_backward, symbolic_zeros=True)


def _log_probs(static: _Divergence, student: tuple, teacher: tuple):
    """(logits of the student before the temperature, log p, log q) of a chunk, each [..., V]."""
    logits = _logits(static.student, *student)
    log_q = jax.nn.log_softmax(_logits(static.teacher, *teacher) / static.temperature)
    return logits, jax.nn.log_softmax(logits / static.temperature), log_q.astype(logits.dtype)


def _chunk_divergence(static: _Divergence, log_p, log_q):
    if static.top_k is None:
        return generalized_jsd(log_p, log_q, static.beta)
    k, of, add_tail = static.top_k
    return few_tokens_jsd(log_p, log_q, likeliest(log_p, log_q, k, of), static.beta, add_tail)


def _chunk_divergence_gradient(static: _Divergence, log_p, log_q):
    """By the logits of which `log_p` is the log-softmax."""
    if static.top_k is None:
        return generalized_jsd_gradient(log_p, log_q, static.beta)
    return jax.grad(lambda logits: jnp.sum(_chunk_divergence(static, jax.nn.log_softmax(logits), log_q)))(log_p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(static: _Divergence, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias):
    weight, teacher_head = _gathered(static.student, weight), (_gathered(static.teacher, teacher_weight), teacher_bias)

    def body(_, chunk):
        states, teacher_states = chunk
        _, log_p, log_q = _log_probs(static, (states, weight, bias), (teacher_states, *teacher_head))
        same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        return None, (_chunk_divergence(static, log_p, log_q), same.astype(log_p.dtype))

    size = static.student.chunk
    _, stats = _scan(body, None, (_chunks(hidden, size), _chunks(teacher_hidden, size)))
    return {name: _unchunk(stat, hidden.shape[1]) for name, stat in zip(DIVERGENCE, stats)}


def _divergence_forward(static: _Divergence, hidden, weight, bias, *teacher):
    values = [x and x.value for x in (hidden, weight, bias, *teacher)]
    return _divergence(static, *values), (values, _trains(weight, bias))


def _divergence_backward(static: _Divergence, residuals, gradients):
    (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias), trains = residuals
    g = gradients["divergence"]
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    teacher_head = _gathered(static.teacher, teacher_weight), teacher_bias
    weight, parts = _gathered(static.student, weight), _parts(len(hidden))

    def body(carry, chunk):
        states, teacher_states, g = chunk
        logits, log_p, log_q = _log_probs(static, (states, weight, bias), (teacher_states, *teacher_head))
        d = _chunk_divergence_gradient(static, log_p, log_q) * (g / static.temperature)[..., None]
        d_states, d_head = _through_head(static.student, d, logits, states, weight, bias, trains, parts)
        return jax.tree.map(jnp.add, carry, d_head), d_states

    chunks = jax.tree.map(lambda x: _chunks(x, static.student.chunk), (hidden, teacher_hidden, g))
    d_head, d_hidden = _scan(body, _head_zeros(static.student, weight, bias, trains, parts), chunks)
    return (_unchunk(d_hidden, hidden.shape[1]), *_summed(static.student, d_head, weight, bias), None, None, None)


_divergence.defvjp(_divergence_forward, _divergence_backward, symbolic_zeros=True)
