"""What a row of a dataset means, before any token: one frozen dataclass for every kind of training sample.

A conversation is a list of messages `{"role": "system"|"user"|"assistant"|"tool", "content": ...}`, which may hold what templates read
beside it (`tool_calls`, `reasoning_content`, ..); content is a string or a list of parts `{"type": "text", "text": str}`,
`{"type": "image", "image": reference}`, and the same with "audio" and "video" (`aligner.data.media` says what a reference may be). Rows
for generation have media in the assistant's content.
Where a dataset holds plain text and no messages, the same fields hold a string, or a list of parts when pictures stand in the text;
such text is used as it is, without a chat template.

`template` of a sample holds arguments for its chat template: `tools`, and what the template's author thought of (`enable_thinking`, ..).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MEDIA = ("image", "audio", "video")
TOLD = ("tools", "chat_template_kwargs")  # columns of a row that its chat template is told
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # of answers, in any case
PARTS = ("good", "bad", "pair")  # fields of samples that hold samples
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
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Several answers to a prompt, best first; with `scores`, in any order, each with its own."""

    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...] = ()
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Several answers to a prompt, of which nothing is said; two may be the same."""

    prompt: Text
    completions: tuple[Text, ...]
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """One request under two principles, with a preference under each: answers that suit the good one, answers that suit the bad one."""

    good: Preference
    bad: Preference


@dataclasses.dataclass(frozen=True)
class Triple:
    """A pair, and a third answer to the same prompt, the gold one, which is imitated."""

    pair: Preference
    gold: Text


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """One answer and whether it is a good one."""

    prompt: Text
    completion: Text
    label: bool
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to answer, with what a reward may compare the answer to."""

    prompt: Text
    ground_truth: Any = None
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stepwise:
    """An answer in steps, and which of them are right."""

    prompt: Text
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


def check(sample: Any) -> Any:
    """The sample, if its texts are what this file says.

    Raises:
        Bad: something else stands where a text should.
    """
    for name in ("prompt", "conversation", "chosen", "rejected", "completion", "text", "gold"):
        if hasattr(sample, name):
            _check_text(getattr(sample, name), name)
    for name in ("completions", "steps"):
        for text in getattr(sample, name, ()):
            _check_text(text, name)
    for name in PARTS:
        if hasattr(sample, name):
            check(getattr(sample, name))
    return sample


def _check_text(text: Any, name: str) -> None:
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Bad("unexpected value", f"{name} holds half a character, U+{ord(text[error.start]):X}") from None
    elif not isinstance(text, list):
        raise Bad("unexpected value", f"{name} is a {type(text).__name__}, neither text nor messages")
    elif is_conversation(text):
        for message in text:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise Bad("unexpected value", f"{name} holds a message without role or content")
            _check_text(message["content"], f"a message of {name}")
    else:
        for part in text:
            if not isinstance(part, dict) or part.get("type") not in ("text", *MEDIA):
                raise Bad("unexpected value", f"{name} holds a part that is neither text nor {', '.join(MEDIA)}")
            if part["type"] == "text":
                _check_text(part.get("text"), f"a part of {name}")
            elif part.get(part["type"]) is None:
                raise Bad(f"{part['type']} placeholders", f"{name} marks media of the type {part['type']}, the row has none for it")


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


def media_of(text: Text) -> tuple[tuple[str, Any], ...]:
    """(kind, reference) of all media in a text, in reading order."""
    return tuple((part["type"], part[part["type"]]) for part in parts_of(text) if part["type"] != "text")


