"""The dataset as training sees it: a census of all rows once, then batches whose content is a pure function of (seed, position)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data import audio, layout, mixture, modalities, packing, tokens, turns
from aligner.data.census import check_census, describe, take_census
from aligner.data.kinds import ANSWERS, ENCODERS, Kind
from aligner.data.samples import Bad
from aligner.data.templates import Encoded, media_token
from aligner.data.together import Steps, encoder
from aligner.models.pictures import blank
from aligner.models.pictures import fill as fill_slots
from aligner.types import Model, UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows that passed the census, and how to turn them into arrays.

    Attributes:
        name: the config section it came from, e.g. "data.train".
        size: rows of an epoch, as batches count them: one an example unless they are packed.
        row_ids: [N] int64, numbers in the source of the kept rows, ascending, as often as they stand in an epoch; `example_id` in a
            batch is one of these.
        rows_total: number of rows of the source; columns computed per example have so many rows.
        dropped: reason -> (count, up to three row numbers).
        report: lines for people: what was read, dropped, and how long examples are.
        fingerprint: sha256 over row numbers, token ids, image bytes, image-processor settings, the chat template, and what is packed
            with what.
        shape: (T, S, I) of every batch: columns, scored positions, images of a row.
        examples: G, places for examples in a row.
        answers: R, the most answers that an example has.
        fill: share of all columns that hold a token.
        row: number below `size` -> the arrays of that row (aligner.types.Batch without the leading B); -1 gives an empty row.
        workers: threads that read ahead.
        details: reason -> what was wrong with the first row dropped for it.
        raw: number in the source -> (what people call the row, the row as the dataset has it).
        lengths: [size], how many columns of each row hold a token.
        texts: [N, 2], tokens of each example's prompt, and of prompt and longest answer at most.
    """

    name: str
    size: int
    row_ids: np.ndarray
    rows_total: int
    dropped: Mapping[str, tuple[int, list[int]]]
    report: tuple[str, ...]
    fingerprint: str
    shape: tuple[int, int, int]
    examples: int
    answers: int
    fill: float
    row: Callable[[int], layout.Row]
    workers: int = 8
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)
    raw: Callable[[int], tuple[str, Any]] | None = None
    lengths: np.ndarray | None = None
    texts: np.ndarray | None = None


