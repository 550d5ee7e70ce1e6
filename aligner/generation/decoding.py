"""Prefill and decode as two pure functions of a state; `aligner.generation.engine` says when which one runs.

All rows write at the same column of the cache, which goes round: a row that is filled later has its prompt put before the column where
the others stand. So a step writes one column whatever the rows' lengths, in place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aligner.generation.sampling import Sampling, sample
from aligner.logprobs import dense_logits
from aligner.models.cache import Cache, empty_cache
from aligner.models.decoder import text_config
from aligner.models.pictures import blank
from aligner.types import Batch, Model, Params


@struct.dataclass
class State:
    """B texts that are being written, and what has been written of them.

    Attributes:
        cache: of the tokens so far; `column` counts up and is taken modulo the number of columns.
        hidden: [B, D] state that predicts the next token.
        position: [B] of the next token.
        tokens, logps: [B, N] written so far.
        length: [B] how many those are.
        done: [B] whether a row is finished, or empty.
        uniform: [B, N] what each row's draws go by: what a row becomes does not depend on its neighbours.
        seen: [B, V] tokens of prompt and answer; None without a repetition penalty.
        ahead: [B] how far positions in time, rows and columns are ahead of `position`; None where there are none of them.
    """

    cache: Cache
    hidden: Float[Array, "B D"]
    position: Int[Array, "B"]
    tokens: Int[Array, "B N"]
    logps: Float[Array, "B N"]
    length: Int[Array, "B"]
    done: Bool[Array, "B"]
    uniform: Float[Array, "B N"]
    seen: Bool[Array, "B V"] | None
    ahead: Int[Array, "B"] | None


def empty_state(model: Model, sampling: Sampling, params: Params, rows: int, columns: int, slots: int) -> State:
    """No row is being written.

    Args:
        model, sampling, params: as in `fill`.
        rows: texts at once.
        columns: tokens of one, prompt and answer.
        slots: those of a prompt's pictures.
    """
    config = text_config(model)
    looks = _features(model, params, rows, slots) if config.cross_layers and slots else 0
    turns = model.media is not None and "rope_positions" in model.media.per_token
    head = model.head(params)
    width = head.weight.shape[1 if head.transposed else 0]
    new = (rows, sampling.max_new_tokens)
    zeros = jnp.zeros(rows, jnp.int32)
    return State(
        cache=empty_cache(config, rows, columns, head.weight.dtype, looks),
        hidden=jnp.zeros((rows, width), head.weight.dtype),
        position=zeros,
        tokens=jnp.zeros(new, jnp.int32),
        logps=jnp.zeros(new, jnp.float32),
        length=zeros,
        done=jnp.ones(rows, bool),
        uniform=jnp.zeros(new, jnp.float32),
        seen=jnp.zeros((rows, config.vocab_size), bool) if sampling.repetition_penalty != 1.0 else None,
        ahead=zeros if turns else None,
    )


def _features(model: Model, params: Params, rows: int, slots: int) -> int:
    """How many features `model.encode` gives for a row's pictures."""
    row = blank(model.media, 1, slots)
    batch = {name: jax.ShapeDtypeStruct((rows, *array.shape), array.dtype) for name, array in row.items()}
    return jax.eval_shape(model.encode, params, batch).shape[1]


