"""From token ids to the arrays of a row, exactly as `Batch` in aligner/types.py describes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aligner.data.templates import Encoded
from aligner.models import pictures
from aligner.types import Media

Row = dict[str, np.ndarray]


def shape_of(encoded: Encoded, shared: bool = True) -> tuple[int, int, int]:
    """(T, S, I) that an example needs: columns, scored positions, slots for media."""
    answers = sum(len(answer) for answer in encoded.answers)
    slots = len(encoded.media) if encoded.slots is None else encoded.slots
    scored = answers if encoded.scored is None else sum(int(mask.sum()) for mask in encoded.scored)
    prompts = 1 if shared else len(encoded.answers)
    return prompts * len(encoded.prompt) + answers, scored, slots


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def empty_row(T: int, S: int, I: int, media: Media | None = None, G: int = 1) -> Row:
    """A row in which nothing is scored: padding, or the canvas that `lay_out` fills.

    Returns:
        tokens, positions, segment_ids, role [T]; score_* [S]; example_id [G] of -1; where I > 0 also media_index [T] and what
        `aligner.models.pictures.blank` gives.
    """
    row = {name: np.zeros(T, np.int32) for name in ("tokens", "positions", "segment_ids", "role")}
    row |= {name: np.zeros(S, np.int32) for name in ("score_from", "score_token", "score_segment", "score_role")}
    row["example_id"] = np.full(G, -1, np.int32)
    if media is not None and I:
        row |= pictures.blank(media, T, I)
    return row


def pair_row(encoded: Encoded, T: int, S: int, I: int, media: Media | None = None, shared: bool = True, example_id: int = 0) -> Row:
    """The row of one example with any number of answers; see `lay_out`."""
    return lay_out([encoded], [example_id], T, S, I, media, shared)


def lay_out(
    examples: Sequence[Encoded],
    ids: Sequence[int],
    T: int,
    S: int,
    I: int,
    media: Media | None = None,
    shared: bool = True,
    G: int | None = None,
    last: bool = False,
    prompt: bool = False,
) -> Row:
    """Lay examples one after another into a row.

    Shared: [prompt | answer 1 | .. | answer R] is one segment; every answer's positions continue where the prompt ends, and its first
    token is predicted from the prompt's last column. Duplicated: [prompt answer 1] [prompt answer 2] .. are R segments. What is scored
    is the same, and so is the result.

    Args:
        examples: at most G of them.
        ids: their rows in the dataset.
        T, S, I: the sizes to fill; the caller has checked that the examples fit.
        media: the model's media; None for text.
        shared: whether the answers of an example share one copy of the prompt.
        G: places for examples; default: as many as there are.
        last: score one position an answer, its last token from the column where it stands, as reward heads do.
        prompt: score the prompt's tokens too, but for the first and for media, with role 0; once, whatever the number of answers.

    Returns:
        Arrays as `empty_row` lists them; `aligner.models.pictures.fill` puts the media in, in the order of the examples. Until then
        `media_index` numbers the placeholders of all of them.
    """
    row = empty_row(T, S, I, media, G=len(examples) if G is None else G)
    column = slot = segment = feature = images = 0

    def score(sources: Sequence[int], targets: np.ndarray, role: int) -> None:
        nonlocal slot
        span = slice(slot, slot + len(targets))
        row["score_from"][span] = sources
        row["score_token"][span] = targets
        row["score_segment"][span] = number
        row["score_role"][span] = role
        slot = span.stop

    def put(tokens: np.ndarray, position: int, role: int) -> int:
        nonlocal column, feature
        span = slice(column, column + len(tokens))
        row["tokens"][span] = tokens
        row["positions"][span] = position + np.arange(len(tokens))
        row["segment_ids"][span] = segment
        row["role"][span] = role
        if example.media:
            places = column + np.flatnonzero(pictures.placeholders(tokens, media))
            row["media_index"][places] = feature + np.arange(len(places))
            feature += len(places)
        column = span.stop
        return span.start

    for number, (example, example_id) in enumerate(zip(examples, ids), start=1):
        row["example_id"][number - 1] = example_id
        first = last_feature = feature
        if not example.answers:  # something to answer, shown alone
            segment += 1
            put(example.prompt, 0, role=0)
            last_feature = feature
        for role, answer in enumerate(example.answers, start=1):
            if role == 1 or not shared:
                segment += 1
                feature = first
                start = put(example.prompt, 0, role=0)
                before, after_prompt = column - 1, feature
                if prompt and role == 1:
                    rest = example.prompt[1:]
                    text = np.arange(len(rest)) if media is None else np.flatnonzero(~pictures.placeholders(rest, media))
                    score(start + text, rest[text], role=0)
            feature = after_prompt  # pictures in an answer follow those of its prompt, whatever stands in other answers
            start = put(answer, len(example.prompt), role)
            last_feature = max(last_feature, feature)
            sources, targets = np.concatenate([[before], np.arange(start, column - 1)])[: len(answer)], answer
            if last:
                sources, targets = [column - 1], answer[-1:]
            elif example.scored is not None:
                sources, targets = sources[example.scored[role - 1]], answer[example.scored[role - 1]]
            score(sources, targets, role)
        feature = last_feature
        images += shape_of(example)[2]
    if "image_mask" in row:
        row["image_mask"][:images] = True
    return row
