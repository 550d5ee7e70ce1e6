"""How a row of a dataset becomes a sample: named formatters, found by the columns or chosen in the config.

A formatter is a function row -> sample. Add one with

    @formatter("my_dataset", needs=("question", "good", "bad"), makes=Preference)
    def my_dataset(row):
        return Preference([user(row["question"])], [assistant(row["good"])], [assistant(row["bad"])])

or name a function of your own in the config: `--config.data.train.formatter=package.module:function`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from aligner.data.samples import Bad, Document, Preference, Ranked, Supervised, TwoSided, Unpaired, is_conversation, parts_of
from aligner.types import UserError

Formatter = Callable[[dict[str, Any]], Any]

MARK = "<image>"  # where a picture stands in a text, in every dataset we read; the model's own token may be another
_ROLES = {
    "human": "user", "user": "user", "instruction": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip

_FORMATTERS: dict[str, tuple[tuple[str, ...], type, Formatter]] = {}

PAIRS = (Preference, Ranked)


def formatter(name: str, needs: tuple[str, ...], makes: type = Preference) -> Callable[[Formatter], Formatter]:
    """Register a formatter under `name`; `auto` takes it for rows that have the columns `needs` where samples of type `makes` will do."""

    def register(function: Formatter) -> Formatter:
        _FORMATTERS[name] = (needs, makes, function)
        return function

    return register


def find_formatter(name: str, columns: list[str], where: str, takes: tuple[type, ...] = PAIRS) -> tuple[str, Formatter]:
    """The formatter for rows with these columns.

    Args:
        name: a registered name, "auto" (of those whose columns are all there, the one that needs the most), or "package.module:function".
        columns: found in the dataset.
        where: the config section, for errors.
        takes: the types of samples that will do, the best first.

    Returns:
        (name, function from row to sample). The function raises Bad for a row that it cannot use.
    """
    if ":" in name:
        return name, _guard(_import(name, where))
    if name != "auto" and name not in _FORMATTERS:
        near = difflib.get_close_matches(name, _FORMATTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"config.{where}.formatter: there is no {name!r}; {hint}known are auto, {', '.join(sorted(_FORMATTERS))}.")
    if name == "auto":
        candidates = {key: found for key, found in _FORMATTERS.items() if found[1] in takes}
    else:
        candidates = {name: _FORMATTERS[name]}
        if candidates[name][1] not in takes:
            raise UserError(
                f"config.{where}.formatter {name!r} makes samples of type {candidates[name][1].__name__}, but config.algorithm takes "
                f"{' or '.join(kind.__name__ for kind in takes)}; formatters for it are "
                f"{', '.join(sorted(key for key, found in _FORMATTERS.items() if found[1] in takes))}."
            )
    fitting = {key: (len(needs), -takes.index(makes)) for key, (needs, makes, _) in candidates.items() if set(needs) <= set(columns)}
    if not fitting:
        ranked = sorted(candidates.items(), key=lambda item: len(set(item[1][0]) - set(columns)) - len(set(item[1][0]) & set(columns)))
        needed = "; ".join(f"{key!r} needs {', '.join(needs)}" for key, (needs, *_) in ranked[:3])
        raise UserError(
            f"config.{where}: the rows have {'the columns ' + ', '.join(columns) if columns else 'no columns'}; {needed}. "
            f"Rename the columns, or set config.{where}.formatter to your own package.module:function."
        )
    best = max(fitting, key=fitting.__getitem__)
    return best, _guard(_FORMATTERS[best][2])


def _import(name: str, where: str) -> Formatter:
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"config.{where}.formatter: {name} cannot be imported ({error}).") from None


def _guard(function: Formatter) -> Formatter:
    """Rows are other people's data: whatever is odd in one becomes a counted reason, not a traceback."""

    def guarded(row: dict[str, Any]) -> Any:
        try:
            return function(row)
        except KeyError as error:
            raise Bad("missing column", str(error)) from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise Bad("unexpected value", f"{type(error).__name__}: {error}") from error

    guarded.__wrapped__ = function
    return guarded


# --- the building stones ---------------------------------------------------------------------------------------------------------


