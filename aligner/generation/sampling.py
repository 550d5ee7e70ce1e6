"""From next-token logits to a token: filters by thresholds, and a draw by the inverse of the distribution function.

Nothing is sorted: "the k likeliest" and "the smallest set of mass p" are both all values from some threshold on, which a bisection over
the bits of a float finds exactly.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aligner.types import UserError

BLOCK = 128  # values that the draw looks at together


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and order of application are those of `transformers`.

    Attributes:
        max_new_tokens: an answer's tokens, the stop token among them.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens (and what is as likely as the last of them); 0 is off.
        top_p: only the fewest tokens that together have this probability; 1 is off.
        min_p: only tokens at least so likely relative to the likeliest; 0 is off.
        repetition_penalty: logits of tokens that stand in the prompt or the answer are divided by it, negative ones multiplied; 1 is off.
        stop_tokens: ids that end an answer and belong to it.
        stop_strings: texts that end an answer and belong to it.
        suppress_tokens: ids that are never chosen; the model's image placeholder always is one, for it stands for pixels.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    suppress_tokens: tuple[int, ...] = ()


def check(sampling: Sampling, where: str = "config.generation.") -> None:
    """Raises UserError where a setting makes no sense; `where` stands before its name."""
    s = sampling
    rules = {
        "max_new_tokens": (s.max_new_tokens >= 1, "at least 1"),
        "temperature": (s.temperature >= 0, "0 (greedy) or above"),
        "top_k": (s.top_k >= 0, "0 (off) or above"),
        "top_p": (0 < s.top_p <= 1, "above 0 and at most 1 (off)"),
        "min_p": (0 <= s.min_p <= 1, "between 0 (off) and 1"),
        "repetition_penalty": (s.repetition_penalty > 0, "above 0; 1 is off"),
        "stop_strings": (all(s.stop_strings), "texts that are not empty"),
    }
    for name, (fine, words) in rules.items():
        if not fine:
            shown = name.replace("_", "-") if where == "--" else name
            raise UserError(f"{where}{shown} is {getattr(s, name)}; it must be {words}")


def sample(
    sampling: Sampling, logits: Float[Array, "B V"], uniform: Float[Array, "B"], seen: Bool[Array, "B V"] | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """A token for every row.

    Args:
        sampling: its settings are part of the program.
        logits: float32 or wider.
        uniform: a draw from [0, 1) for every row; not read where temperature is 0.
        seen: tokens of the prompt and the answer so far, for the repetition penalty.

    Returns:
        (tokens, log-probabilities of the tokens). The log-probabilities are the model's at this temperature (1 where it is 0), before
        filters and penalties: what a training step computes for the same tokens.
    """
    chosen_from = logits
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalty = sampling.repetition_penalty
        chosen_from = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.suppress_tokens:
        chosen_from = chosen_from.at[:, jnp.asarray(sampling.suppress_tokens)].set(-jnp.inf)
    if sampling.temperature == 0:
        tokens = jnp.argmax(chosen_from, axis=-1).astype(jnp.int32)
    else:
        tokens = draw(filtered_weights(sampling, chosen_from / sampling.temperature), uniform)
        logits = logits / sampling.temperature
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def filtered_weights(sampling: Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """What the tokens' probabilities are proportional to, the likeliest having 1; 0 where a filter leaves a token out."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if 0 < sampling.top_k < logits.shape[-1]:
        weights = jnp.where(weights >= threshold(weights, jnp.ones_like(weights), sampling.top_k), weights, 0)
    if sampling.top_p < 1:
        mass = sampling.top_p * jnp.sum(weights, axis=-1, keepdims=True)
        weights = jnp.where(weights >= threshold(weights, weights, mass), weights, 0)
    if sampling.min_p > 0:
        weights = jnp.where(weights >= sampling.min_p, weights, 0)
    return weights


def threshold(values: Float[Array, "B V"], masses: Float[Array, "B V"], target: Any) -> Float[Array, "B 1"]:
    """The largest t for which the masses of all values >= t come to the target; values must not be negative.

    The bits of floats that are not negative are ordered as the floats are, so that halving an interval of integers ends at t itself.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    low = jnp.zeros((*values.shape[:-1], 1), jnp.int32)
    high = jnp.max(bits, axis=-1, keepdims=True) + 1

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, masses, 0), axis=-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32).astype(values.dtype)


def draw(weights: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """Tokens with probability proportional to their weight: the first whose cumulated weight exceeds uniform * total.

    In two levels, so that no long cumulated sum is made and rounding stays that of short ones: the block, then the token in it.
    """
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % BLOCK))).reshape(rows, -1, BLOCK)

    def pick(parts: Float[Array, "B n"], target: Float[Array, "B"]) -> tuple[Array, Array]:
        ends = jnp.cumsum(parts, axis=-1)
        index = jnp.sum(ends <= target[:, None], axis=-1)
        last = parts.shape[-1] - 1 - jnp.argmax(parts[:, ::-1] > 0, axis=-1)  # rounding must not lead to where there is no weight
        index = jnp.minimum(index, last)
        before = jnp.take_along_axis(ends - parts, index[:, None], axis=-1)[:, 0]
        return index, jnp.maximum(target - before, 0)

    totals = jnp.sum(blocks, axis=-1)
    block, rest = pick(totals, uniform * jnp.sum(totals, axis=-1))
    inside, _ = pick(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    return (block * BLOCK + inside).astype(jnp.int32)


def of_checkpoint(assets: Any) -> dict[str, tuple[int, ...]]:
    """What a checkpoint's files say of writing, as settings of `Sampling`. How tokens are drawn is the user's to say, not theirs."""
    return {"stop_tokens": stop_tokens(assets), "suppress_tokens": suppressed_tokens(assets)}


def stop_tokens(assets: Any) -> tuple[int, ...]:
    """The ids that end an answer of a checkpoint: of generation_config.json, else of config.json, with the tokenizer's EOS."""
    config = assets.config_dict
    sources = [generation_config(assets), config, config.get("text_config") or {}]
    found = next((source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None), ())
    ids = list(np.atleast_1d(np.asarray(found, int)))
    if assets.tokenizer is not None and assets.tokenizer.eos_token_id is not None:
        ids.append(assets.tokenizer.eos_token_id)
    return tuple(int(i) for i in dict.fromkeys(ids))


def suppressed_tokens(assets: Any) -> tuple[int, ...]:
    """The ids that generation_config.json never lets be chosen: its `suppress_tokens`, and of its `bad_words_ids` those of one token, but
    for EOS, as `transformers` takes them. Words of several tokens are not looked for."""
    config = generation_config(assets)
    ends = np.atleast_1d(np.asarray(config.get("eos_token_id") or (), int))
    words = [word[0] for word in config.get("bad_words_ids") or () if len(word) == 1 and word[0] not in ends]
    return tuple(dict.fromkeys([*(config.get("suppress_tokens") or ()), *words]))


def generation_config(assets: Any) -> dict[str, Any]:
    """What generation_config.json says; nothing where there is none."""
    path = assets.folder / "generation_config.json"
    return json.loads(path.read_text()) if path.exists() else {}
