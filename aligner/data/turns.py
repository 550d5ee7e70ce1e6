"""Which tokens of a conversation, or of running text, are imitated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from aligner.data import modalities
from aligner.data.samples import Bad, Document, Supervised, article, is_conversation
from aligner.data.templates import (
    Encoded,
    adds_special_tokens,
    chat_template,
    check_media,
    common_prefix,
    encode_answers,
    expansion,
    plain_text,
    render,
    render_marked,
    slots_of,
    write,
)
from aligner.data.together import Steps, Texts, Tokens, encoder
from aligner.models.pictures import Shown, placeholders
from aligner.types import Media

LOSS_ON = ("assistant", "last", "all")


@encoder
def encode_supervised(sample: Supervised, assets: Any, media: Media | None = None, loss_on: str = "assistant") -> Steps:
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
        Bad: nothing would be scored.
    """
    prompt, rest, options = sample.prompt, sample.conversation, sample.template
    answers = is_conversation(rest) and all(message["role"] == "assistant" for message in rest)
    if prompt and (not is_conversation(rest) or (answers and (loss_on != "last" or len(rest) == 1))):
        encoded = yield from encode_answers.steps(prompt, (rest,), assets, media, options)
        if loss_on != "all":
            return encoded
        return _scored(np.concatenate([encoded.prompt, *encoded.answers]), None, media)._replace(media=encoded.media, slots=encoded.slots)
    whole = [*prompt, *rest] if is_conversation(rest) else rest
    found = check_media(whole, media)
    shown = modalities.shown(found, assets, media)
    if is_conversation(rest):
        ids, mask = yield from _turns(whole, assets, loss_on, shown, options)
        if prompt and loss_on != "all":
            text = render(prompt, assets, shown, add_generation_prompt=True, **options)
            [(alone, _)] = yield Texts(assets.tokenizer, [text], adds_special_tokens(text, assets))
            mask[: common_prefix(alone, ids)] = False
    else:
        [(ids, _)] = yield Texts(assets.tokenizer, [write(plain_text(rest, assets), assets, shown)])
        mask = None
    places, found = expansion(ids, found, shown, media)
    ids, mask = ids[places], None if mask is None else mask[places]
    if mask is not None and media is not None and (mask & placeholders(ids, media)).any():
        raise Bad(f"{media.kind} placeholders", f"an assistant's turn holds {article(media.kind)}")
    return _scored(ids, mask, media)._replace(media=found, slots=slots_of(shown))


@encoder
def encode_document(sample: Document, assets: Any) -> Steps:
    """Tokens of running text: BOS where the tokenizer has one, the text, EOS. All but the first are scored."""
    [(ids, _)] = yield Texts(assets.tokenizer, [plain_text(sample.text, assets)])
    if len(ids) < 2:
        raise Bad("nothing to imitate", "the text is one token, and nothing predicts the first")
    return Encoded(ids[:1], (ids[1:],))


def piece(encoded: Encoded, start: int, stop: int) -> Encoded:
    """Tokens start..stop of a document as an example of its own: its first token is context."""
    tokens = np.concatenate([encoded.prompt, *encoded.answers])[start:stop]
    return Encoded(tokens[:1], (tokens[1:],))


def _scored(ids: np.ndarray, mask: np.ndarray | None, media: Media | None = None) -> Encoded:
    """What precedes the first scored token becomes the prompt, the rest the answer. Without a mask all is scored but pictures."""
    if mask is None:
        mask = np.ones(len(ids), bool) if media is None else ~placeholders(ids, media)
    mask = mask & (np.arange(len(ids)) > 0)  # nothing predicts the first token
    if not mask.any():
        raise Bad("nothing to imitate", "no token of the row would be scored")
    start = int(mask.argmax())
    return Encoded(ids[:start], (ids[start:],), scored=(mask[start:],))


