"""Answers for many prompts: rows of a batch are filled again as soon as some are finished, so that one long answer holds up no batch."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aligner.generation import decoding
from aligner.generation.sampling import Sampling
from aligner.likelihood import cast
from aligner.matmul import turn
from aligner.models.cache import unroll
from aligner.models.decoder import outgrown, text_config
from aligner.models.pictures import Picture, blank, fill, placeholders
from aligner.train_step import jit
from aligner.types import Model, Params, UserError

STRIDE = 16  # tokens between looks for stop strings, which only the host can see


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
        tokens: int32 [n], images' placeholders in full number.
        pictures: as `aligner.data.modalities.load` gives them, or a function that does.
        source: the conversation and its images (PIL) that it was made of, for a server that reads them itself; None where there is none.
    """

    tokens: np.ndarray
    pictures: Sequence[Picture] | Callable[[], Sequence[Picture]] = ()
    source: tuple[Any, Sequence[Any]] | None = None


class Completion(NamedTuple):
    """An answer.

    Attributes:
        tokens: int32 [m], what ended it among them.
        logps: float32 [m], the model's log-probabilities of them at the sampling temperature.
        stopped: it ended by itself, not at `max_new_tokens`.
        own: bool [m], which tokens the model wrote; None: all. The others are an environment's, their logps 0.
    """

    tokens: np.ndarray
    logps: np.ndarray
    stopped: bool
    own: np.ndarray | None = None

    @property
    def written(self) -> np.ndarray:
        """bool [m]: which tokens the model wrote."""
        return np.ones(len(self.tokens), bool) if self.own is None else self.own


@dataclasses.dataclass(frozen=True)
class Engine:
    """The compiled programs that write answers of one model in one manner.

    Attributes:
        model, sampling: what writes and how.
        rows: texts that are written at once.
        detokenize: token ids -> text, for stop strings; special tokens stand in it, for a stop string may be one.
        prepare: parameters -> what `generate` takes: in the dtype of the computation, layers apart. Once per version of them.
        start, fill, decode: see `aligner.generation.decoding`.
    """

    model: Model
    sampling: Sampling
    rows: int
    detokenize: Callable[[np.ndarray], str] | None
    prepare: Callable[[Params], Params]
    start: Callable
    fill: Callable
    decode: Callable

    @property
    def programs(self) -> int:
        """How many programs have been compiled: one to decode and a few to fill for every bucket of prompt lengths."""
        return sum(function._cache_size() for function in (self.start, self.fill, self.decode))


def make_engine(model: Model, sampling: Sampling, *, rows: int = 8, dtype: str = "float32", detokenize: Callable | None = None) -> Engine:
    """The programs for a model and a manner of sampling; they are compiled when they are first needed."""
    if sampling.stop_strings and detokenize is None:
        raise ValueError("stop strings need `detokenize`")
    if model.media:
        sampling = dataclasses.replace(sampling, suppress_tokens=(*sampling.suppress_tokens, *model.media.tokens.values()))
    return Engine(
        model,
        sampling,
        rows,
        detokenize,
        prepare=jit(lambda params: turn(unroll(cast(params, dtype)))),
        start=jit(lambda params, *sizes: decoding.empty_state(model, sampling, params, rows, *sizes), static_argnums=(1, 2)),
        fill=jit(lambda params, *rest: decoding.fill(model, params, *rest), donate_argnums=1),
        decode=jit(lambda params, *rest: decoding.decode(model, sampling, params, *rest), donate_argnums=1),
    )


