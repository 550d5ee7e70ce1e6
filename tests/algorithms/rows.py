"""Examples of every kind that algorithms take (`aligner.data.kinds`), and batches of them however they are laid out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aligner.data.kinds import ENCODERS
from aligner.data.layout import lay_out, shape_of
from aligner.data.loader import _values
from aligner.data.templates import Encoded
from aligner.types import Model
from tests.models import tiny

VOCAB = 17
ANSWERS = {"supervised": 1, "text": 1, "unpaired_alone": 1, "triple": 3, "two_sided": 4, "ranked": 4, "ranked_last": 4, "scored_last": 4}  # else 2


def make_examples(kind: str, count: int = 8, seed: int = 1, model: Model | None = None) -> list[Encoded]:
    """Ragged examples with as many answers as their kind has; for a model that sees, with no, one or two images in turn."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(1, VOCAB, rng.integers(low, high)).astype(np.int32)
    media = model and kind != "text" and model.media
    most, made = ANSWERS.get(kind, 2), []
    for number in range(count):
        answers = 2 + number % 3 if kind.startswith(("ranked", "scored")) else most
        values = {"label": float(number % 3 > 0), "margin": rng.normal(), "safe": rng.choice([-1, 1], 2), "scores": rng.normal(0, 2, answers)}
        prompt = words(2, 6) if kind != "text" else words(1, 2)  # of a piece of text, the first token is context
        images = number % 3 if media else 0
        for _ in range(images):
            prompt = np.insert(prompt, rng.integers(1, len(prompt)), [media.placeholder] * media.features).astype(np.int32)
        parts = tuple(words(1, 7) for _ in range(answers))
        scored = None
        if kind == "supervised":  # a user's turns stand between the assistant's
            scored = tuple(np.arange(len(part)) % 3 != 1 for part in parts)
        if kind == "two_sided":  # each answer begins with the rest of its own prompt, which is not scored
            rest = [words(1, 4) for _ in range(2)]
            both = [(rest[i // 2], part) for i, part in enumerate(parts)]
            scored = tuple(np.repeat([False, True], [len(x) for x in two]) for two in both)
            parts = tuple(np.concatenate(two) for two in both)
        made.append(Encoded(prompt, parts, tuple(("image", f"{number}.{i}") for i in range(images)), scored, values))
    return made


def make_batch(
    examples: list[Encoded],
    reference: np.ndarray | None = None,
    kind: str = "preference",
    model: Model | None = None,
    *,
    order: Sequence[int] | None = None,
    per_row: int = 1,
    more: int = 0,
    empty_rows: int = 0,
) -> dict[str, np.ndarray]:
    """A batch as the loader gives it.

    Args:
        examples: of `make_examples`.
        reference: [n, R] reference log-probabilities.
        kind: of the examples.
        model: whose images they show.
        order: of the examples; default as they are.
        per_row: examples packed into a row (G).
        more: by how much T, S and, with images, I exceed what is needed.
        empty_rows: rows without an example, mixed in.
    """
    made_of, media = ENCODERS[kind], model and model.media
    order = np.arange(len(examples)) if order is None else np.asarray(order)
    groups = [list(group) for group in order.reshape(-1, per_row)]
    T, S, I = (max(sum(shape_of(examples[i])[axis] for i in group) for group in groups) + more for axis in range(3))
    S += max(sum(len(examples[i].prompt) for i in group) for group in groups) if made_of.prompt else 0
    answers = max(len(example.answers) for example in examples)
    for number in range(empty_rows):
        groups.insert(2 * number, [])
    rows = []
    for group in groups:
        members = [examples[i] for i in group]
        row = lay_out(members, group, T, S, I if media else 0, media, G=per_row, last=made_of.last, prompt=made_of.prompt)
        for place, name in enumerate(name for example in members for _, name in example.media):
            row["pixel_values"][place] = tiny.pixels(name, model)
        if reference is not None:
            row["reference_logps"] = reference[group] if group else np.zeros((per_row, reference.shape[1]))
        rows.append(row | _values(members, made_of, per_row, answers))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
