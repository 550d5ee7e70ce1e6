"""From a sample to token ids: render by the checkpoint's chat template, tokenise the whole, find where the answers begin."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from aligner.data.samples import Bad, Preference, TwoSided, images_of, is_conversation, parts_of
from aligner.types import Media, UserError

# Used where a checkpoint brings no template: Vicuna's manner, as LLaVA-1.5 was trained.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ ('USER: ' if message['role'] == 'user' else '') + message['content'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_RENDERING = threading.Lock()
NO_IMAGES = "the model takes no images"  # not the row's fault: the census stops at it


class Encoded(NamedTuple):
    """A prompt and its answers as token ids. No token of the prompt is scored.

    Attributes:
        prompt: int32 [n], with every image's placeholders in full number.
        answers: int32 [m_r] each, in the order of their roles 1..R.
        images: references of the images, in reading order.
        scored: bool [m_r] each, which tokens of the answers are scored; None scores all.
        values: numbers that belong to the example, by the name of their column in the batch, such as a label.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    images: tuple[Any, ...] = ()
    scored: tuple[np.ndarray, ...] | None = None
    values: Mapping[str, Any] | None = None


def encode_preference(sample: Preference, assets: Any, media: Media | None = None) -> Encoded:
    """Tokens of a pair; answers are (chosen, rejected). See `encode_answers`."""
    encoded = encode_answers(sample.prompt, (sample.chosen, sample.rejected), assets, media)
    return encoded._replace(values={"margin": sample.margin, "safe": sample.safe})


def encode_two_sided(sample: TwoSided, assets: Any, media: Media | None = None) -> Encoded:
    """Tokens of two pairs under two prompts; answers are (chosen, rejected) of the good side, then of the bad.

    What both prompts begin with is the prompt of all; the rest of its own prompt stands, not scored, before each answer.
    """
    sides = [encode_preference(pair, assets, media) for pair in (sample.good, sample.bad)]
    shared = common_prefix(sides[0].prompt, sides[1].prompt)
    if not shared:
        raise Bad("empty prompt", "the two prompts have no first token in common; a chat template or a BOS token gives one")
    answers = [(side.prompt[shared:], answer) for side in sides for answer in side.answers]
    return Encoded(
        sides[0].prompt[:shared],
        tuple(np.concatenate(parts) for parts in answers),
        sides[0].images,
        scored=tuple(np.repeat([False, True], [len(part) for part in parts]) for parts in answers),
    )


def encode_answers(prompt: Any, answers: tuple[Any, ...], assets: Any, media: Media | None = None) -> Encoded:
    """Render and tokenise a prompt with each of its answers.

    Every text is tokenised whole, as the model meets it when it generates; the prompt that is shared and not scored is the longest
    common token prefix of the prompt alone (with the generation prompt) and of every full text. Tokens that merge across the boundary thus
    belong to the answers. Conversations end as the template ends them; plain text gets EOS after each answer.

    Args:
        prompt: a conversation or plain text (aligner/data/samples.py).
        answers: the answers, of the same form.
        assets: has `tokenizer`, and `processor` (None for a text model).
        media: the model's media; None for a text model.

    Raises:
        Bad: the template refuses the conversation, an answer is empty, or placeholders and images do not match.
    """
    tokenizer = assets.tokenizer
    images = images_of(prompt)
    if not prompt:
        raise Bad("empty prompt", "nothing stands before the answers")
    if any(images_of(answer) for answer in answers):
        raise Bad("image placeholders", "an answer holds an image; images are supported in prompts")
    if is_conversation(prompt) or any(is_conversation(answer) for answer in answers):
        texts = [render(prompt, assets, add_generation_prompt=True)]
        texts += [render(prompt + answer, assets) for answer in answers]
        special = adds_special_tokens(texts[0], assets)
    else:
        start = _plain(prompt, assets)
        texts = [start] + [start + plain_text(answer, assets) for answer in answers]
        special = True
    tokenised = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    alone, *full = (np.array(ids, np.int32) for ids in tokenised)
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
    return Encoded(head[expansion(head, images, media)], tails, images)


def encode_prompt(prompt: Any, assets: Any, media: Media | None = None) -> Encoded:
    """Tokens of a prompt alone, as the model meets it before it answers: a conversation with the generation prompt, or plain text.

    Raises:
        Bad: the template refuses the conversation, or placeholders and images do not match.
    """
    images = images_of(prompt)
    if is_conversation(prompt):
        text = render(prompt, assets, add_generation_prompt=True)
        special = adds_special_tokens(text, assets)
    else:
        text, special = _plain(prompt, assets), True
    tokens = np.array(assets.tokenizer([text], add_special_tokens=special, verbose=False)["input_ids"][0], np.int32)
    eos = assets.tokenizer.eos_token
    if eos is not None and len(tokens) and tokens[-1] == assets.tokenizer.eos_token_id and not text.rstrip().endswith(eos):
        tokens = tokens[:-1]  # some tokenizers end every text
    if not len(tokens):
        raise Bad("empty prompt", "the prompt has no tokens")
    return Encoded(tokens[expansion(tokens, images, media)], (), images)


def chat_template(assets: Any) -> str:
    """The template that conversations are rendered by: the processor's, else the tokenizer's, else DEFAULT_TEMPLATE."""
    template = (assets.processor is not None and assets.processor.chat_template) or assets.tokenizer.chat_template or DEFAULT_TEMPLATE
    if isinstance(template, dict):  # several named ones
        template = template.get("default") or next(iter(template.values()))
    return template


def image_token(assets: Any) -> str:
    """The text that stands for an image in a rendered conversation."""
    return getattr(assets.processor, "image_token", None) or "<image>"


def ends_with_eos(encoded: Encoded, tokenizer: Any) -> bool:
    """True if every answer trains the end of the sequence. By the id itself: padding may well have the same id."""
    return all(tokenizer.eos_token_id in answer[-4:] for answer in encoded.answers)  # templates may add white space after it


def render(conversation: list[dict], assets: Any, **options: Any) -> Any:
    """What the chat template makes of a conversation: its text, or what else `options` of `apply_chat_template` ask for.

    Raises:
        Bad: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    # Processors' templates want lists of parts; tokenizers' (and ours) want strings.
    structured = assets.processor is not None and bool(assets.processor.chat_template)
    messages = []
    for message in conversation:
        parts = [{"type": "image"} if part["type"] == "image" else part for part in parts_of(message["content"])]
        content = parts if structured else _plain(message["content"], assets, after_image="\n")
        messages.append({**message, "content": content})
    try:
        # The tokenizer renders for processors as well: all that a template needs is the messages and the special tokens.
        # One at a time: what notes where {% generation %} stands belongs to the compiled template, which threads share.
        with _RENDERING:
            return assets.tokenizer.apply_chat_template(messages, chat_template=chat_template(assets), **{"tokenize": False} | options)
    except (TemplateError, TypeError) as error:
        raise Bad("chat template", f"the chat template refuses the conversation: {error}") from error


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


def expansion(tokens: np.ndarray, images: tuple[Any, ...], media: Media | None) -> np.ndarray:
    """Indices that repeat every image's placeholder once per feature: what the processor does to the text, without its pixels."""
    places = np.arange(len(tokens))
    if media is None:
        if images:
            raise Bad(NO_IMAGES)
        return places
    marks = tokens == media.placeholder
    if marks.sum() != len(images):
        raise Bad("image placeholders", f"the text holds {marks.sum()} image tokens for {len(images)} images")
    return np.repeat(places, np.where(marks, media.features, 1))
