"""The dataset as training sees it: a census of all rows once, then batches whose content is a pure function of (seed, position)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data import formatters, layout, media, sources, templates
from aligner.data.census import check_census, describe, source_code, take_census
from aligner.data.samples import Bad, as_preference
from aligner.types import Model, UserError

ENCODERS = {"preference": lambda sample, model: templates.encode_preference(as_preference(sample), model.assets, model.media)}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows that passed the census, and how to turn one into arrays.

    Attributes:
        name: the config section it came from, e.g. "data.train".
        size: N, the number of kept rows.
        row_ids: [N] int64, their numbers in the source, ascending; `example_id` in a batch is one of these.
        rows_total: number of rows of the source; columns computed per example have so many rows.
        dropped: reason -> (count, up to three row numbers).
        report: lines for people: what was read, dropped, and how long examples are.
        fingerprint: sha256 over row numbers, token ids, image bytes, image-processor settings and the chat template.
        shape: (T, S, I) of every batch: columns, scored positions, images of a row.
        example: row number -> the arrays of its row (aligner.types.Batch without the leading B); -1 gives an empty row.
        workers: threads that read ahead.
    """

    name: str
    size: int
    row_ids: np.ndarray
    rows_total: int
    dropped: Mapping[str, tuple[int, list[int]]]
    report: tuple[str, ...]
    fingerprint: str
    shape: tuple[int, int, int]
    example: Callable[[int], layout.Row]
    workers: int = 8


def load_dataset(
    config: Any, split: str, model: Model, needs: str = "preference", *, cache_dir: str | Path | None = None, progress: bool | None = None
) -> Dataset:
    """Open `config.data[split]`, look at every row once, and say what will be trained on.

    Args:
        config: the whole config; its `data` section is read.
        split: "train", "eval", or "evals.NAME".
        model: its assets (tokenizer, processor) and media sizes; no parameters.
        needs: the kind of sample the algorithm takes.
        cache_dir: where the result of the census is kept for the next start; None keeps nothing.
        progress: show a bar; None shows it on process 0.

    Raises:
        UserError: missing file, missing columns, no row left, more bad rows than `config.data.max_bad_fraction`, images for a text model.
    """
    name, source = f"data.{split}", functools.reduce(lambda section, key: section[key], split.split("."), config.data)
    if needs not in ENCODERS:
        raise UserError(f"config.{name}: samples of kind {needs!r} cannot be made yet; there is {', '.join(ENCODERS)}.")
    rows = sources.open_rows(source, name)
    formatter_name, to_sample = formatters.find_formatter(source.formatter, rows.columns(), name)
    check_assets(model)

    def encode(index: int) -> templates.Encoded:
        return ENCODERS[needs](to_sample(rows[index]), model)

    census = take_census(
        encode,
        rows,
        model,
        config.data.max_length,
        name,
        key=[formatter_name, source_code(to_sample), needs],
        cache_dir=cache_dir,
        workers=config.data.workers,
        progress=progress,
    )
    check_census(census, rows, name, config.data.max_bad_fraction)
    prompt, scored, answers, images, _ = census.sizes.T
    shared, multiple = config.data.shared_prompt, config.data.pad_to_multiple
    T = layout.round_up(int((prompt * (1 if shared else answers) + scored).max()), multiple)
    S, I = layout.round_up(int(scored.max()), multiple), int(images.max())

    def example(row_id: int) -> layout.Row:
        if row_id == -1:
            return layout.empty_row(T, S, I, model.media)
        try:
            encoded = encode(row_id)
            row = layout.pair_row(encoded, T, S, I, model.media, shared, example_id=row_id)
            if encoded.images:
                pictures = [media.open_image(image, rows.folder) for image in encoded.images]
                row["pixel_values"][: len(pictures)] = media.pixel_values(pictures, model.assets.processor.image_processor)
        except Bad as error:
            raise UserError(f"{name}, row {row_id} of {rows.description} could be read when the run started, now not: {error}.") from error
        return row

    return Dataset(
        name=name,
        size=len(census.row_ids),
        row_ids=census.row_ids,
        rows_total=len(rows),
        dropped=census.dropped,
        report=tuple(describe(census, rows, name, formatter_name, (T, S, I), str(model.assets.tokenizer.eos_token))),
        fingerprint=census.fingerprint,
        shape=(T, S, I),
        example=example,
        workers=config.data.workers,
    )


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
    if assets.processor is None or getattr(assets.processor, "image_processor", None) is None:
        raise UserError(f"the {model.family} model takes images but has no image processor; preprocessor_config.json is missing.")
    token = templates.image_token(assets)
    found = assets.tokenizer.convert_tokens_to_ids(token)
    if found != model.media.placeholder:
        raise UserError(f"the tokenizer gives {token} the id {found}, the model's config (image_token_index) {model.media.placeholder}.")
    from PIL import Image

    probe = Image.new("RGB", (2 * model.media.width, model.media.height))  # wide, to see that it is made square
    size = media.pixel_values([probe], assets.processor.image_processor).shape[1:3]
    if size != (model.media.height, model.media.width):
        raise UserError(
            f"the image processor gives images of {size[0]} x {size[1]}, the model's vision tower takes {model.media.height} x "
            f"{model.media.width}; set size and crop_size in preprocessor_config.json."
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

    Which example stands at row r of batch k depends on (seed, k * batch_size + r) alone.

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
    import grain

    order = grain.MapDataset.range(dataset.size)
    if shuffle:
        order = order.seed(seed % 2**32).shuffle()
    order = order.repeat()  # index k of the repeated dataset is in epoch k // size, each with its own shuffle
    count = None if epochs is None else math.ceil(round(epochs * dataset.size / batch_size, 6))
    return _stream(dataset, batch_size, lambda k: int(dataset.row_ids[order[k]]), count, rows, start)


def eval_batches(dataset: Dataset, batch_size: int, *, rows: Any = slice(None)) -> Batches:
    """One pass in order. The last batch is filled with empty rows (example_id -1), in which nothing is scored or counted."""
    row_of = lambda k: int(dataset.row_ids[k]) if k < dataset.size else -1
    return _stream(dataset, batch_size, row_of, math.ceil(dataset.size / batch_size), rows, 0)


def _stream(dataset: Dataset, batch_size: int, row_of: Callable[[int], int], count: int | None, rows: Any, start: int) -> Batches:
    import grain

    local = np.arange(batch_size)[rows]
    b = len(local)
    end = np.iinfo(np.int64).max // 2 if count is None else count * b

    def load(k: int) -> layout.Row:
        return dataset.example(row_of(k // b * batch_size + int(local[k % b])))

    def make(first: int) -> Any:
        if first * b >= end:
            return iter(grain.MapDataset.range(0).to_iter_dataset())
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