def _turns(conversation: list[dict], assets: Any, loss_on: str, shown: Sequence[Shown], options: Mapping[str, Any]) -> Steps:
    """(ids, mask) of a whole conversation, placeholders not yet expanded; no mask where all is scored."""
    show, template = functools.partial(render, assets=assets, shown=shown, **options), chat_template(assets, options.get("tools"))
    if loss_on != "all" and not any(message["role"] == "assistant" for message in conversation):
        raise Bad("nothing to imitate", "the conversation has no turn of the assistant")
    marked = loss_on != "all" and _has_generation_marks(template)
    text, marks = render_marked(conversation, assets, shown, **options) if marked else (show(conversation), [])
    [tokens] = yield Texts(assets.tokenizer, [text], adds_special_tokens(text, assets), spans=loss_on != "all")
    if loss_on == "all":
        return tokens.ids, None
    if marked:
        mask = _by_generation_marks(marks[-1:] if loss_on == "last" else marks, tokens)
    else:
        mask = _by_rendering(conversation, text, tokens.spans, assets, loss_on, show)
    if not mask.any():
        raise Bad("nothing to imitate", f"the chat template marks no token as the assistant's: {_head(template)}")
    return tokens.ids, mask


def _has_generation_marks(template: str) -> bool:
    return "endgeneration" in template


def _by_generation_marks(marks: list[tuple[int, int]], tokens: Tokens) -> np.ndarray:
    """The template says itself, between {% generation %} and {% endgeneration %}, what the assistant writes."""
    mask = np.zeros(len(tokens.ids), bool)
    for start, end in marks:
        mask[tokens.over(start, end)] = True
    return mask


def _by_rendering(
    conversation: list[dict], text: str, spans: np.ndarray, assets: Any, loss_on: str, show: Callable[..., str]
) -> np.ndarray:
    """The template does not say: rendering parts of the conversation shows where each turn of the assistant stands."""
    starts, ends = spans.T
    mask = np.zeros(len(spans), bool)
    turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
    for number in turns[-1:] if loss_on == "last" else turns:
        start, end = _span(conversation, number, text, assets, show)
        words = start + len(text[start:end].rstrip())  # a token over the start is the answer's, one over the end if it holds its words
        inside = np.flatnonzero((ends > start) & (ends > starts) & ((ends <= end) | (starts < words)) & (starts < end))
        if len(inside):
            mask[inside[0] : inside[-1] + 1] = True
    return mask


def _span(conversation: list[dict], number: int, text: str, assets: Any, show: Callable[..., str]) -> tuple[int, int]:
    """Where in the text a turn of the assistant stands, with what the template ends it with.

    Usually the text grows turn by turn: the turn is what follows the prompt that asks for it, up to where the next one begins. Some
    templates write a turn differently when others follow (reasoning is left out, another token ends it); then it is what changes in the
    text when its words do.
    """
    after = show(conversation[: number + 1])
    eos = assets.tokenizer.eos_token or ""
    shorter = after.removesuffix(eos)  # some end the whole conversation once more
    end = next((len(way) for way in (after, shorter, after.rstrip(), shorter.rstrip()) if text.startswith(way)), None)
    grows = number and text.startswith(show(conversation[:number]).removesuffix(eos).rstrip())
    start = _common(text, show(conversation[:number], add_generation_prompt=True)) if grows else None
    if start is not None and end is not None:
        return start, end
    marked = [dict(message, content=_MARKER) if i == number else message for i, message in enumerate(conversation)]
    other = show(marked)
    first = _common(text, other)
    end = len(text) - _common(text[:first:-1], other[:first:-1])
    alone = show(marked[: number + 1])
    return first if start is None else start, end + _common(text[end:], alone[alone.find(_MARKER) + 1 :])


_MARKER = "\ue000"  # of private use: no text holds it


def _common(a: str, b: str) -> int:
    """Length of the common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _head(template: str) -> str:
    template = " ".join(template.split())
    return template if len(template) <= 80 else template[:80] + "..."
