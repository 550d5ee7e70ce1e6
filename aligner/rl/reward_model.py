"""A trained reward model as a function of texts, whatever family and tokenizer it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data import layout, modalities, templates
from aligner.data.conversations import answer_to
from aligner.data.samples import Bad
from aligner.generation.engine import bucket
from aligner.models.pictures import fill
from aligner.types import UserError

# (prompts, completions, what each one's chat template is told) -> a score for each; None where there is none to give
Score = Callable[..., list[float | None]]


def make_reward_model(
    path: str, *, dtype: str = "float32", rows: int = 16, max_length: int = 4096, folder: str | Path = ".", frames: int = 8
) -> Score:
    """Read a reward model.

    Args:
        path: checkpoint folder or Hub id of a model with a score head.
        dtype: of the computation.
        rows: texts scored at once.
        max_length: tokens of a text at most; longer ones have no score.
        folder: where images and videos named in prompts are looked up.
        frames: how many are taken of a video.

    Returns:
        A function of prompts (conversations or plain text) and completions, which sees both; and, where they have some, of the arguments
        for the chat template of each.

    Raises:
        UserError: the model has no score head, or no tokenizer.
    """
    import jax

    from aligner import convert
    from aligner.data.loader import check_assets
    from aligner.likelihood import make_scorer
    from aligner.train_step import jit

    model, disk = convert.open_model(path)
    if not model.has_score_head:
        raise UserError(f"{path} has no score head, so it is no reward model; train one with configs/reward_llama3.py")
    check_assets(model)
    model = modalities.looking_in(model, folder, frames)
    params = convert.load_params(model, disk, dtype)
    score_batch = jit(lambda params, batch: make_scorer(model, 1)(params, batch).values[:, 0, 0])

    def encode(prompt: Any, completion: str, options: Mapping[str, Any]) -> templates.Encoded | None:
        try:
            encoded = templates.encode_answers(prompt, (answer_to(prompt, completion),), model.assets, model.media, options)
        except Bad as bad:
            if bad.reason == "empty answer":
                return None
            raise UserError(f"the reward model {path} cannot read a prompt: {bad}") from None
        return encoded if len(encoded.prompt) + len(encoded.answers[0]) <= max_length else None

    def score(prompts: Sequence[Any], completions: Sequence[str], options: Sequence[Mapping[str, Any]] | None = None) -> list[float | None]:
        encoded = [encode(*one) for one in zip(prompts, completions, options or [{}] * len(prompts), strict=True)]
        found: list[float | None] = [None] * len(encoded)
        order = sorted((i for i, one in enumerate(encoded) if one is not None), key=lambda i: layout.shape_of(encoded[i]))
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            T, _, I = (max(sizes) for sizes in zip(*(layout.shape_of(encoded[i]) for i in part)))
            shape = (bucket(T), 1, I)
            made = [layout.lay_out([encoded[i]], [i], *shape, model.media, last=True) for i in part]
            for row, i in zip(made, part):
                fill(row, modalities.load(encoded[i].media, model), model.media)
            made += [layout.empty_row(*shape, model.media)] * (rows - len(made))
            values = jax.device_get(score_batch(params, {name: np.stack([row[name] for row in made]) for name in made[0]}))
            for i, value in zip(part, values):
                found[i] = float(value)
        return found

    return score