def article(kind: str) -> str:
    """A kind of media with its article: "an image", "a video"."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def is_blank(text: Text) -> bool:
    """True where there is nothing to learn: no media, no call of a tool and only white space."""
    if is_conversation(text) and any(message.get("tool_calls") for message in text):
        return False
    return not any(part["type"] != "text" or part["text"].strip() for part in parts_of(text))


def as_preference(sample: Any) -> Preference:
    """The pair in a sample: a Preference as it is, of a Ranked the best and the worst answer.

    Raises:
        Bad: the sample holds no pair, an answer is empty, or both answers are the same.
    """
    if isinstance(sample, Ranked):
        sample = as_ranked(sample)
        sample = Preference(sample.prompt, sample.completions[0], sample.completions[-1], template=sample.template)
    if not isinstance(sample, Preference):
        raise Bad("not a pair", f"the formatter returned a {type(sample).__name__}, not a Preference or Ranked")
    for name in ("chosen", "rejected"):
        if is_blank(getattr(sample, name)):
            raise Bad("empty answer", f"{name} is empty")
    if sample.chosen == sample.rejected:
        raise Bad("answers are equal", "chosen and rejected are the same")
    return sample


def as_ranked(sample: Any) -> Ranked:
    """The ranking in a sample: a Ranked, best first; a Preference as one of two.

    Raises:
        Bad: fewer than two answers, one is empty, two are the same, or the scores of all are.
    """
    if isinstance(sample, Preference):
        sample = Ranked(sample.prompt, (sample.chosen, sample.rejected), template=sample.template)
    if not isinstance(sample, Ranked):
        raise Bad("no ranked answers", f"the formatter returned a {type(sample).__name__}, not a Ranked or Preference")
    answers = sample.completions
    if len(answers) < 2:
        raise Bad("no ranked answers", f"a ranking needs at least two answers, this has {len(answers)}")
    if any(map(is_blank, answers)):
        raise Bad("empty answer", f"answer {next(i for i, answer in enumerate(answers, start=1) if is_blank(answer))} is empty")
    if any(answer in answers[:i] for i, answer in enumerate(answers)):
        raise Bad("answers are equal", "two of the ranked answers are the same")
    sample = best_first(sample)
    if sample.scores and sample.scores[0] == sample.scores[-1]:
        raise Bad("tie", f"all {len(answers)} answers have the score {sample.scores[0]}: none is better")
    return sample


def best_first(sample: Ranked) -> Ranked:
    """Its answers by their scores, where it has scores; they may come in any order.

    Raises:
        Bad: the scores are not one finite number for each answer.
    """
    if not sample.scores:
        return sample
    order = sorted(range(len(as_scored(sample).scores)), key=lambda i: -sample.scores[i])
    pick = lambda values: tuple(values[i] for i in order)
    return dataclasses.replace(sample, completions=pick(sample.completions), scores=pick(sample.scores))


def as_two_sided(sample: Any) -> TwoSided:
    """Two pairs about one request.

    Raises:
        Bad: the sample is none, a pair is none, or their pictures differ.
    """
    if not isinstance(sample, TwoSided):
        raise Bad("no two pairs", f"the formatter returned a {type(sample).__name__}, not a TwoSided")
    good, bad = as_preference(sample.good), as_preference(sample.bad)
    if media_of(good.prompt) != media_of(bad.prompt):
        raise Bad("image placeholders", "the two prompts show different images")
    return TwoSided(good, bad)


def as_triple(sample: Any) -> Triple:
    """A pair and a gold answer.

    Raises:
        Bad: the sample is none, its pair is none, or the gold answer is empty.
    """
    if not isinstance(sample, Triple):
        raise Bad("no gold answer", f"the formatter returned a {type(sample).__name__}, not a Triple")
    if is_blank(sample.gold):
        raise Bad("empty answer", "the gold answer is empty")
    as_preference(sample.pair)
    return sample


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
    """A judged answer. Its label may be a number or a word, as CSV has them.

    Raises:
        Bad: the sample is none, its answer is empty, or its label is neither true nor false.
    """
    if not isinstance(sample, Unpaired):
        raise Bad("no label", f"the formatter returned a {type(sample).__name__}, not an Unpaired")
    label = _LABELS.get(str(sample.label).strip().lower())
    if label is None:
        raise Bad("label is neither true nor false", f"{sample.label!r}; it must be true or false, or 1 or 0")
    if is_blank(sample.completion):
        raise Bad("empty answer", "the completion is empty")
    return dataclasses.replace(sample, label=label)


def unpair(sample: Any, half: int) -> Unpaired:
    """Half a pair as a judged answer: 0 is the chosen one, 1 the rejected one."""
    pair = as_preference(sample)
    return Unpaired(pair.prompt, pair.rejected if half else pair.chosen, not half, pair.template)


def as_supervised(sample: Any) -> Supervised:
    """What is to be imitated: a Supervised as it is, a document whole, of a pair or a ranking the best answer.

    Raises:
        Bad: the sample holds neither, or nothing but white space.
    """
    if isinstance(sample, Ranked) and sample.completions:
        sample = Supervised(best_first(sample).completions[0], sample.prompt, sample.template)
    if isinstance(sample, Preference):
        sample = Supervised(sample.chosen, sample.prompt, sample.template)
    if isinstance(sample, Document):
        sample = Supervised(sample.text)
    if not isinstance(sample, Supervised):
        raise Bad("nothing to imitate", f"the formatter returned a {type(sample).__name__}, not a Supervised, Preference or Ranked")
    if is_blank(sample.conversation):
        raise Bad("empty answer" if sample.prompt else "empty text", "there is only white space")
    return sample


def as_prompt(sample: Any) -> Prompt:
    """What is to be answered: a Prompt as it is, of a pair, ranking or judged answer its prompt, of a conversation all before the
    assistant's last messages, a document whole.

    Raises:
        Bad: the sample holds none, or nothing but white space.
    """
    match sample:
        case Prompt():
            found = sample
        case Preference() | Ranked() | Unpaired():
            found = Prompt(sample.prompt, template=sample.template)
        case Supervised(conversation=text, prompt="") if is_conversation(text):
            last = max((i for i, message in enumerate(text) if message["role"] != "assistant"), default=-1)
            found = Prompt(text[: last + 1], template=sample.template)
        case Supervised():
            found = Prompt(sample.prompt or sample.conversation, template=sample.template)
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
