"""The two products of attention, each with its backward pass in the forms that are multiplied fastest.

On a CPU it is the memory order of the factors that counts: its libraries take half as long again, or widen bfloat16 to float32, where a
factor is contracted over the wrong axis. What is small, queries, keys or values, is turned then; the weights of all pairs never are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aligner.matmul import FEW_ROWS, accumulated, on_one_cpu, turned

Rows = Float[Array, "B K t H"]  # of queries, or their results and gradients; the heads that share a key follow one another
Keys = Float[Array, "B K s H"]
Pairs = Float[Array, "B K t s"]


def _product(equation: str, x: Array, y: Array) -> Array:
    """Accumulated and returned in at least float32."""
    return jnp.einsum(equation, x, y, **accumulated(x.dtype))


@jax.custom_vjp
def logits(q: Rows, k: Keys) -> Pairs:
    """Every query by every key, in at least float32; the gradient comes back in that and is rounded to the dtype of q, once."""
    plain = lambda q, k: _product("bkth,bksh->bkts", q, k)
    if q.dtype == jnp.bfloat16 or q.shape[2] <= FEW_ROWS:
        return plain(q, k)
    return on_one_cpu(lambda q, k: _product("bkht,bkhs->bkts", turned(q), turned(k)), plain, q, k)


def _logits_backward(residuals: tuple[Array, Array], g: Pairs) -> tuple[Array, Array]:
    q, k = residuals
    g = g.astype(q.dtype)
    return _product("bkts,bksh->bkth", g, k).astype(q.dtype), _by_keys(g, q)


logits.defvjp(lambda q, k: (logits(q, k), (q, k)), _logits_backward)


@jax.custom_vjp
def mix(logits: Pairs, v: Keys) -> Rows:
    """The values, mixed for every query by the softmax of its logits, which is rounded to the dtype of v.

    The backward pass keeps those weights alone; `jax.nn.softmax` would keep the exponentials too.
    """
    return _mix_forward(logits, v)[0]


def _mix_forward(logits: Pairs, v: Keys) -> tuple[Rows, tuple[Array, Array]]:
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)
    return _product("bkts,bksh->bkth", weights, v).astype(v.dtype), (weights, v)


def _mix_backward(residuals: tuple[Array, Array], g: Rows) -> tuple[Array, Array]:
    weights, v = residuals
    by_weights = _product("bkth,bksh->bkts", g, v)
    wide = weights.astype(by_weights.dtype)
    return wide * (by_weights - jnp.sum(wide * by_weights, axis=-1, keepdims=True)), _by_keys(weights, g)


mix.defvjp(_mix_forward, _mix_backward)


def _by_keys(pairs: Pairs, rows: Rows) -> Keys:
    """Summed over the queries, in the dtype of `rows`."""
    plain = lambda pairs, rows: _product("bkts,bkth->bksh", pairs, rows).astype(rows.dtype)
    if rows.dtype != jnp.bfloat16:
        return plain(pairs, rows)
    by_cpu = lambda pairs, rows: turned(_product("bkht,bkts->bkhs", turned(rows), pairs).astype(rows.dtype))
    return on_one_cpu(by_cpu, plain, pairs, rows)