def fill(model: Model, params: Params, state: State, batch: Batch, source: Int[Array, "B"], keys: Array) -> State:
    """Run prompts and let them take the places of finished rows.

    Args:
        model, params: params may have their layers apart (`aligner.models.cache.unroll`).
        state: which rows are finished.
        batch: [U, T] prompts, moved to the right: their last tokens stand in the last column.
        source: for every row of the state the prompt that it takes, -1 to leave it as it is. Samples of one prompt share its pass.
        keys: [B] of the rows' draws.
    """
    rows, length = batch["tokens"].shape
    columns = state.cache.positions.shape[1]
    features, nothing = model.encode(params, batch), empty_cache(text_config(model), rows, 0, state.hidden.dtype)
    output = model.apply(params, {**batch, "read": jnp.full((rows, 1), length - 1)}, features=features, cache=nothing)
    taken, prompt = source >= 0, jnp.maximum(source, 0)
    shift = (state.cache.column - length) % columns

    def place(old: Array, new: Array, axis: int, empty: int = 0) -> Array:
        padding = [(0, columns - length if i == axis else 0) for i in range(new.ndim)]
        new = jnp.roll(jnp.pad(new, padding, constant_values=empty), shift, axis=axis)[prompt]
        return jnp.where(taken.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    def choose(old: Array, new: Any) -> Array:
        return jnp.where(taken.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    real = batch["segment_ids"] > 0
    seen = None
    if state.seen is not None:
        mark = lambda row, tokens, real: row.at[tokens].max(real)
        seen = choose(state.seen, jax.vmap(mark)(jnp.zeros((rows, state.seen.shape[1]), bool), batch["tokens"], real)[prompt])
    def room(old: Array, new: Array) -> Array:
        return choose(old, jnp.pad(new, [(0, 0), *((0, a - b) for a, b in zip(old.shape[1:], new.shape[1:]))])[prompt])

    old, new = state.cache, output.cache
    cache = old.replace(
        keys=tuple(place(a, b, 2) for a, b in zip(old.keys, new.keys)),
        values=tuple(place(a, b, 2) for a, b in zip(old.values, new.values)),
        positions=place(old.positions, new.positions, 1, -1),
        media=None if old.media is None else place(old.media, new.media, 1),
        seen=jax.tree.map(lambda a: choose(a, jnp.zeros_like(a)), old.seen) if new.seen is None else jax.tree.map(room, old.seen, new.seen),
    )
    position = jnp.sum(real, axis=1).astype(jnp.int32)
    ahead = None
    if state.ahead is not None:
        turned = batch.get("rope_positions", batch["positions"][..., None])
        ahead = choose(state.ahead, (jnp.max(turned[:, -1], axis=-1) + 1 - position)[prompt])
    uniform = jax.vmap(lambda key: jax.random.uniform(key, state.uniform.shape[1:]))(keys)
    return state.replace(
        cache=cache,
        hidden=choose(state.hidden, output.hidden[:, 0][prompt]),
        position=choose(state.position, position[prompt]),
        tokens=choose(state.tokens, 0),
        logps=choose(state.logps, 0.0),
        length=choose(state.length, 0),
        done=choose(state.done, False),
        uniform=choose(state.uniform, uniform),
        seen=seen,
        ahead=ahead,
    )


def decode(model: Model, sampling: Sampling, params: Params, state: State, limit: Int[Array, ""], enough: Int[Array, ""]) -> State:
    """Write on until `limit` tokens have been added to every row, or so many rows are finished.

    Args:
        model, sampling, params: as in `fill`.
        state: some rows of which are not finished.
        limit: steps at most.
        enough: stop when so many rows are finished.
    """
    columns = state.cache.positions.shape[1]
    stops = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)
    head = model.head(params)
    rows = jnp.arange(len(state.done))

    def write(carry: tuple[Array, State]) -> tuple[Array, State]:
        step, state = carry
        logits = dense_logits(state.hidden, head)
        uniform = jnp.take_along_axis(state.uniform, state.length[:, None], axis=1, mode="clip")[:, 0]
        token, logp = sample(sampling, logits, uniform, state.seen)
        going = ~state.done
        token = jnp.where(going, token, 0)
        place = jnp.where(going, state.length, sampling.max_new_tokens)  # beyond the end: dropped
        length = state.length + going
        ended = jnp.any(token[:, None] == stops, axis=1) | (length >= sampling.max_new_tokens)
        batch = {
            "tokens": token[:, None],
            "positions": state.position[:, None],
            "segment_ids": going[:, None].astype(jnp.int32),
            "role": jnp.zeros_like(token)[:, None],
        }
        if state.ahead is not None:
            batch["rope_positions"] = jnp.repeat((state.position + state.ahead)[:, None, None], 3, axis=-1)
        output = model.apply(params, batch, cache=state.cache.replace(column=state.cache.column % columns))
        return step + 1, state.replace(
            cache=output.cache.replace(column=state.cache.column + 1),
            hidden=output.hidden[:, 0],
            position=state.position + going,
            tokens=state.tokens.at[rows, place].set(token, mode="drop"),
            logps=state.logps.at[rows, place].set(logp.astype(jnp.float32), mode="drop"),
            length=length,
            done=state.done | ended,
            seen=None if state.seen is None else state.seen.at[rows, token].max(going),
        )

    def goes_on(carry: tuple[Array, State]) -> Array:
        step, state = carry
        finished = jnp.sum(state.done)
        return (step < limit) & (finished < len(state.done)) & (finished < enough)

    return jax.lax.while_loop(goes_on, write, (jnp.zeros((), jnp.int32), state))[1]
