"""Prompts that are answered in training: looked at once before it starts, then given out in an order that is a function of the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligner.data import loader, media, mixture, modalities, templates
from aligner.data.census import check_census, describe, take_census
from aligner.data.kinds import ENCODERS
from aligner.data.samples import article, as_prompt
from aligner.data.together import Steps, encoder
from aligner.generation.engine import Prompt
from aligner.types import Model, UserError


class Item(NamedTuple):
    """A prompt to answer.

    Attributes:
        row: its number in the dataset.
        text: the conversation, or plain text.
        encoded: its tokens, without answers.
        prompt: the same as the sampler takes it, with pictures.
        columns: what else the row holds, for reward functions, with `ground_truth`, and in `chat_template_kwargs` all that the prompt's
            template was told, if anything.
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
        size: how many stand in an epoch.
        item: place in the endless order (a new one every epoch) -> Item.
        folder: where images of the rows are looked up.
        report: lines for people.
        lengths: [size], their tokens.
        fingerprint: as of a Dataset.
    """

    size: int
    item: Callable[[int], Item]
    folder: Path
    report: tuple[str, ...]
    lengths: np.ndarray
    fingerprint: str


def load_prompts(config: Any, split: str, model: Model, cache_dir: str | Path | None = None) -> Prompts:
    """Open `config.data[split]` for prompts.

    A prompt must leave room for an answer: prompt and generation.max_new_tokens together at most data.max_length. Longer ones are dropped
    and counted like any row that cannot be used.

    Raises:
        UserError: missing file, no prompt left, more bad rows than `config.data.max_bad_fraction`.
    """
    name, data, kind = f"data.{split}", config.data, ENCODERS["prompt"]
    rows = mixture.open_samples(data[split], name, kind, config.seed)
    loader.check_assets(model)
    room = data.max_length - config.generation.max_new_tokens
    model = modalities.looking_in(model, None, data.get("video_frames"))
    seeing = lambda index: modalities.looking_in(model, rows.folder(index))

    @encoder
    def encode(index: int) -> Steps:
        return (yield from kind.encode.steps(rows.read(index), seeing(index), data))

    reading = dict(cache_dir=cache_dir, workers=loader.threads(model, data))
    census = take_census(encode.steps, rows, model, max(room, 0), name, key=["prompt"], **reading)
    check_census(census, rows, name, data.max_bad_fraction)
    places, learned = loader.of_epoch(census.row_ids, rows.repeats, census.fingerprint)
    order = loader.endless(len(places), split == "train" and data.shuffle, config.seed)

    def source(index: int, prompt: Any, encoded: templates.Encoded) -> tuple[Any, list[Any]]:
        for other in (kind for kind, _ in encoded.media if kind != "image"):
            held = f"row {rows.name(index)} holds {article(other)}"
            raise UserError(f"config.generation.server: {held}, but only images can be sent; leave it empty.")
        return prompt, [media.open_image(reference, rows.folder(index)) for _, reference in encoded.media]

    def item(place: int) -> Item:
        index = int(census.row_ids[places[order(place)]])
        row, sample, encoded = rows.raw(index), as_prompt(rows.read(index)), encode(index)
        pictures = modalities.load(encoded.media, seeing(index))
        columns = {name: value for name, value in row.items() if name not in ("prompt", "completion", "completions")}
        columns |= {"chat_template_kwargs": dict(sample.template)} if sample.template else {}
        prompt = Prompt(encoded.prompt, pictures, source(index, sample.prompt, encoded) if config.generation.server else None)
        return Item(index, sample.prompt, encoded, prompt, {"ground_truth": sample.ground_truth, **columns})

    report = describe(census, rows, name, rows.formatter, model)
    return Prompts(len(places), item, Path(rows.folder(0)), tuple(report), census.sizes[places, 0], learned)