def load_dataset(
    config: Any, split: str, model: Model, needs: str = "preference", *, cache_dir: str | Path | None = None, progress: bool | None = None
) -> Dataset:
    """Open `config.data[split]`, look at every row once, and say what will be trained on.

    Args:
        config: the whole config; its `data` section and `seed` are read.
        split: "train", "eval", or "evals.NAME".
        model: its assets (tokenizer, processor) and media sizes; no parameters.
        needs: the kind of sample the algorithm takes, a key of ENCODERS.
        cache_dir: where the result of the census is kept for the next start; None keeps nothing.
        progress: show a bar; None shows it on process 0, in a terminal.

    Raises:
        UserError: missing file, missing columns, no row left, more bad rows than `config.data.max_bad_fraction`, images for a text model.
    """
    name, data, seed = f"data.{split}", config.data, config.get("seed", 0)
    source = functools.reduce(lambda section, key: section[key], split.split("."), data)
    if needs not in ENCODERS:
        raise UserError(f"config.{name}: samples of kind {needs!r} cannot be made yet; there is {', '.join(ENCODERS)}.")
    kind = ENCODERS[needs]
    if data.get("loss_on", "assistant") not in turns.LOSS_ON:
        raise UserError(f"config.data.loss_on is {data.loss_on!r}; it must be one of {', '.join(turns.LOSS_ON)}.")
    rows = mixture.open_samples(source, name, kind, seed, unpaired=needs.startswith("unpaired"))
    check_assets(model)
    model = modalities.looking_in(model, None, data.get("video_frames"))
    seeing = lambda index: modalities.looking_in(model, rows.folder(index))
    workers = threads(model, data)

    @encoder
    def encode(index: int) -> Steps:
        return (yield from kind.encode.steps(rows.read(index), seeing(index), data))

    census = take_census(
        encode.steps,
        rows,
        model,
        None if needs == "text" else data.max_length,
        name,
        key=[needs, data.get("loss_on", "assistant")],
        cache_dir=cache_dir,
        workers=workers,
        progress=progress,
    )
    check_census(census, rows, name, data.max_bad_fraction)
    stored = tokens.reader(census.tokens, census.ends) if census.tokens else lambda place: None

    def load(place: int) -> Encoded:
        return stored(place) or encode(int(census.row_ids[place]))

    fingerprint, sizes = census.fingerprint, census.sizes
    if needs == "text":
        example = _pieces(load, workers)
    elif kind.mismatched:
        if len(census.row_ids) < 2:
            raise UserError(
                f"config.{name}: one row of {rows.description} is left, but each needs the answer of another; give two or more."
            )
        partner = packing.derangement(census.row_ids, seed)
        example, sizes = _mismatched(load, sizes, partner, data.max_length)
        fingerprint = _with(fingerprint, partner)
    else:
        example = lambda place, *_: load(place)
    places, fingerprint = of_epoch(census.row_ids, rows.repeats, fingerprint)
    row_ids, sizes = census.row_ids[places], sizes[places]
    plan, (T, S, I) = make_plan(sizes, data, needs, seed)
    if data.get("packing", False):  # by the seed, and what was computed row by row holds for the very rows alone
        fingerprint = _with(fingerprint, *plan)
    G, answers = int(np.diff(plan.starts).max()), int(sizes[:, 3].max())

    def row(number: int) -> layout.Row:
        members = plan.row(number) if number >= 0 else np.zeros((0, 3), np.int64)
        ids = row_ids[members[:, 0]]
        try:
            examples = [example(int(places[member]), *piece) for member, *piece in members.tolist()]
            made = layout.lay_out(examples, ids, T, S, I, model.media, data.shared_prompt, G, kind.last, kind.prompt)
            pictures = [picture for i, one in zip(ids, examples) for picture in modalities.load(one.media, seeing(i))]
        except Bad as error:
            where = f"row {rows.name(ids[0])}" if len(ids) == 1 else f"one of the rows {', '.join(map(rows.name, ids))}"
            raise UserError(f"{name}, {where} of {rows.description} could be read when the run started, now not: {error}.") from error
        fill_slots(made, pictures, model.media)
        return made | _values(examples, kind, G, answers)

    lengths = np.minimum(T, plan.lengths(_columns(sizes, data)))
    fill = float(lengths.sum() / (T * len(plan)))
    report = [*describe(census, rows, name, rows.formatter, model)]
    report += ["  every pair makes two rows, one for each answer"] if rows.pairs else []
    shown = "image" if model.media is None else model.media.kind
    report += [f"  every row: T={T} columns, S={S} scored positions, I={I} {shown}s"]
    if needs == "text" or data.get("packing", False):
        report += [f"  packed into {len(plan)} rows of at most {G} examples; {fill:.1%} of their columns are filled"]
    return Dataset(
        name=name,
        size=len(plan),
        row_ids=row_ids,
        rows_total=len(rows),
        dropped=census.dropped,
        report=tuple(report),
        fingerprint=fingerprint,
        shape=(T, S, I),
        examples=G,
        answers=answers,
        fill=fill,
        row=row,
        workers=workers,
        details=census.details,
        raw=lambda index: (rows.name(index), rows.raw(index)),
        lengths=lengths,
        texts=np.stack([sizes[:, 0], np.minimum(sizes[:, 0] + sizes[:, 1], data.max_length)], axis=1),
    )


def of_epoch(row_ids: np.ndarray, repeats: np.ndarray | None, fingerprint: str) -> tuple[np.ndarray, str]:
    """(places in `row_ids` [N] of the kept rows, as often as each stands in an epoch; a fingerprint that takes that in, too).

    Args:
        row_ids: numbers in the source of the kept rows.
        repeats: of every row of the source, how often it stands in an epoch; None: each once.
        fingerprint: of the rows.
    """
    places = np.arange(len(row_ids))
    if repeats is None:
        return places, fingerprint
    places = np.repeat(places, repeats[row_ids])
    return places, _with(fingerprint, places)


def endless(size: int, shuffle: bool, seed: int) -> Callable[[int], int]:
    """Place in an endless order of `size` things -> which of them stands there; shuffled, every pass has an order of its own."""
    import grain

    order = grain.MapDataset.range(size)
    order = (order.seed(seed % 2**32).shuffle() if shuffle else order).repeat()  # place k is in pass k // size
    return lambda place: int(order[place])


def _with(fingerprint: str, *arrays: np.ndarray) -> str:
    """A fingerprint that takes these in, too."""
    return hashlib.sha256(fingerprint.encode() + b"".join(array.tobytes() for array in arrays)).hexdigest()