def generate(
    engine: Engine, params: Params, prompts: Sequence[Prompt], key: jax.Array, n: int = 1, ids: Sequence[int] | None = None
) -> Iterator[tuple[int, int, Completion]]:
    """Write n answers to every prompt.

    Args:
        engine: from `make_engine`.
        params: from `engine.prepare`.
        prompts: of any length.
        key: of all draws.
        n: answers to each; they share the prompt's pass.
        ids: numbers of the prompts, their places if None. An answer depends on (key, number, which of the n), not on what else is written.

    Yields:
        (place of the prompt, which of its n answers, Completion) in the order in which they are finished.
    """
    if not len(prompts):
        return
    sampling, rows = engine.sampling, engine.rows
    check_growth(engine.model, np.array([len(prompt.tokens) for prompt in prompts]), sampling.max_new_tokens)
    ids = range(len(prompts)) if ids is None else ids
    columns = bucket(max(len(prompt.tokens) for prompt in prompts)) + sampling.max_new_tokens
    crosses = text_config(engine.model).cross_layers  # which keep what they read; there a token stands for each picture
    slots = max(int(np.sum(prompt.tokens == engine.model.media.placeholder)) for prompt in prompts) if crosses else 0
    state = engine.start(params, columns, slot_bucket(slots))
    waiting = deque((place, sample) for place in range(len(prompts)) for sample in range(n))
    owner: list[tuple[int, int] | None] = [None] * rows
    looked = [0] * rows  # tokens in which stop strings have been looked for
    stride = min(STRIDE, sampling.max_new_tokens) if sampling.stop_strings else sampling.max_new_tokens
    while waiting or any(owner):
        free = [row for row in range(rows) if owner[row] is None]
        taken = {row: waiting.popleft() for row in free[: len(waiting)]}
        if taken:
            places = list(dict.fromkeys(place for place, _ in taken.values()))
            source = np.full(rows, -1, np.int32)
            numbers = np.zeros((rows, 2), np.int32)
            for row, (place, sample) in taken.items():
                owner[row], looked[row] = (place, sample), 0
                source[row], numbers[row] = places.index(place), (ids[place], sample)
            batch = lay_out([prompts[place] for place in places], engine.model)
            state = engine.fill(params, state, batch, source, _row_keys(key, numbers))
        enough = max(1, rows // 4) if waiting else rows + 1
        state = engine.decode(params, state, np.int32(stride), np.int32(enough + owner.count(None)))
        done, length = jax.device_get((state.done, state.length))
        if not done.any() and not sampling.stop_strings:
            continue
        tokens, logps = jax.device_get((state.tokens, state.logps))
        ended = done.copy()
        for row in range(rows):
            if owner[row] is None:
                continue
            size, stopped = int(length[row]), False
            if sampling.stop_strings:
                cut = _stop(engine, tokens[row, :size], looked[row])
                looked[row], stopped, size, ended[row] = size, cut is not None, cut or size, ended[row] or cut is not None
            if ended[row]:
                text = tokens[row, :size].copy()
                stopped = stopped or (size > 0 and int(text[-1]) in sampling.stop_tokens)
                yield (*owner[row], Completion(text, logps[row, :size].copy(), stopped))
                owner[row] = None
        if (ended != done).any():
            state = state.replace(done=jnp.asarray(ended))


def check_growth(model: Model, lengths: np.ndarray, new: int) -> None:
    """Refuse to write `new` tokens after prompts of these lengths [N] where the model has no positions for a text's end, or what is
    remembered of a text would not hold to it."""
    text = text_config(model)
    longest, known = lengths.max(), text.learned_positions - text.position_offset
    if text.learned_positions and longest + new > known:
        raise UserError(
            f"this {model.family} has learned {known} positions, and a prompt of {longest} tokens and {new} new ones may grow past them: "
            f"let both together be at most {known}"
        )
    if limit := outgrown(model, lengths, lengths + new):
        raise UserError(
            f"beyond {limit} tokens this {model.family} turns all of a text otherwise (its rope_type goes by the length), which would "
            f"have to be read anew for every token; a prompt of {lengths.max()} tokens and {new} new ones may grow past that: "
            f"let both together be at most {limit}"
        )


def generate_all(
    engine: Engine, params: Params, prompts: Sequence[Prompt], key: jax.Array, n: int = 1, **options: Any
) -> list[list[Completion]]:
    """`generate` to the end: for every prompt its n answers."""
    found = {(place, sample): completion for place, sample, completion in generate(engine, params, prompts, key, n, **options)}
    return [[found[place, sample] for sample in range(n)] for place in range(len(prompts))]


def bucket(size: int, parts: int = 2) -> int:
    """The least size from 16 on that is not below `size`, of those that cut every doubling in `parts`: 16, 24, 32, 48, 64, 96, .. in two.

    Few shapes, of which none is filled to less than parts / (parts + 1).
    """
    power = 16
    while 2 * power <= size:
        power *= 2
    step = max(1, power // parts)
    return max(power, -(-size // step) * step)


def slot_bucket(slots: int) -> int:
    """The least power of two that is not below `slots`; 0 stays."""
    return slots and 1 << (slots - 1).bit_length()


def lay_out(prompts: Sequence[Prompt], model: Model) -> dict[str, np.ndarray]:
    """Prompts as a batch for `fill`: moved to the right, in a bucket of rows and columns. What fills the bucket is never read."""
    length = bucket(max(len(prompt.tokens) for prompt in prompts))
    pictures = [prompt.pictures() if callable(prompt.pictures) else prompt.pictures for prompt in prompts]
    slots = max(sum(len(picture.arrays["pixel_values"]) for picture in of_prompt) for of_prompt in pictures)
    slots = slot_bucket(slots)
    rows = []
    for prompt, of_prompt in zip(prompts, pictures):
        row = _blank(model, length, slots)
        start = length - len(prompt.tokens)
        row["tokens"][start:] = prompt.tokens
        row["positions"][start:] = np.arange(len(prompt.tokens))
        row["segment_ids"][start:] = 1
        if slots:
            places = placeholders(row["tokens"], model.media)
            row["media_index"] = np.where(places, np.cumsum(places) - 1, -1).astype(np.int32)
            fill(row, of_prompt, model.media)
        rows.append(row)
    rows += [_blank(model, length, slots)] * ((1 << (len(prompts) - 1).bit_length()) - len(prompts))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _blank(model: Model, length: int, slots: int) -> dict[str, np.ndarray]:
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "positions", "segment_ids", "role")}
    return row | (blank(model.media, length, slots) if slots else {})


@jax.jit
def _row_keys(key: jax.Array, numbers: np.ndarray) -> jax.Array:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(numbers)


def _stop(engine: Engine, tokens: np.ndarray, looked: int) -> int | None:
    """How many tokens stand up to the end of the first stop string; None where there is none."""
    strings: Any = engine.sampling.stop_strings
    if not any(string in engine.detokenize(tokens) for string in strings):
        return None
    first = next(count for count in range(looked + 1, len(tokens) + 1) if _holds(engine.detokenize(tokens[:count]), strings))
    return first


def _holds(text: str, strings: Sequence[str]) -> bool:
    return any(string in text for string in strings)
