"""The smallest language model: the next token depends on the last one alone. It compiles at once, and all that an algorithm does shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aligner.models.decoder import at
from aligner.types import Conversion, Head, Model, Output
from tests.algorithms.rows import VOCAB

WIDTH = 5


def make_model(scores: bool = False) -> Model:
    """With `scores`, one that scores answers."""
    head = {"score": {"kernel": jnp.zeros((WIDTH, 1))}} if scores else {"lm_head": {"kernel": jnp.zeros((WIDTH, VOCAB))}}
    return Model(
        family="bigram",
        config=None,
        init=lambda key: {"embed": {"embedding": jnp.zeros((VOCAB, WIDTH))}} | head,
        encode=lambda params, batch, *_, **__: None,
        apply=lambda params, batch, **_: Output(at(batch.get("read"), jnp.asarray(params["embed"]["embedding"])[batch["tokens"]]), {}),
        head=lambda params: Head(params["score" if scores else "lm_head"]["kernel"]),
        inputs=lambda inputs: inputs,
        conversion=Conversion(stacks={}),
        sharding_rules=((".*", (None, None)),),
        has_score_head=scores,
    )


def make_params(seed: int = 0, model: Model | None = None) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape), (model or make_model()).init(None))


def exact() -> jax.enable_x64:
    """float64 within the block."""
    return jax.enable_x64(True)