def make_plan(sizes: np.ndarray, data: Any, needs: str, seed: int) -> tuple[packing.Plan, tuple[int, int, int]]:
    """Which examples stand in which row, and the shape (T, S, I) that holds every row.

    Args:
        sizes: [N,6] as `Census` has them.
        data: config.data.
        needs: key of ENCODERS.
        seed: of the order in which examples are packed.

    Raises:
        UserError: `packed_length` holds not even one of the examples.
    """
    prompt, _, scored, answers, images, _ = sizes.T
    kind = ENCODERS[needs]
    scored = scored + prompt if kind.prompt else scored
    columns, multiple, length = _columns(sizes, data), data.pad_to_multiple, data.get("packed_length")
    longest = int(columns.max())
    if needs == "text":  # the first token of a piece is not scored, but that is all
        T = S = min(data.max_length, layout.round_up(int(columns.sum()), multiple))
        return packing.cut_stream(columns, T), (T, S, 0)
    if data.get("packing", False):
        T = length or layout.round_up(max(data.max_length, longest), multiple)
        if longest > T:
            raise UserError(f"config.data.packed_length is {length}, but the longest example takes {longest} columns; set at least that.")
        plan = packing.first_fit(columns, T, seed if data.get("shuffle", True) else None)
    else:
        T, plan = layout.round_up(longest, multiple), packing.one_per_row(len(columns))
    S = int(plan.sums(answers).max()) if kind.last else layout.round_up(int(plan.sums(scored).max()), multiple)
    return plan, (T, S, int(plan.sums(images).max()))


def _columns(sizes: np.ndarray, data: Any) -> np.ndarray:
    """[N]: how many columns each example takes."""
    return sizes[:, 0] * (1 if data.shared_prompt else np.maximum(1, sizes[:, 3])) + sizes[:, 1]


def _values(examples: list[Encoded], kind: Kind, G: int, answers: int) -> layout.Row:
    made = {}
    for column, shape in kind.values.items():
        made[column] = np.zeros((G, *(answers if size == ANSWERS else size for size in shape)), np.float32)
        for place, encoded in enumerate(examples):
            value = np.asarray(encoded.values[column], np.float32)
            made[column][(place, *map(slice, value.shape))] = value
    return made


def _pieces(load: Callable[[int], Encoded], workers: int) -> Callable[[int, int, int], Encoded]:
    """Pieces of documents. A long document stands in many rows, so the latest ones are kept, each tokenised by one thread alone."""
    kept, lock = functools.lru_cache(maxsize=4 * workers)(load), threading.Lock()

    def example(place: int, start: int, end: int) -> Encoded:
        with lock:
            encoded = kept(place)
        return turns.piece(encoded, start, end)

    return example


def _mismatched(
    load: Callable[[int], Encoded], sizes: np.ndarray, partner: np.ndarray, max_length: int
) -> tuple[Callable[[int, int, int], Encoded], np.ndarray]:
    """Examples with another row's answer, as it is tokenised there, after their own prompt; and their sizes. What of it exceeds
    `max_length` is cut: it serves an estimate over many rows, and its own row has it whole."""

    def example(place: int, *_: int) -> Encoded:
        encoded, other = load(place), load(int(partner[place]))
        return encoded._replace(answers=(*encoded.answers, other.answers[0][: max_length - len(encoded.prompt)]))

    sizes = sizes.copy()
    added = np.minimum(sizes[partner, 1], max_length - sizes[:, 0])
    sizes[:, 1] += added
    sizes[:, 2] += added
    sizes[:, 3] = 2
    return example, sizes


def threads(model: Model, data: Any) -> int:
    """How many read ahead: `config.data.workers` where media are decoded; those that only handle text would wait for each other."""
    return 1 if model.media is None else data.workers


def check_assets(model: Model) -> None:
    """Fail early where a checkpoint's tokenizer, processor and model do not fit each other.

    Raises:
        UserError: no tokenizer or processor, another placeholder, another image size.
    """
    assets = model.assets
    if assets is None or assets.tokenizer is None:
        raise UserError("the model brings no tokenizer; put tokenizer.json and tokenizer_config.json into the checkpoint folder.")
    if model.media is None:
        return
    kind, processor = model.media.kind, modalities.processor(model)
    if processor is None:
        missing = f"{assets.folder} has no {kind} processor; put preprocessor_config.json into it"
        raise UserError(f"the {model.family} model takes {kind}s, but {missing}.")
    if kind == "audio" and processor.sampling_rate != audio.RATE:
        rate = f"{processor.sampling_rate}, {audio.RATE} is implemented"
        raise UserError(f"sampling_rate in preprocessor_config.json of {assets.folder} is {rate}; choose a checkpoint that has it.")
    for kind, placeholder in model.media.tokens.items():
        token, (shown, picture) = media_token(assets, kind), modalities.probe(kind, model)
        written = assets.tokenizer(shown.text or token, add_special_tokens=False)["input_ids"]
        if written.count(placeholder) != len(shown.runs):
            raise UserError(
                f"the tokenizer in {assets.folder} gives {token} the id {assets.tokenizer.convert_tokens_to_ids(token)}, but "
                f"{kind}_token_index in its config.json is {placeholder}; fetch both again from one source."
            )
        found, wanted = picture.arrays["pixel_values"].shape[1:], blank(model.media, 1, 1)["pixel_values"].shape[1:]
        if found != wanted:
            size = lambda shape: " x ".join(map(str, shape[:2] if shape[2:] == (3,) else shape))
            settings = "feature_size and chunk_length" if kind == "audio" else "size and crop_size"
            raise UserError(
                f"the {kind} processor gives {kind}s of {size(found)}, the model's {'audio' if kind == 'audio' else 'vision'} tower takes "
                f"{size(wanted)}; set {settings} in {'video_' if kind == 'video' else ''}preprocessor_config.json."
            )


