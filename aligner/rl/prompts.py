"""Prompts that are answered in training: looked at once before it starts, then given out in an order that is a function of the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aligner.data import formatters, loader, media, sources, templates
from aligner.data.census import check_census, describe, source_code, take_census
from aligner.data.samples import as_prompt
from aligner.generation.engine import Prompt
from aligner.types import Model


class Item(NamedTuple):
    """A prompt to answer.

    Attributes:
        row: its number in the dataset.
        text: the conversation, or plain text.
        encoded: its tokens, without answers.
        prompt: the same as the sampler takes it, with pixels.
        columns: what else the row holds, for reward functions, with `ground_truth`.
    """

    row: int
    text: Any
    encoded: templates.Encoded
    prompt: Prompt
    columns: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts that passed the census.

    Attributes:
        size: how many.
        item: place in the endless order (a new one every epoch) -> Item.
        folder: where images of the rows are looked up.
        report: lines for people.
    """

    size: int
    item: Callable[[int], Item]
    folder: Path
    report: tuple[str, ...]


def load_prompts(config: Any, split: str, model: Model, cache_dir: str | Path | None = None) -> Prompts:
    """Open `config.data[split]` for prompts.

    A prompt must leave room for an answer: prompt and generation.max_new_tokens together at most data.max_length. Longer ones are dropped
    and counted like any row that cannot be used.

    Raises:
        UserError: missing file, no prompt left, more bad rows than `config.data.max_bad_fraction`.
    """
    import grain

    name, data, source = f"data.{split}", config.data, config.data[split]
    rows = sources.open_rows(source, name)
    formatter, to_sample = formatters.find_formatter(source.formatter, rows.columns(), name, formatters.PROMPTS)
    loader.check_assets(model)
    room = data.max_length - config.generation.max_new_tokens

    def encode(index: int) -> templates.Encoded:
        return templates.encode_prompt(as_prompt(to_sample(rows[index])).prompt, model.assets, model.media)

    key = [formatter, source_code(to_sample), "prompt"]
    census = take_census(encode, rows, model, max(room, 0), name, key=key, cache_dir=cache_dir, workers=data.workers)
    check_census(census, rows, name, data.max_bad_fraction)
    order = grain.MapDataset.range(len(census.row_ids))
    if split == "train" and data.shuffle:
        order = order.seed(config.seed % 2**32).shuffle()
    order = order.repeat()

    def item(place: int) -> Item:
        index = int(census.row_ids[int(order[place])])
        row = rows[index]
        sample = as_prompt(to_sample(row))
        encoded = templates.encode_prompt(sample.prompt, model.assets, model.media)
        pixels = None
        if encoded.images:
            pictures = [media.open_image(image, rows.folder) for image in encoded.images]
            pixels = media.pixel_values(pictures, model.assets.processor.image_processor)
        columns = {name: value for name, value in row.items() if name not in ("prompt", "completion", "completions")}
        return Item(index, sample.prompt, encoded, Prompt(encoded.prompt, pixels), {"ground_truth": sample.ground_truth, **columns})

    report = describe(census, rows, name, formatter, str(model.assets.tokenizer.eos_token))
    return Prompts(len(census.row_ids), item, Path(rows.folder), tuple(report))
