"""What a row of a dataset means, before any token: one frozen dataclass for every kind of training sample.

A conversation is a list of messages `{"role": "system"|"user"|"assistant"|"tool", "content": ...}`; content is a string or a list of
parts `{"type": "text", "text": str}` and `{"type": "image", "image": reference}` (`aligner.data.media` says what a reference may be).
Where a dataset holds plain text and no messages, the same fields hold a string, or a list of parts when pictures stand in the text;
such text is used as it is, without a chat template.
"""

from __future__ import annotations

import dataclasses
import math
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
    """A conversation whose assistant turns are imitated, or plain text that is imitated whole.

    `prompt` is what stands before it and is never imitated; "" where the conversation holds everything.
    """

    conversation: Text
    prompt: Text = ""


@dataclasses.dataclass(frozen=True)
class Document:
    """Running text."""

    text: Text


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, the first preferred.

    `margin` says by how much, 0 where the dataset does not; `safe` is +1 for a safe answer, -1 for an unsafe one, 0 where it is not known,
    chosen first.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0
    safe: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Several answers to a prompt, best first; with `scores`, in any order, each with its own."""

    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """One request under two principles, with a preference under each: answers that suit the good one, answers that suit the bad one."""

    good: Preference
    bad: Preference


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
        sample = Preference(sample.prompt, as_ranked(sample).completions[0], sample.completions[-1])
    if not isinstance(sample, Preference):
        raise Bad("not a pair", f"the formatter returned a {type(sample).__name__}, not a Preference or Ranked")
    for name in ("chosen", "rejected"):
        if is_blank(getattr(sample, name)):
            raise Bad("empty answer", f"{name} is empty")
    if sample.chosen == sample.rejected:
        raise Bad("answers are equal", "chosen and rejected are the same")
    return sample


def as_ranked(sample: Any) -> Ranked:
    """The ranking in a sample: a Ranked as it is, a Preference as one of two.

    Raises:
        Bad: fewer than two answers, one is empty, or two are the same.
    """
    if isinstance(sample, Preference):
        sample = Ranked(sample.prompt, (sample.chosen, sample.rejected))
    if not isinstance(sample, Ranked):
        raise Bad("no ranked answers", f"the formatter returned a {type(sample).__name__}, not a Ranked or Preference")
    answers = sample.completions
    if len(answers) < 2:
        raise Bad("no ranked answers", f"a ranking needs at least two answers, this has {len(answers)}")
    if any(map(is_blank, answers)):
        raise Bad("empty answer", f"answer {next(i for i, answer in enumerate(answers, start=1) if is_blank(answer))} is empty")
    if any(answer in answers[:i] for i, answer in enumerate(answers)):
        raise Bad("answers are equal", "two of the ranked answers are the same")
    return sample


def as_two_sided(sample: Any) -> TwoSided:
    """Two pairs about one request.

    Raises:
        Bad: the sample is none, a pair is none, or their pictures differ.
    """
    if not isinstance(sample, TwoSided):
        raise Bad("no two pairs", f"the formatter returned a {type(sample).__name__}, not a TwoSided")
    good, bad = as_preference(sample.good), as_preference(sample.bad)
    if images_of(good.prompt) != images_of(bad.prompt):
        raise Bad("image placeholders", "the two prompts show different images")
    return TwoSided(good, bad)


def as_scored(sample: Any) -> Ranked:
    """Answers, one or more, each with a score.

    Raises:
        Bad: no answer, one is empty, or the scores are not one finite number for each.
    """
    if not isinstance(sample, Ranked) or not sample.completions:
        raise Bad("no scores", f"the formatter returned a {type(sample).__name__}, not a Ranked with scores")
    if any(map(is_blank, sample.completions)):
        raise Bad("empty answer", "one of the scored answers is empty")
    if len(sample.scores) != len(sample.completions):
        raise Bad("no scores", f"there are {len(sample.scores)} scores for {len(sample.completions)} answers")
    if not all(math.isfinite(score) for score in sample.scores):
        raise Bad("score is not finite", repr(sample.scores))
    return sample


def as_unpaired(sample: Any) -> Unpaired:
    """A judged answer.

    Raises:
        Bad: the sample is none, its answer is empty, or its label is neither true nor false.
    """
    if not isinstance(sample, Unpaired):
        raise Bad("no label", f"the formatter returned a {type(sample).__name__}, not an Unpaired")
    if not isinstance(sample.label, (bool, int)) or sample.label not in (0, 1):
        raise Bad("label is neither true nor false", repr(sample.label))
    if is_blank(sample.completion):
        raise Bad("empty answer", "the completion is empty")
    return sample


def unpair(sample: Any, half: int) -> Unpaired:
    """Half a pair as a judged answer: 0 is the chosen one, 1 the rejected one."""
    pair = as_preference(sample)
    return Unpaired(pair.prompt, pair.rejected if half else pair.chosen, not half)


def as_supervised(sample: Any) -> Supervised:
    """What is to be imitated: a Supervised as it is, a document whole, of a pair or a ranking the best answer.

    Raises:
        Bad: the sample holds neither, or nothing but white space.
    """
    if isinstance(sample, Ranked) and sample.completions:
        sample = Supervised(sample.completions[0], sample.prompt)
    if isinstance(sample, Preference):
        sample = Supervised(sample.chosen, sample.prompt)
    if isinstance(sample, Document):
        sample = Supervised(sample.text)
    if not isinstance(sample, Supervised):
        raise Bad("nothing to imitate", f"the formatter returned a {type(sample).__name__}, not a Supervised, Preference or Ranked")
    if is_blank(sample.conversation):
        raise Bad("empty answer" if sample.prompt else "empty text", "there is only white space")
    return sample


def as_prompt(sample: Any) -> Prompt:
    """What is to be answered: a Prompt as it is, of a pair, ranking or judged answer its prompt, of a conversation all before the
    assistant's last message, a document whole.

    Raises:
        Bad: the sample holds none, or nothing but white space.
    """
    match sample:
        case Prompt():
            found = sample
        case Preference() | Ranked() | Unpaired():
            found = Prompt(sample.prompt)
        case Supervised(conversation=text, prompt=""):
            answered = is_conversation(text) and len(text) > 1 and text[-1]["role"] == "assistant"
            found = Prompt(text[:-1] if answered else text)
        case Supervised():
            found = Prompt(sample.prompt)
        case Document():
            found = Prompt(sample.text)
        case _:
            raise Bad("not a prompt", f"the formatter returned a {type(sample).__name__}")
    if not found.prompt or is_blank(found.prompt):
        raise Bad("empty prompt", "there is nothing to answer")
    if is_conversation(found.prompt) and found.prompt[-1]["role"] == "assistant":
        raise Bad("not a prompt", "the conversation ends with the assistant's message, which is nothing to answer")
    return found


def as_document(sample: Any) -> Document:
    """Running text.

    Raises:
        Bad: the sample is none, or nothing but white space.
    """
    if not isinstance(sample, Document) or not isinstance(sample.text, str):
        raise Bad("not running text", f"the formatter returned a {type(sample).__name__}; a Document of one string is needed")
    if is_blank(sample.text):
        raise Bad("empty text", "there is only white space")
    return sample
