"""From a sample to token ids: render by the checkpoint's chat template, tokenise the whole, find where the answers begin."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aligner.data import media as media_files
from aligner.data.samples import Bad, Preference, TwoSided, images_of, is_conversation, media_of, parts_of
from aligner.data.together import Steps, Texts, encoder
from aligner.models.pictures import Shown
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
# Not the row's fault: the census stops at it.
NO_IMAGES = "the model takes no images"
NO_SOUND = "the model takes no audio or video"


class Encoded(NamedTuple):
    """A prompt and its answers as token ids. No token of the prompt is scored.

    Attributes:
        prompt: int32 [n], with every image's placeholders in full number.
        answers: int32 [m_r] each, in the order of their roles 1..R.
        images: references of the images, in reading order.
        scored: bool [m_r] each, which tokens of the answers are scored; None scores all.
        values: numbers that belong to the example, by the name of their column in the batch, such as a label.
        slots: of a row's pixels that its images fill; None is one each.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    images: tuple[Any, ...] = ()
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
        sides[0].images,
        slots=sides[0].slots,
        scored=tuple(np.repeat([False, True], [len(part) for part in parts]) for parts in answers),
    )


@encoder
def encode_answers(
    prompt: Any, answers: tuple[Any, ...], assets: Any, media: Media | None = None, options: Mapping[str, Any] | None = None
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

    Raises:
        Bad: the template refuses the conversation, an answer is empty, or placeholders and images do not match.
    """
    images, options = check_media(prompt), options or {}
    shown = media_files.shown(images, assets, media)
    if not prompt:
        raise Bad("empty prompt", "nothing stands before the answers")
    if any(check_media(answer) for answer in answers):
        raise Bad("image placeholders", "an answer holds an image; images are supported in prompts")
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
    if any(np.array_equal(tail, tails[0]) for tail in tails[1:]):
        raise Bad("answers are equal", "the answers have the same tokens")
    if any((tail == media.placeholder).any() for tail in tails if media is not None):
        raise Bad("image placeholders", "an answer's text holds an image token")
    return Encoded(head[expansion(head, shown, media, len(images))], tails, images, slots=slots_of(shown))


def check_media(text: Any) -> tuple[Any, ...]:
    """The images of a text; what no model here takes yet is refused."""
    if any(media_of(text, kind) for kind in ("audio", "video")):
        raise Bad(NO_SOUND)
    return images_of(text)


@encoder
def encode_prompt(prompt: Any, assets: Any, media: Media | None = None, options: Mapping[str, Any] | None = None) -> Steps:
    """Tokens of a prompt alone, as the model meets it before it answers: a conversation with the generation prompt, or plain text.

    Raises:
        Bad: the template refuses the conversation, or placeholders and images do not match.
    """
    images = check_media(prompt)
    shown = media_files.shown(images, assets, media)
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
    return Encoded(tokens[expansion(tokens, shown, media, len(images))], (), images, slots=slots_of(shown))


def chat_template(assets: Any) -> str:
    """The template that conversations are rendered by: the processor's, else the tokenizer's, else DEFAULT_TEMPLATE."""
    template = (assets.processor is not None and assets.processor.chat_template) or assets.tokenizer.chat_template or DEFAULT_TEMPLATE
    if isinstance(template, dict):  # several named ones
        template = template.get("default") or next(iter(template.values()))
    return template


def image_token(assets: Any) -> str:
    """The text that stands for an image in a rendered conversation; with some families what begins an image (Gemma 3)."""
    return getattr(assets.processor, "boi_token", None) or getattr(assets.processor, "image_token", None) or "<image>"


def ends_with_eos(encoded: Encoded, tokenizer: Any) -> bool:
    """True if every answer trains the end of the sequence. By the id itself: padding may well have the same id."""
    return all(tokenizer.eos_token_id in answer[-4:] for answer in encoded.answers)  # templates may add white space after it


def slots_of(shown: Sequence[Shown]) -> int:
    """How many slots all of these pictures fill."""
    return sum(one.slots for one in shown)


def write(text: str, assets: Any, shown: Sequence[Shown]) -> str:
    """The text with each picture written as its model wants it, in place of one image token."""
    if not any(one.text for one in shown):
        return text
    token = image_token(assets)
    between = text.split(token)  # text that holds fewer or more tokens than pictures is caught where ids are expanded
    written = [one.text or token for one in shown] + [token] * len(between)
    return "".join(part for pair in zip(between, [*written[: len(between) - 1], ""]) for part in pair)


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
            content = [{"type": "image"} if part["type"] == "image" else part for part in parts_of(content)]
        elif not isinstance(content, str):
            content = _plain(content, assets, after_image="\n")
        messages.append({**message, "content": content})
    # The tokenizer's tokens will do for processors as well: all that a template needs is the messages and the special tokens.
    options = {**assets.tokenizer.special_tokens_map, **options, "return_assistant_tokens_mask": marks}
    show = lambda messages: render_jinja_template([messages], chat_template=chat_template(assets), **options)
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
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
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


def _plain(text: Any, assets: Any, after_image: str = "") -> str:
    return "".join(image_token(assets) + after_image if part["type"] == "image" else part["text"] for part in parts_of(text))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def expansion(tokens: np.ndarray, shown: Sequence[Shown], media: Media | None, images: int) -> np.ndarray:
    """Indices that repeat every image's placeholder once per feature: what the processor does to the text, without its pixels."""
    places = np.arange(len(tokens))
    if media is None:
        if images:
            raise Bad(NO_IMAGES)
        return places
    marks = tokens == media.placeholder
    runs = [run for one in shown for run in one.runs]
    if marks.sum() != len(runs):
        raise Bad("image placeholders", f"the text holds {marks.sum()} image tokens for {images} images")
    times = np.ones(len(tokens), np.int64)
    times[marks] = runs
    return np.repeat(places, times)
