"""Pictures, videos and sounds on the host: how many tokens each takes, which slots of a row it fills, which feature stands at which token.

Token counts differ from one to the next; all of it is settled here in NumPy, so that what reaches the device are arrays of a few
fixed shapes and gather indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from aligner.types import Media, UserError

Row = dict[str, np.ndarray]


class Clip(NamedTuple):
    """Some of a video's frames.

    Attributes:
        times: seconds [F] float64 from its start, ascending.
        seconds: how long the whole video is shown.
        size: (height, width) of its frames.
        frames: uint8 [F,H,W,3]; None where only its size and times are asked for.
    """

    times: np.ndarray
    seconds: float
    size: tuple[int, int]
    frames: np.ndarray | None = None


class Shown(NamedTuple):
    """How a picture stands in the text.

    Attributes:
        slots: how many slots of a row's pixels it fills.
        runs: how many placeholders each of its tokens becomes.
        text: what is written for it instead of one token of its kind, with such a token for every run; None writes that one token.
        kind: "image", "video" or "audio".
    """

    slots: int
    runs: tuple[int, ...]
    text: str | None = None
    kind: str = "image"


class Picture(NamedTuple):
    """A picture as arrays.

    Attributes:
        arrays: name -> [slots, ...], what the model reads.
        index: [placeholders] the feature that stands at each: slot * P + p within the picture, or -1 - n for the n-th leading one.
        turned: what `turned` gives, where positions go by rows and columns.
        taps: (features around each placeholder [placeholders, X], their weights), where one is a mixture of several.
        kind: "image", "video" or "audio", which says what token it stands at.
        stills: how many images its slots are to a tower that takes patches, evenly; a video's frames do not see each other there.
    """

    arrays: Mapping[str, np.ndarray]
    index: np.ndarray
    turned: tuple[np.ndarray, np.ndarray] | None = None
    taps: tuple[np.ndarray, np.ndarray] | None = None
    kind: str = "image"
    stills: int = 1


def placeholders(tokens: np.ndarray, media: Media) -> np.ndarray:
    """Which tokens stand for features, bool of the same shape."""
    return np.isin(tokens, [*media.tokens.values()])


def whole(processed: Mapping[str, Any], features: int) -> list[Picture]:
    """Pictures that fill one slot each: `pixel_values` [n,3,H,W]."""
    pixels = np.asarray(processed["pixel_values"]).transpose(0, 2, 3, 1)
    return [Picture({"pixel_values": image[None]}, np.arange(features)) for image in pixels]


def read(media: Media, processed: Mapping[str, Any]) -> list[Picture]:
    """What an image processor returned (NumPy), picture by picture."""
    return media.pictures(processed) if media.pictures else whole(processed, media.features)


def blank(media: Media, tokens: int, slots: int) -> Row:
    """The arrays of a row without pictures."""
    row = {"media_index": np.full(tokens, -1, np.int32), "image_mask": np.zeros(slots, bool)}
    shapes = {"pixel_values": ((media.height, media.width, 3), np.float32), **media.slot}
    row |= {name: np.zeros((slots, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    return row | {name: np.zeros((tokens, *shape), dtype) for name, (shape, dtype) in media.per_token.items()}


def fill(row: Row, pictures: Sequence[Picture], media: Media) -> None:
    """Put pictures into a row, in place. One without any, among rows that have some, needs it too: what is said of its tokens.

    Args:
        row: with `media_index` numbering the placeholders of all its pictures in order, as `aligner.data.layout` leaves it. Where no row
            has room for pictures it has none, and stays as it is.
        pictures: of the row, in order.
        media: the model's.
    """
    if "media_index" not in row:
        return
    more = media.arrange(row, pictures) if media.arrange is not None else {}
    start, number, order = 0, 1, []
    for picture in pictures:
        slots = len(picture.arrays["pixel_values"])
        end = start + slots
        for name, array in picture.arrays.items():
            row[name][start:end] = array
        if "image_ids" in row:
            row["image_ids"][start:end] = number + np.arange(slots) * picture.stills // slots
            number += picture.stills
        row["image_mask"][start:end] = True
        order.append(np.where(picture.index < 0, -1 - picture.index, media.lead + start * media.features + picture.index))
        start = end
    if order:
        features = np.concatenate(order).astype(np.int32)
        index = row["media_index"]
        row["media_index"] = np.where(index >= 0, features[np.maximum(index, 0)], -1).astype(np.int32)
    row |= {name: array.astype(np.int32) if array.dtype.kind == "i" else array for name, array in more.items()}


def deal(batch: Mapping[str, Any], processed: Mapping[str, Any], media: Media) -> Row:
    """Deal pictures, given one after another, to the rows whose placeholders they fill.

    Args:
        batch: the text part of a batch, [B,T].
        processed: what the processors returned for all pictures, and for all videos.
        media: the model's.

    Returns:
        What the batch holds beside its text.

    Raises:
        UserError: the placeholders of the rows are not those of the pictures.
    """
    text = {name: np.asarray(array) for name, array in batch.items()}
    places = placeholders(text["tokens"], media)
    pictures = read(media, processed)
    order = in_order(text["tokens"][places], [(picture.kind, len(picture.index)) for picture in pictures], media)
    pictures = [pictures[number] for number in order]
    counts, takes = places.sum(axis=1), [len(picture.index) for picture in pictures]
    ends, total = np.cumsum([0, *takes]), np.cumsum([0, *counts])  # of pictures and of rows, in placeholders
    if ends[-1] != total[-1] or not np.isin(total, ends).all():
        raise UserError(
            f"{len(pictures)} {media.kind}s, which take {takes} placeholders, do not fit placeholder counts {counts.tolist()} of the rows"
        )
    borders = np.searchsorted(ends, total)
    groups = [pictures[first:last] for first, last in pairwise(borders)]
    slots = max(1, *(sum(len(picture.arrays["pixel_values"]) for picture in group) for group in groups))
    rows = []
    for number, group in enumerate(groups):
        row = blank(media, places.shape[1], slots)
        row["pixel_values"] = row["pixel_values"].astype(pictures[0].arrays["pixel_values"].dtype)
        row["media_index"] = np.where(places[number], np.cumsum(places[number]) - 1, -1).astype(np.int32)
        row |= {name: array[number] for name, array in text.items()}
        fill(row, group, media)
        rows.append({name: array for name, array in row.items() if name not in text})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def in_order(marks: np.ndarray, takes: Sequence[tuple[str, int]], media: Media) -> list[int]:
    """How media, of every kind in their order, follow each other in the text.

    Args:
        marks: the placeholders [N] of a text.
        takes: (kind, number of placeholders) of each.
        media: the model's.

    Returns:
        Their numbers as their placeholders stand; what finds none comes last.
    """
    waiting = {token: [number for number, (found, _) in enumerate(takes) if found == kind] for kind, token in media.tokens.items()}
    order, at = [], 0
    while at < len(marks) and waiting[int(marks[at])]:
        order.append(waiting[int(marks[at])].pop(0))
        at += takes[order[-1]][1]
    return [*order, *(number for left in waiting.values() for number in left)]


def turned(rows: int, columns: int, times: Sequence[int] = (0,)) -> tuple[np.ndarray, np.ndarray]:
    """Where the placeholders of a picture stand, or of a video with frames at these times.

    Returns:
        ([n,3] how far each is in time, rows and columns from where the text stands, [n] how far the text goes on after each: by the longer
        side after the last, however long a video is, as `transformers` has it).
    """
    offsets = np.stack(np.meshgrid(times, np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 3)
    return offsets, np.append(np.zeros(len(offsets) - 1, int), max(rows, columns))


def turning_positions(row: Row, pictures: Sequence[Picture]) -> Row:
    """Positions [T,3] in time, rows and columns for every token (M-RoPE, arXiv 2409.12191): text counts up in all three; a picture's
    placeholders count from where the text stands, which goes on after it, as `turned` says.

    An answer that shares its prompt with others goes on where the prompt ends.
    """
    offsets, advance = zip(*(picture.turned for picture in pictures), (np.zeros((1, 3), int), [0]))
    offsets, advance = np.concatenate(offsets), np.concatenate(advance)
    out = np.zeros((len(row["tokens"]), 3), np.int32)
    for segment in np.unique(row["segment_ids"][row["segment_ids"] > 0]):
        inside = row["segment_ids"] == segment
        for role in np.unique(row["role"][inside]):
            columns = np.flatnonzero(inside & ((row["role"] == 0) | (row["role"] == role)))
            index = row["media_index"][columns]
            steps = np.where(index < 0, 1, advance[index])
            out[columns] = (np.cumsum(steps) - steps)[:, None] + np.where(index[:, None] < 0, 0, offsets[index])
    return {"rope_positions": out}