class Batches:
    """An iterator over batches, each a dict of NumPy arrays [b, ...].

    Its state is the number of the next batch, nothing else: batches read ahead by threads do not count, and a state is good for any
    number of processes and threads.
    """

    def __init__(self, make: Callable[[int], Any], start: int):
        self._make, self._next, self._iterator = make, start, None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:  # late, so that set_state costs nothing
            self._iterator = iter(self._make(self._next))
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """A JSON-able state: the number of the batch that comes next."""
        return {"next_batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue where a state was taken."""
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Stop reading ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def batches(
    dataset: Dataset, batch_size: int, *, seed: int, shuffle: bool, epochs: float | None = None, rows: Any = slice(None), start: int = 0
) -> Batches:
    """Training batches: every epoch in a new order, running over the borders of epochs so that no row is left out.

    What stands at row r of batch k depends on (seed, k * batch_size + r) alone, packed or not.

    Args:
        dataset: from `load_dataset`.
        batch_size: rows of the global batch.
        seed: of the order.
        shuffle: False keeps the order of the source.
        epochs: passes over the dataset; the last batch is filled from the next pass. None never ends.
        rows: which rows of the global batch this process loads (a slice or an index array).
        start: number of the first batch.

    Returns:
        An iterator with get_state and set_state.
    """
    count = None if epochs is None else math.ceil(round(epochs * dataset.size / batch_size, 6))
    return _stream(dataset, batch_size, endless(dataset.size, shuffle, seed), count, rows, start)


def eval_batches(dataset: Dataset, batch_size: int, *, rows: Any = slice(None)) -> Batches:
    """One pass in order. The last batch is filled with empty rows (example_id -1), in which nothing is scored or counted."""
    row_of = lambda k: k if k < dataset.size else -1
    return _stream(dataset, batch_size, row_of, math.ceil(dataset.size / batch_size), rows, 0)


def _stream(dataset: Dataset, batch_size: int, row_of: Callable[[int], int], count: int | None, rows: Any, start: int) -> Batches:
    import grain

    local = np.arange(batch_size)[rows]
    b = len(local)
    end = np.iinfo(np.int64).max // 2 if count is None else count * b

    def load(k: int) -> layout.Row:
        return dataset.row(row_of(k // b * batch_size + int(local[k % b])))

    def make(first: int) -> Any:
        if first * b >= end:
            return iter(grain.MapDataset.range(0).to_iter_dataset())
        if dataset.workers == 1:
            batched = grain.MapDataset.range(first, end // b).map(lambda n: _stack([load(k) for k in range(n * b, n * b + b)]))
            return iter(batched.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
        examples = grain.MapDataset.range(first * b, end).map(load)  # threads share out examples, not batches: less waits in memory
        ahead = grain.ReadOptions(num_threads=dataset.workers, prefetch_buffer_size=max(2 * b, dataset.workers))
        return iter(examples.to_iter_dataset(ahead).batch(b, batch_fn=_stack))

    return Batches(make, start)


def _stack(rows: list[layout.Row]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def attach(batch: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add columns that were computed per example.

    Args:
        batch: has `example_id` [B,G].
        columns: name -> [rows_total, ...], indexed by row number.

    Returns:
        The batch with name -> [B,G,...] added; 0 where there is no example.
    """
    ids = np.asarray(batch["example_id"])
    added = {}
    for name, column in columns.items():
        values = np.asarray(column)[np.maximum(ids, 0)]
        added[name] = np.where((ids >= 0).reshape(ids.shape + (1,) * (values.ndim - ids.ndim)), values, np.zeros((), values.dtype))
    return {**batch, **added}
