"""From a sample to token ids: render by the checkpoint's chat template, tokenise the whole, find where the answers begin."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aligner.data import modalities
from aligner.data.samples import Bad, Preference, TwoSided, article, is_conversation, media_of, parts_of
from aligner.data.together import Steps, Texts, encoder
from aligner.models.pictures import Shown, in_order, placeholders
from aligner.types import Media, UserError

# Used where a checkpoint brings no template: Vicuna's manner, as LLaVA-1.5 was trained.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ ('USER: ' if message['role'] == 'user' else '') + message['content'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_PARTS = re.compile(r"\btype\b|content['\"]?\]?\s*\[")  # a template that looks at a part's type, or at a part
_RENDERING = threading.Lock()


class Refused(Bad):
    """The model takes no media of a kind that stands in a row. It is not the row's fault, so the census stops there."""

    def __init__(self, kind: str):
        super().__init__(f"the model takes no {kind}")
        self.kind = kind


class Encoded(NamedTuple):
    """A prompt and its answers as token ids. No token of the prompt is scored.

    Attributes:
        prompt: int32 [n], with every placeholder in full number.
        answers: int32 [m_r] each, in the order of their roles 1..R.
        media: (kind, reference) of all that is shown, in the order of their placeholders.
        scored: bool [m_r] each, which tokens of the answers are scored; None scores all.
        values: numbers that belong to the example, by the name of their column in the batch, such as a label.
        slots: of a row's pixels that its media fill; None is one each.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    media: tuple[tuple[str, Any], ...] = ()
    scored: tuple[np.ndarray, ...] | None = None
    values: Mapping[str, Any] | None = None
    slots: int | None = None


@encoder
def encode_preference(sample: Preference, assets: Any, media: Media | None = None) -> Steps:
    """Tokens of a pair; answers are (chosen, rejected). See `encode_answers`."""
    encoded = yield from encode_answers.steps(sample.prompt, (sample.chosen, sample.rejected), assets, media, sample.template)
    return encoded._replace(values={"margin": sample.margin, "safe": sample.safe})


@encoder
def encode_two_sided(sample: TwoSided, assets: Any, media: Media | None = None) -> Steps:
    """Tokens of two pairs under two prompts; answers are (chosen, rejected) of the good side, then of the bad.

    What both prompts begin with is the prompt of all; the rest of its own prompt stands, not scored, before each answer.
    """
    good = yield from encode_preference.steps(sample.good, assets, media)
    bad = yield from encode_preference.steps(sample.bad, assets, media)
    sides = [good, bad]
    shared = common_prefix(sides[0].prompt, sides[1].prompt)
    if not shared:
        raise Bad("empty prompt", "the two prompts have no first token in common; a chat template or a BOS token gives one")
    answers = [(side.prompt[shared:], answer) for side in sides for answer in side.answers]
    return Encoded(
        sides[0].prompt[:shared],
        tuple(np.concatenate(parts) for parts in answers),
        sides[0].media,
        slots=sides[0].slots,
        scored=tuple(np.repeat([False, True], [len(part) for part in parts]) for parts in answers),
    )


@encoder
def encode_answers(
    prompt: Any,
    answers: tuple[Any, ...],
    assets: Any,
    media: Media | None = None,
    options: Mapping[str, Any] | None = None,
    distinct: bool = True,
) -> Steps:
    """Render and tokenise a prompt with each of its answers.

    Every text is tokenised whole, as the model meets it when it generates; the prompt that is shared and not scored is the longest
    common token prefix of the prompt alone (with the generation prompt) and of every full text. Tokens that merge across the boundary thus
    belong to the answers. Conversations end as the template ends them; plain text gets EOS after each answer.

    Args:
        prompt: a conversation or plain text (aligner/data/samples.py).
        answers: the answers, of the same form.
        assets: has `tokenizer`, and `processor` (None for a text model).
        media: the model's media; None for a text model.
        options: arguments for the chat template.
        distinct: two answers that have the same tokens are refused: there is nothing to learn from them.

    Raises:
        Bad: the template refuses the conversation, an answer is empty, two are the same, or placeholders and images do not match.
    """
    found, options = check_media(prompt, media), options or {}
    shown = modalities.shown(found, assets, media)
    if not prompt:
        raise Bad("empty prompt", "nothing stands before the answers")
    for kind, _ in (medium for answer in answers for medium in check_media(answer, media)):
        raise Bad(f"{kind} placeholders", f"an answer holds {article(kind)}; it must stand in the prompt")
    if is_conversation(prompt) or any(is_conversation(answer) for answer in answers):
        texts = [render(prompt, assets, shown, add_generation_prompt=True, **options)]
        texts += [render(prompt + answer, assets, shown, **options) for answer in answers]
        special = adds_special_tokens(texts[0], assets)
    else:
        start = write(_plain(prompt, assets), assets, shown)
        texts = [start] + [start + plain_text(answer, assets) for answer in answers]
        special = True
    tokenised = yield Texts(assets.tokenizer, texts, special)
    alone, *full = (tokens.ids for tokens in tokenised)
    shared = min(common_prefix(alone, ids) for ids in full)
    head, tails = alone[:shared], tuple(ids[shared:] for ids in full)
    if not shared:
        raise Bad("empty prompt", "no token stands before the answers, so their first token cannot be predicted")
    if any(not len(tail) for tail in tails):
        raise Bad("empty answer", "an answer has no tokens")
    if distinct and any(np.array_equal(tail, tails[0]) for tail in tails[1:]):
        raise Bad("answers are equal", "the answers have the same tokens")
    if media is not None and any(placeholders(tail, media).any() for tail in tails):
        raise Bad(f"{media.kind} placeholders", f"an answer's text holds {article(media.kind)} token")
    places, found = expansion(head, found, shown, media)
    return Encoded(head[places], tails, found, slots=slots_of(shown))


def check_media(text: Any, media: Media | None) -> tuple[tuple[str, Any], ...]:
    """(kind, reference) of what a text shows, in reading order; a kind that the model does not take is refused."""
    found = media_of(text)
    for kind, _ in found:
        if media is None or kind not in media.tokens:
            raise Refused(kind)
    return found


@encoder
def encode_prompt(prompt: Any, assets: Any, media: Media | None = None, options: Mapping[str, Any] | None = None) -> Steps:
    """Tokens of a prompt alone, as the model meets it before it answers: a conversation with the generation prompt, or plain text.

    Raises:
        Bad: the template refuses the conversation, or placeholders and images do not match.
    """
    found = check_media(prompt, media)
    shown = modalities.shown(found, assets, media)
    if is_conversation(prompt):
        text = render(prompt, assets, shown, add_generation_prompt=True, **(options or {}))
        special = adds_special_tokens(text, assets)
    else:
        text, special = write(_plain(prompt, assets), assets, shown), True
    [(tokens, _)] = yield Texts(assets.tokenizer, [text], special)
    eos = assets.tokenizer.eos_token
    if eos is not None and len(tokens) and tokens[-1] == assets.tokenizer.eos_token_id and not text.rstrip().endswith(eos):
        tokens = tokens[:-1]  # some tokenizers end every text
    if not len(tokens):
        raise Bad("empty prompt", "the prompt has no tokens")
    places, found = expansion(tokens, found, shown, media)
    return Encoded(tokens[places], (), found, slots=slots_of(shown))


def chat_template(assets: Any, tools: Sequence[Any] | None = None) -> str:
    """The template that conversations are rendered by: the processor's, else the tokenizer's, else DEFAULT_TEMPLATE; of several named ones
    `tool_use` where there are tools, as `transformers` chooses, else `default`."""
    template = (assets.processor is not None and assets.processor.chat_template) or assets.tokenizer.chat_template or DEFAULT_TEMPLATE
    if isinstance(template, dict):  # several named ones
        template = (tools is not None and template.get("tool_use")) or template.get("default") or next(iter(template.values()))
    return template


def media_token(assets: Any, kind: str) -> str:
    """The text that stands for a medium in a rendered conversation; with some families what begins an image (Gemma 3)."""
    begins = getattr(assets.processor, "boi_token", None) if kind == "image" else None
    return begins or getattr(assets.processor, f"{kind}_token", None) or f"<{kind}>"


def ends_with_eos(encoded: Encoded, eos: int | None) -> bool:
    """True if every answer trains the end of the sequence. By the id itself: padding may well have the same id."""
    return all(eos in answer[-4:].tolist() for answer in encoded.answers)  # templates may add white space after it


def slots_of(shown: Sequence[Shown]) -> int:
    """How many slots all of these fill."""
    return sum(one.slots for one in shown)


def write(text: str, assets: Any, shown: Sequence[Shown]) -> str:
    """The text with each picture written as its model wants it, in place of one token of its kind."""
    if not any(one.text for one in shown):
        return text
    # text that holds fewer or more tokens than pictures is caught where ids are expanded
    left = {media_token(assets, kind): iter([one for one in shown if one.kind == kind]) for kind in {one.kind for one in shown}}
    written = lambda match: getattr(next(left[match[0]], None), "text", None) or match[0]
    return re.sub("|".join(map(re.escape, left)), written, text)


def render(conversation: list[dict], assets: Any, shown: Sequence[Shown] = (), **options: Any) -> str:
    """What the chat template makes of a conversation; `options` are the template's, `shown` says how its first pictures are written.

    Raises:
        Bad: the template refuses the conversation.
        UserError: the template itself is broken.
    """
    return write(_rendered(conversation, assets, False, options)[0][0], assets, shown)


def render_marked(
    conversation: list[dict], assets: Any, shown: Sequence[Shown] = (), **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """(text, where in it {% generation %} and {% endgeneration %} stand); raises as `render` does."""
    texts, spans = _rendered(conversation, assets, True, options)
    moved = lambda place: len(write(texts[0][:place], assets, shown))
    return write(texts[0], assets, shown), [(moved(start), moved(end)) for start, end in spans[0]]


def _rendered(conversation: list[dict], assets: Any, marks: bool, options: Mapping[str, Any]) -> tuple[list[str], list]:
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    # Processors' templates want lists of parts; tokenizers' (and ours) want strings.
    structured = assets.processor is not None and _PARTS.search(assets.processor.chat_template or "") is not None
    messages = []
    for message in conversation:
        content = message["content"]
        if structured:
            content = [part if part["type"] == "text" else {"type": part["type"]} for part in parts_of(content)]
        elif not isinstance(content, str):
            content = _plain(content, assets, after="\n")
        messages.append({**message, "content": content})
    # The tokenizer's tokens will do for processors as well: all that a template needs is the messages and the special tokens.
    options = {**assets.tokenizer.special_tokens_map, **options, "return_assistant_tokens_mask": marks}
    template = chat_template(assets, options.get("tools"))
    if "tool_calls" not in template and any(message.get("tool_calls") for message in messages):
        raise Bad("tool calls", "the chat template leaves them out; set config.data.chat_template to one that writes them")
    show = lambda messages: render_jinja_template([messages], chat_template=template, **options)
    try:
        # One at a time: what notes where {% generation %} stands belongs to the compiled template, which threads share.
        with _RENDERING:
            try:
                found = show(messages)
            except TypeError:  # most templates want a call's arguments as an object, some as JSON text
                if not any(message.get("tool_calls") for message in messages):
                    raise
                found = show([*map(_json_calls, messages)])
        found[0][0].encode()  # half a character, from a row's options, is a ValueError here; tokenizers do not say which text it is in
        return found
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja, line {error.lineno}: {error.message}; set config.data.chat_template.") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Bad("chat template", f"the chat template refuses the conversation: {error}") from error


def _json_calls(message: dict) -> dict:
    """The message with the arguments of its calls as JSON text."""
    functions = [call.get("function", call) for call in message.get("tool_calls", ())]
    calls = [{"type": "function", "function": {**function, "arguments": json.dumps(function["arguments"])}} for function in functions]
    return {**message, "tool_calls": calls} if calls else message


def adds_special_tokens(text: str, assets: Any) -> bool:
    """Templates write their own special tokens. A processor adds them where its template has none, a bare tokenizer does not."""
    bos = assets.tokenizer.bos_token
    return assets.processor is not None and not (bos and text.startswith(bos))


def plain_text(text: Any, assets: Any) -> str:
    """Text without messages as it is tokenised: image tokens for pictures, EOS at the end."""
    eos = assets.tokenizer.eos_token
    if eos is None:
        raise UserError("the tokenizer has no EOS token, which plain text must end with; set it in tokenizer_config.json.")
    text = _plain(text, assets)
    return text if text.endswith(eos) else text + eos


def _plain(text: Any, assets: Any, after: str = "") -> str:
    written = lambda part: part["text"] if part["type"] == "text" else media_token(assets, part["type"]) + after
    return "".join(map(written, parts_of(text)))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def expansion(
    tokens: np.ndarray, found: Sequence[tuple[str, Any]], shown: Sequence[Shown], media: Media | None
) -> tuple[np.ndarray, tuple[tuple[str, Any], ...]]:
    """Make room for features: what the processor does to the text, without its pixels.

    Returns:
        (indices that repeat every placeholder once per feature, `found` in the order of their placeholders: some templates write a
        message's images before its videos, wherever they stand in it).
    """
    times = np.ones(len(tokens), np.int64)
    for kind, token in (media.tokens if media is not None else {}).items():
        of_kind, marks = [one for one in shown if one.kind == kind], tokens == token
        runs = [run for one in of_kind for run in one.runs]
        if marks.sum() != len(runs):
            raise Bad(f"{kind} placeholders", f"the text holds {marks.sum()} {kind} tokens for {len(of_kind)} {kind}s")
        times[marks] = runs
    places = np.repeat(np.arange(len(tokens)), times)
    if not found:
        return places, ()
    marks = tokens[places]
    order = in_order(marks[placeholders(marks, media)], [(one.kind, sum(one.runs)) for one in shown], media)
    return places, tuple(found[number] for number in order)
