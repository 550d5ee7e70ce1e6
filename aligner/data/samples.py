"""What a row of a dataset means, before any token: one frozen dataclass for every kind of training sample.

A conversation is a list of messages `{"role": "system"|"user"|"assistant"|"tool", "content": ...}`; content is a string or a list of
parts `{"type": "text", "text": str}` and `{"type": "image", "image": reference}` (`aligner.data.media` says what a reference may be).
Where a dataset holds plain text and no messages, the same fields hold a string, or a list of parts when pictures stand in the text;
such text is used as it is, without a chat template.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Text = Any  # a conversation, a string, or a list of parts


class Bad(Exception):
    """A row that cannot be used. The census drops it and counts it under `reason`; nothing is skipped silently.

    Attributes:
        reason: a short key shared by all rows with the same fault, e.g. "too long".
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A conversation whose assistant turns are imitated."""

    conversation: Text


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, the first preferred."""

    prompt: Text
    chosen: Text
    rejected: Text


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Several answers to a prompt, best first."""

    prompt: Text
    completions: tuple[Text, ...]


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """One answer and whether it is a good one."""

    prompt: Text
    completion: Text
    label: bool


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to answer, with what a reward may compare the answer to."""

    prompt: Text
    ground_truth: Any = None


def is_conversation(text: Text) -> bool:
    """True for a list of messages, False for plain text (a string or a list of parts)."""
    return isinstance(text, list) and bool(text) and isinstance(text[0], dict) and "role" in text[0]


def parts_of(text: Text) -> list[dict]:
    """All parts of a text in order; a string content counts as one text part."""
    if isinstance(text, str):
        return [{"type": "text", "text": text}]
    if is_conversation(text):
        return [part for message in text for part in parts_of(message["content"])]
    return list(text)


def images_of(text: Text) -> tuple[Any, ...]:
    """The references of all images in a text, in reading order."""
    return tuple(part["image"] for part in parts_of(text) if part["type"] == "image")


def is_blank(text: Text) -> bool:
    """True where there is nothing to learn: no image and only white space."""
    return not any(part["type"] != "text" or part["text"].strip() for part in parts_of(text))


def as_preference(sample: Any) -> Preference:
    """The pair in a sample: a Preference as it is, of a Ranked the best and the worst answer.

    Raises:
        Bad: the sample holds no pair, an answer is empty, or both answers are the same.
    """
    if isinstance(sample, Ranked):
        sample = Preference(sample.prompt, sample.completions[0], sample.completions[-1])
    if not isinstance(sample, Preference):
        raise Bad("not a pair", f"the formatter returned a {type(sample).__name__}, not a Preference or Ranked")
    for name in ("chosen", "rejected"):
        if is_blank(getattr(sample, name)):
            raise Bad("empty answer", f"{name} is empty")
    if sample.chosen == sample.rejected:
        raise Bad("answers are equal", "chosen and rejected are the same")
    return sample
