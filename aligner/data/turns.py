"""Which tokens of a conversation, or of running text, are imitated."""

from __future__ import annotations

from typing import Any

import numpy as np

from aligner.data.samples import Bad, Document, Supervised, images_of, is_conversation
from aligner.data.templates import Encoded, adds_special_tokens, chat_template, common_prefix, encode_answers, expansion, plain_text, render
from aligner.types import Media, UserError

LOSS_ON = ("assistant", "last", "all")


def encode_supervised(sample: Supervised, assets: Any, media: Media | None = None, loss_on: str = "assistant") -> Encoded:
    """Tokens of a conversation or a text, and which of them are scored. Everything is one answer (R=1) to its own beginning.

    A prompt with one answer is tokenised as pairs are (`encode_answers`), and all that follows the prompt is scored, as TRL's
    `completion_only_loss` does. In a conversation of several turns the assistant's turns are scored, each up to and including what the
    template ends it with. Plain text without a prompt is scored whole; it ends with EOS.

    Args:
        sample: see aligner/data/samples.py.
        assets: has `tokenizer`, and `processor` (None for a text model).
        media: the model's media; None for a text model.
        loss_on: "assistant" scores every turn of the assistant, "last" only the last one, "all" every token but the first.

    Raises:
        Bad: nothing would be scored, or the template does not say where the assistant's turns are.
    """
    prompt, rest = sample.prompt, sample.conversation
    placeholder = None if media is None else media.placeholder
    if prompt and (not is_conversation(rest) or all(message["role"] == "assistant" for message in rest)):
        encoded = encode_answers(prompt, (rest,), assets, media)
        if loss_on != "all":
            return encoded
        return _scored(np.concatenate([encoded.prompt, *encoded.answers]), None, encoded.images, placeholder)
    whole = [*prompt, *rest] if is_conversation(rest) else rest
    images = images_of(whole)
    if is_conversation(rest):
        ids, mask = _turns(whole, assets, loss_on)
        if prompt and loss_on != "all":
            alone, _ = _tokens(render(prompt, assets, add_generation_prompt=True), assets)
            mask[: common_prefix(alone, ids)] = False
    else:
        ids, mask = np.array(assets.tokenizer(plain_text(rest, assets), verbose=False)["input_ids"], np.int32), None
    places = expansion(ids, images, media)
    ids, mask = ids[places], None if mask is None else mask[places]
    if mask is not None and (mask & (ids == placeholder)).any():
        raise Bad("image placeholders", "an assistant's turn holds an image")
    return _scored(ids, mask, images, placeholder)


def encode_document(sample: Document, assets: Any) -> Encoded:
    """Tokens of running text: BOS where the tokenizer has one, the text, EOS. All but the first are scored."""
    ids = np.array(assets.tokenizer(plain_text(sample.text, assets), verbose=False)["input_ids"], np.int32)
    return Encoded(ids[:1], (ids[1:],))


def piece(encoded: Encoded, start: int, stop: int) -> Encoded:
    """Tokens start..stop of a document as an example of its own: its first token is context."""
    tokens = np.concatenate([encoded.prompt, *encoded.answers])[start:stop]
    return Encoded(tokens[:1], (tokens[1:],))


def _scored(ids: np.ndarray, mask: np.ndarray | None, images: tuple[Any, ...] = (), placeholder: int | None = None) -> Encoded:
    """What precedes the first scored token becomes the prompt, the rest the answer. Without a mask all is scored but pictures."""
    if mask is None:
        mask = np.ones(len(ids), bool) if placeholder is None else ids != placeholder
    mask = mask & (np.arange(len(ids)) > 0)  # nothing predicts the first token
    if not mask.any():
        raise Bad("nothing to imitate", "no token of the row would be scored")
    start = int(mask.argmax())
    return Encoded(ids[:start], (ids[start:],), images, (mask[start:],))


def _tokens(text: str, assets: Any, **options: Any) -> tuple[np.ndarray, Any]:
    found = assets.tokenizer(text, add_special_tokens=adds_special_tokens(text, assets), verbose=False, **options)
    return np.array(found["input_ids"], np.int32), found.get("offset_mapping")


def _turns(conversation: list[dict], assets: Any, loss_on: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(ids, mask) of a whole conversation, placeholders not yet expanded; no mask where all is scored."""
    text = render(conversation, assets)
    if loss_on == "all":
        return _tokens(text, assets)[0], None
    if not any(message["role"] == "assistant" for message in conversation):
        raise Bad("nothing to imitate", "the conversation has no turn of the assistant")
    if _has_generation_marks(chat_template(assets)):
        ids, mask = _by_generation_marks(conversation, text, assets)
        spans = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8)])) == 1)
        if loss_on == "last" and len(spans):
            mask[: spans[-1]] = False
    else:
        ids, mask = _by_growing_prefix(conversation, text, assets, loss_on)
    if not mask.any():
        raise Bad("nothing to imitate", f"the chat template marks no token as the assistant's: {_head(assets)}")
    return ids, mask


def _has_generation_marks(template: str) -> bool:
    return "endgeneration" in template


def _by_generation_marks(conversation: list[dict], text: str, assets: Any) -> tuple[np.ndarray, np.ndarray]:
    """The template says itself, between {% generation %} and {% endgeneration %}, what the assistant writes."""
    found = render(conversation, assets, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, bare, mask = _tokens(text, assets)[0], np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], bool)
    before = next(n for n in range(len(ids) - len(bare) + 1) if np.array_equal(ids[n : n + len(bare)], bare))  # special tokens around it
    return ids, np.pad(mask, (before, len(ids) - len(bare) - before))


def _by_growing_prefix(conversation: list[dict], text: str, assets: Any, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
    """The assistant's turn is what the text gains when the turn is added, after the prompt that asks for it.

    White space that the template puts after a turn is not the assistant's; what ends the turn (EOS) is.
    """
    if not assets.tokenizer.is_fast:
        raise UserError("the tokenizer cannot say where in the text its tokens stand; add tokenizer.json to the checkpoint folder.")
    ids, offsets = _tokens(text, assets, return_offsets_mapping=True)
    starts, ends = np.array(offsets).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
    for number in turns[-1:] if loss_on == "last" else turns:
        start, end = _span(conversation, number, text, assets)
        inside = np.flatnonzero((ends > start) & (starts < end) & (ends > starts))  # a token that merges over the start is the answer's
        if len(inside):
            mask[inside[0] : inside[-1] + 1] = True
    return ids, mask


def _span(conversation: list[dict], number: int, text: str, assets: Any) -> tuple[int, int]:
    """Where in the text a turn of the assistant stands."""
    after = render(conversation[: number + 1], assets).rstrip()
    before = render(conversation[:number], assets) if number else ""
    if not (text.startswith(after) and text.startswith(before.rstrip())):
        raise Bad(
            "chat template",
            "the template writes a turn differently when others follow, so the assistant's words cannot be told apart; mark them in it "
            f"with {{% generation %}}, or set config.data.loss_on=last: {_head(assets)}",
        )
    if not number:  # nobody asked: the turn begins with its own words
        content = plain_text(conversation[0]["content"], assets).removesuffix(assets.tokenizer.eos_token).strip()
        return max(text.find(content), 0), len(after)
    asked = render(conversation[:number], assets, add_generation_prompt=True)
    start = next((i for i, (a, b) in enumerate(zip(asked, text)) if a != b), min(len(asked), len(text)))
    return start, len(after)


def _head(assets: Any) -> str:
    template = " ".join(chat_template(assets).split())
    return template if len(template) <= 80 else template[:80] + "..."
