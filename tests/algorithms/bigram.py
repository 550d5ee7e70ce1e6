"""The smallest language model: the next token depends on the last one alone. It compiles at once, and all that an algorithm does shows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aligner.data.layout import empty_row, lay_out, shape_of
from aligner.data.templates import Encoded
from aligner.types import Conversion, Head, Model, Output

VOCAB, WIDTH = 17, 5


def make_model() -> Model:
    return Model(
        family="bigram",
        config=None,
        init=lambda key: {"embed": {"embedding": jnp.zeros((VOCAB, WIDTH))}, "lm_head": {"kernel": jnp.zeros((WIDTH, VOCAB))}},
        encode=lambda params, batch, *_, **__: None,
        apply=lambda params, batch, **_: Output(jnp.asarray(params["embed"]["embedding"])[batch["tokens"]], {}),
        head=lambda params: Head(params["lm_head"]["kernel"]),
        inputs=lambda inputs: inputs,
        conversion=Conversion(stacks={}),
        sharding_rules=((".*", (None, None)),),
    )


def make_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"embed": {"embedding": rng.normal(0, 1, (VOCAB, WIDTH))}, "lm_head": {"kernel": rng.normal(0, 1, (WIDTH, VOCAB))}}


def make_examples(kind: str, count: int = 8, seed: int = 1) -> list[Encoded]:
    """Ragged examples of a kind (`aligner.data.kinds`) with as many answers as that kind has."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(1, VOCAB, rng.integers(low, high)).astype(np.int32)
    made = []
    for number in range(count):
        answers = {"ranked": 2 + number % 3, "two_sided": 4, "unpaired_alone": 1}.get(kind, 2)
        example = Encoded(words(2, 6), tuple(words(1, 7) for _ in range(answers)), values={"label": float(number % 3 > 0)})
        if kind == "two_sided":  # each answer begins with the rest of its own prompt, which is not scored
            rest = [words(1, 4) for _ in range(2)]
            parts = [(rest[i // 2], answer) for i, answer in enumerate(example.answers)]
            masks = tuple(np.repeat([False, True], [len(part) for part in both]) for both in parts)
            example = example._replace(answers=tuple(np.concatenate(both) for both in parts), scored=masks)
        made.append(example)
    return made


def make_batch(
    examples: list[Encoded],
    reference: np.ndarray,
    *,
    order: Sequence[int] | None = None,
    per_row: int = 1,
    more: int = 0,
    empty_rows: int = 0,
    prompt: bool = False,
) -> dict[str, np.ndarray]:
    """A batch as the loader gives it.

    Args:
        examples: of `make_examples`.
        reference: [n, R] reference log-probabilities.
        order: of the examples; default as they are.
        per_row: examples packed into a row (G).
        more: by how much T and S exceed what is needed.
        empty_rows: rows without an example, mixed in.
        prompt: score prompts too.
    """
    order = np.arange(len(examples)) if order is None else np.asarray(order)
    groups = order.reshape(-1, per_row)
    size = lambda place: max(sum(shape_of(examples[i])[place] + len(examples[i].prompt) * (prompt and place) for i in g) for g in groups)
    T, S = size(0) + more, size(1) + more
    rows = []
    for group in groups:
        row = lay_out([examples[i] for i in group], group.tolist(), T, S, 0, prompt=prompt)
        labels = np.array([examples[i].values["label"] for i in group])
        rows.append(row | {"reference_logps": reference[group], "label": labels})
    for number in range(empty_rows):
        blank = empty_row(T, S, 0, G=per_row)
        rows.insert(2 * number, blank | {"reference_logps": np.zeros((per_row, reference.shape[1])), "label": np.zeros(per_row)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def exact() -> jax.enable_x64:
    """float64 within the block."""
    return jax.enable_x64(True)