def user(content: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def messages_of(value: Any, role: str = "assistant") -> list[dict[str, Any]]:
    """Messages from what datasets write: a list or a single one, with role/content or from/value; a bare string is one of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, (dict, list, tuple)):
        raise Bad("unexpected value", f"{value!r} stands where a text or messages should be")
    messages = []
    for message in [value] if isinstance(value, dict) else value:
        if not isinstance(message, dict):
            raise Bad("unexpected value", f"{message!r} stands where a message should be")
        speaker = message["role"] if "role" in message else message["from"]
        if speaker not in _ROLES:
            raise Bad("unknown role", f"{speaker!r}")
        content = message["content"] if "content" in message else message["value"]
        if content is None:
            raise Bad("missing column", f"a message of {speaker!r} without content")
        messages.append({"role": _ROLES[speaker], "content": content if isinstance(content, str) else [_part(part) for part in content]})
    return messages


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":  # Parquet fills the keys that other parts have with None
        payload = next((part[key] for key in ("image", "path", "base64", "url") if part.get(key) is not None), None)
        return {"type": "image"} if payload is None else {"type": "image", "image": payload}
    raise Bad("unknown content", f"a part of type {kind!r}; text and image are supported")


def images_in(row: dict[str, Any]) -> list[Any]:
    """The images of a row: column `images` (a list) or `image` (one, or a list); none where both are empty."""
    value = row.get("images")
    if value is None:
        value = row.get("image")
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def place_images(text: Any, images: list[Any]) -> Any:
    """Put a row's images where its text marks them (`<image>`, or an image part without a payload), else before the first user's text.

    Raises:
        Bad: the marks and the images differ in number.
    """
    if not images:
        if {"type": "image"} in parts_of(text):
            raise Bad("image placeholders", "the text marks an image, the row has none")
        return text
    if not is_conversation(text):
        return _fill(_split(text), images)
    split = [{**message, "content": _split(message["content"])} for message in text]
    if not any(part["type"] == "image" for message in split for part in message["content"]):
        first = next((message for message in split if message["role"] == "user"), None)
        if first is None:
            raise Bad("image placeholders", "there is no user message to put the image in")
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
    filled = iter(_fill([part for message in split for part in message["content"]], images))
    return [{**message, "content": [next(filled) for _ in message["content"]]} for message in split]


def _split(content: Any) -> list[dict[str, Any]]:
    """Parts of a content, cut at the marks. One line break beside a mark belongs to the mark: templates write their own."""
    if not isinstance(content, str):
        return [piece for part in content for piece in (_split(part["text"]) if part["type"] == "text" else [part])]
    parts, pieces = [], content.split(MARK)
    for number, piece in enumerate(pieces):
        if number:
            if piece.startswith("\n"):
                piece = piece[1:]
            elif parts and parts[-1]["type"] == "text" and parts[-1]["text"].endswith("\n"):
                parts[-1]["text"] = parts[-1]["text"][:-1]
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _fill(parts: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    empty = sum(part == {"type": "image"} for part in parts)
    if empty != len(images):
        raise Bad("image placeholders", f"the text marks {empty}, the row has {len(images)} images")
    rest = iter(images)
    return [{"type": "image", "image": next(rest)} if part == {"type": "image"} else part for part in parts]


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of two whole texts: what they share at the start, in messages or characters, is the prompt.

    Each answer keeps at least its last message (or character).
    """
    limit = min(len(chosen), len(rejected)) - 1
    if limit < 0:
        raise Bad("empty answer", "chosen or rejected is empty")
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1  # tokenizers join a space with the word after it
    return chosen[:shared], chosen[shared:], rejected[shared:]


# --- pairs and rankings ----------------------------------------------------------------------------------------------------------


@formatter("trl", needs=("chosen", "rejected"))
def trl(row: dict[str, Any]) -> Preference:
    """TRL's preference rows: `prompt, chosen, rejected` as strings or messages, or without a prompt; with `images` or `image`.

    Plain strings stay plain text (no chat template), also with images where the prompt says `<image>`. A plain prompt with images
    and no such mark is a user's message: nothing else could hold the picture.
    """
    prompt, chosen, rejected, images = row.get("prompt"), row["chosen"], row["rejected"], images_in(row)
    margin = float(row.get("margin") or 0)
    if chosen is None or rejected is None:
        raise Bad("missing column", "chosen or rejected is empty")
    if all(isinstance(text, str) for text in (chosen, rejected)) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
        if images and MARK not in prompt:
            return Preference(place_images([user(prompt)], images), [assistant(chosen)], [assistant(rejected)], margin)
        return Preference(place_images(prompt, images), chosen, rejected, margin)
    chosen, rejected = messages_of(chosen), messages_of(rejected)
    if prompt is None or (isinstance(prompt, str) and chosen and chosen[0]["role"] != "assistant"):  # whole conversations
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    else:
        prompt = messages_of(prompt, role="user")
    return Preference(place_images(prompt, images), chosen, rejected, margin)


@formatter("rlaif_v", needs=("image", "question", "chosen", "rejected"))
@formatter("question", needs=("question", "chosen", "rejected"))
def question(row: dict[str, Any]) -> Preference:
    """RLAIF-V's keys: `question, chosen, rejected` as strings, with `image` (or `images`) and `system` where there are any."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = place_images(system + messages_of(row["question"], role="user"), images_in(row))
    return Preference(prompt, messages_of(row["chosen"]), messages_of(row["rejected"]))


@formatter("sharegpt", needs=("conversations", "chosen", "rejected"))
def sharegpt(row: dict[str, Any]) -> Preference:
    """ShareGPT pairs: `conversations` is the prompt, `chosen` and `rejected` are one message each; from/value or role/content.

    Where the answers are whole conversations, `conversations` is a copy of one of them and they say themselves what the prompt is.
    """
    if messages_of(row["chosen"])[0]["role"] != "assistant":
        return trl(row)
    if messages_of(row["conversations"])[-1]["role"] == "assistant":
        raise Bad("unexpected value", "the prompt in `conversations` ends with an answer")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = place_images(system + messages_of(row["conversations"]), images_in(row))
    return Preference(prompt, messages_of(row["chosen"]), messages_of(row["rejected"]))


@formatter("llava_ranked", needs=("conversations",), makes=Ranked)
def llava_ranked(row: dict[str, Any]) -> Ranked:
    """LLaVA conversations whose last answer is a list of answers, best first; `image` is a name or a list of names."""
    *turns, last = row["conversations"]
    answers = last["value"] if "value" in last else last["content"]
    if isinstance(answers, str) or len(answers) < 2:
        raise Bad("no ranked answers", "the last message holds one answer; a list of at least two, best first, is needed")
    return Ranked(place_images(messages_of(turns), images_in(row)), tuple([assistant(answer)] for answer in answers))


@formatter("safe_rlhf", needs=("prompt", "response_0", "response_1", "better_response_id"))
def safe_rlhf(row: dict[str, Any]) -> Preference:
    """PKU-SafeRLHF's keys: the more helpful of two responses is chosen."""
    return _safe_rlhf(row, row["better_response_id"])


@formatter("safe_rlhf_cost", needs=("prompt", "response_0", "response_1", "safer_response_id"))  # `auto` prefers the one above
def safe_rlhf_cost(row: dict[str, Any]) -> Preference:
    """PKU-SafeRLHF's keys for a cost model: the safer of two responses is chosen, and each says whether it is safe."""
    return _safe_rlhf(row, row["safer_response_id"])


def _safe_rlhf(row: dict[str, Any], chosen: int) -> Preference:
    if chosen not in (0, 1):
        raise Bad("unexpected value", f"the id of the chosen response is {chosen!r}, neither 0 nor 1")
    order = (chosen, 1 - chosen)
    safe = tuple(0 if row.get(f"is_response_{i}_safe") is None else 1 if row[f"is_response_{i}_safe"] else -1 for i in order)
    answers = ([assistant(row[f"response_{i}"])] for i in order)
    return Preference(place_images(messages_of(row["prompt"], role="user"), images_in(row)), *answers, safe=safe)


@formatter("language_feedback", needs=("prompt", "response", "refinement"))
def language_feedback(row: dict[str, Any]) -> Preference:
    """A response and what it became after a critique: the refinement is preferred to the response."""
    prompt = place_images(messages_of(row["prompt"], role="user"), images_in(row))
    return Preference(prompt, messages_of(row["refinement"]), messages_of(row["response"]))


@formatter("spin", needs=("real", "generated"))
def spin(row: dict[str, Any]) -> Preference:
    """Self-play pairs (SPIN, arXiv 2401.01335): `real` of the dataset is preferred to what the model `generated`."""
    return trl({**row, "chosen": row["real"], "rejected": row["generated"]})


@formatter("sso", needs=("p_system", "n_system", "chosen", "rejected", "raw"), makes=TwoSided)
def sso(row: dict[str, Any]) -> TwoSided:
    """AutoAlign's keys for SSO: under the good principle `p_system` chosen is preferred to rejected, under the bad one `n_system` `raw`
    to chosen. All three are whole conversations that differ in their last message."""
    answers = {name: messages_of(row[name])[-1:] for name in ("chosen", "rejected", "raw")}
    turns = place_images(messages_of(row["chosen"])[:-1], images_in(row))
    good, bad = ([{"role": "system", "content": row[name]}] * bool(row[name]) + turns for name in ("p_system", "n_system"))
    return TwoSided(Preference(good, answers["chosen"], answers["rejected"]), Preference(bad, answers["raw"], answers["chosen"]))


@formatter("scores", needs=("prompt", "completions", "scores"), makes=Ranked)
@formatter("score", needs=("prompt", "completion", "score"), makes=Ranked)
def scores(row: dict[str, Any]) -> Ranked:
    """`prompt` with `completions` and their `scores`, or one `completion` and its `score`; a user's message and the assistant's.

    Best first, as every ranking.
    """
    answers = row["completions"] if "completions" in row else [row["completion"]]
    given = row["scores"] if "scores" in row else [row["score"]]
    prompt = place_images(messages_of(row["prompt"], role="user"), images_in(row))
    if len(answers) != len(given):
        raise Bad("no scores", f"there are {len(given)} scores for {len(answers)} answers")
    best_first = sorted(zip(map(float, given), answers), key=lambda pair: -pair[0])
    return Ranked(prompt, tuple(messages_of(answer) for _, answer in best_first), tuple(score for score, _ in best_first))


# --- judged answers --------------------------------------------------------------------------------------------------------------


@formatter("unpaired", needs=("prompt", "completion", "label"), makes=Unpaired)
def unpaired(row: dict[str, Any]) -> Unpaired:
    """TRL's unpaired preferences: `prompt, completion` as strings or messages, and a `label` that is true or false."""
    sample = prompt_completion(row)
    return Unpaired(sample.prompt, sample.conversation, row["label"])


@formatter("labelled_messages", needs=("messages", "label"), makes=Unpaired)
@formatter("labelled_conversations", needs=("conversations", "label"), makes=Unpaired)
def labelled_messages(row: dict[str, Any]) -> Unpaired:
    """A conversation whose last message, the assistant's, a `label` calls good (true) or bad (false)."""
    conversation = _conversation(row)
    if conversation[-1]["role"] != "assistant":
        raise Bad("unexpected value", "the labelled conversation does not end with the assistant's message")
    return Unpaired(conversation[:-1], conversation[-1:], row["label"])


# --- what is imitated ------------------------------------------------------------------------------------------------------------


@formatter("messages", needs=("messages",), makes=Supervised)
@formatter("conversations", needs=("conversations",), makes=Supervised)
def messages(row: dict[str, Any]) -> Supervised:
    """Whole conversations: `messages` or ShareGPT's `conversations`, with `system` and images where there are any."""
    return Supervised(_conversation(row))


def _conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    found = row["messages"] if row.get("messages") is not None else row["conversations"]
    return place_images(system + messages_of(found), images_in(row))


@formatter("prompt_completion", needs=("prompt", "completion"), makes=Supervised)
def prompt_completion(row: dict[str, Any]) -> Supervised:
    """TRL's `prompt, completion` as strings (plain text, no chat template) or messages."""
    prompt, completion, images = row["prompt"], row["completion"], images_in(row)
    if isinstance(prompt, str) and isinstance(completion, str):
        if images and MARK not in prompt:
            return Supervised([assistant(completion)], place_images([user(prompt)], images))
        return Supervised(completion, place_images(prompt, images))
    return Supervised(messages_of(completion), place_images(messages_of(prompt, role="user"), images))


@formatter("prompt_response", needs=("prompt", "response"), makes=Supervised)
def prompt_response(row: dict[str, Any]) -> Supervised:
    """`prompt` and `response`, a user's and the assistant's message; with images where there are any."""
    return Supervised(messages_of(row["response"]), place_images(messages_of(row["prompt"], role="user"), images_in(row)))


@formatter("question_answer", needs=("question", "answer"), makes=Supervised)
def question_answer(row: dict[str, Any]) -> Supervised:
    """`question` and `answer`, as GSM8K has them; with images where there are any."""
    return prompt_response({**row, "prompt": row["question"], "response": row["answer"]})


@formatter("alpaca", needs=("instruction", "output"), makes=Supervised)
def alpaca(row: dict[str, Any]) -> Supervised:
    """Alpaca's keys: `instruction`, more of it in `input` where there is any, `output`; and `system`."""
    text = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return Supervised([assistant(row["output"])], place_images([*system, user(text)], images_in(row)))


@formatter("aligner", needs=("question", "answer", "correction"), makes=Supervised)
def aligner(row: dict[str, Any]) -> Supervised:
    """Aligner's keys (arXiv 2402.02416): given a question and an answer to it, the correction is what is learned."""
    pair = f"{row['question']} | {row['answer']}"
    text = f"Edit the following Question-Answer pair to make it more helpful and harmless: {pair}"
    return Supervised([assistant(row["correction"])], place_images([user(text)], images_in(row)))


@formatter("text", needs=("text",), makes=Document)
def text(row: dict[str, Any]) -> Document:
    """Plain text in the column `text`: a document."""
    return Document(place_images(row["text"], images_in(row)))
