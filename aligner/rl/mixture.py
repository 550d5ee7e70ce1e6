"""The geometric mixture of two sets of parameters as a model of its own, which the sampler takes like any other.

Its hidden states are both models' side by side, each times its share, its head is both heads one below the other: so its logits are the
weighted sum of theirs, and whatever writes with a cache writes with theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from aligner.models.decoder import text_config
from aligner.types import Array, Batch, Head, Model, Output, Params, UserError


def geometric(model: Model, share: float) -> Model:
    """Parameters of the result are {"policy": .., "reference": ..}, two trees of `model`; logits are (1 - share) * the policy's + share *
    the reference's.

    Raises:
        UserError: the model bends its logits, so that their sum is not a head's, or looks at pictures through cross-attention, whose
            memory is of one set of parameters.
    """
    text = text_config(model)
    if text.cross_layers:
        raise UserError(f"{model.family} models look at pictures through layers of their own, which a mixture of two has not; use another")
    twice = dataclasses.replace(text, num_hidden_layers=2 * text.num_hidden_layers)  # as many caches
    config = twice if text is model.config else dataclasses.replace(model.config, text_config=twice)
    shares = {"policy": 1 - share, "reference": share}

    def encode(params: Params, batch: Batch, key: Any = None, remat: str = "none") -> dict[str, Array | None]:
        return {name: model.encode(params[name], batch, key, remat=remat) for name in shares}

    def apply(params: Params, batch: Batch, *, features: Any = None, cache: Any = None, key: Any = None, remat: str = "none") -> Output:
        found = {}
        for number, name in enumerate(shares):
            own = cache
            if cache is not None:
                part = slice(number * text.num_hidden_layers, (number + 1) * text.num_hidden_layers)
                own = cache.replace(keys=cache.keys[part], values=cache.values[part])
            of = features[name] if features is not None else None
            found[name] = model.apply(params[name], batch, features=of, cache=own, key=key, remat=remat)
        hidden = jnp.concatenate([weight * found[name].hidden for name, weight in shares.items()], axis=-1)
        if cache is not None:
            first, second = (found[name].cache for name in shares)
            cache = second.replace(keys=first.keys + second.keys, values=first.values + second.values)
        return Output(hidden, {}, cache)

    def head(params: Params) -> Head:
        first, second = (model.head(params[name]) for name in shares)
        if first.softcap is not None:
            raise UserError(f"{model.family} models cap their logits, which a mixture of two cannot be written for; use another model")
        weight = jnp.concatenate([first.weight, second.weight], axis=1 if first.transposed else 0)
        bias = None if first.bias is None else (1 - share) * first.bias + share * second.bias
        return first._replace(weight=weight, bias=bias)

    return dataclasses.replace(model, config=config, encode=encode, apply=apply, head=head)
