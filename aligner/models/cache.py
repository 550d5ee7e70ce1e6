"""What a decoder remembers of the tokens so far, for writing a text token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aligner.models import cross
from aligner.sharding import constrain
from aligner.types import Params

if TYPE_CHECKING:
    from aligner.models.decoder import DecoderConfig


@struct.dataclass
class Cache:
    """Keys and values of the tokens so far, for writing one text a row token by token.

    Attributes:
        keys, values: of every layer, [B, K, C, H] each: one array a layer, so that a step writes into it where it lies.
        positions: [B, C] of the columns, -1 where nothing stands.
        column: where the next tokens go.
        media: [B, C] which columns are media, where text and media are read apart; else None.
        seen: what the next token sees of pictures through cross layers; None where there are none of them.
    """

    keys: tuple[Float[Array, "B K C H"], ...]
    values: tuple[Float[Array, "B K C H"], ...]
    positions: Int[Array, "B C"]
    column: Int[Array, ""]
    media: Bool[Array, "B C"] | None = None
    seen: cross.Seen | None = None


def empty_cache(config: DecoderConfig, rows: int, columns: int, dtype: Any, looks: int = 0) -> Cache:
    """A cache in which nothing stands.

    Args:
        config: the decoder's.
        rows: texts.
        columns: room for so many tokens of each. With 0, the pass that is given the cache is the prompts': its mask is the same as
            without a cache, and the cache that it returns has its columns.
        dtype: of keys and values.
        looks: room for so many features of a row's pictures, where layers look at those.
    """
    shape = lambda count: (rows, config.num_key_value_heads, count, config.head_dim)
    zeros = lambda count: constrain(jnp.zeros(shape(count), dtype), "batch", "heads", None, None)
    layers = range(config.num_hidden_layers if columns else 0)
    return Cache(
        keys=tuple(zeros(columns) for _ in layers),
        values=tuple(zeros(columns) for _ in layers),
        positions=jnp.full((rows, columns), -1, jnp.int32),
        column=jnp.zeros((), jnp.int32),
        media=jnp.zeros((rows, columns), bool) if config.split_media else None,
        seen=cross.unseen(tuple((zeros(looks), zeros(looks)) for _ in config.cross_layers)) if looks else None,
    )


def unroll(params: Params) -> Params:
    """The tree of a decoder, or of a model that has one, with the decoder's layers apart instead of stacked, as a cached pass reads them.

    A tree that already is so is returned as it is.
    """
    if not {"embed_tokens", "layers"} <= params.keys():
        return {name: unroll(child) if isinstance(child, Mapping) else child for name, child in params.items()}
    if "0" in params["layers"]:
        return params
    apart = lambda stacked: {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(jax.tree.leaves(stacked)[0].shape[0])}
    return {name: apart(child) if name in ("layers", "cross_layers") else child for name, child in params.items()}


def remember(memory: tuple, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(keys and values to attend to [B,S,K,H], those to keep [B,K,S,H]).

    Args:
        memory: () keeps the new ones alone; (keys, values, column) writes them there.
        k, v: the new ones.
    """
    new = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if not memory:
        return (k, v), new
    *kept, column = memory
    kept = [jax.lax.dynamic_update_slice(old, part.astype(old.dtype), (0, 0, column, 0)) for old, part in zip(kept, new)]
    return tuple(y.swapaxes(1, 2) for y in kept), tuple(kept)
