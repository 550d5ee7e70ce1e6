"""The building stones of formatters: messages, where a row's pictures, sounds and clips belong in them, and where an answer begins."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from aligner.data.samples import MEDIA, Bad, article, is_conversation, parts_of

MARK = "<image>"  # where a picture stands in a text, in every dataset we read; the model's own token may be another
_ROLES = {
    "human": "user", "user": "user", "instruction": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function": "tool",
    "function_call": "assistant",
}  # fmt: skip
# What a message may hold beside its content; templates read it. The first three are one thing by its several names, which `transformers`
# gives to a template by the name that it reads.
_EXTRAS = (
    *("reasoning_content", "reasoning", "thinking"),
    *("name", "tool_calls", "tool_call_id", "tool_responses", "tool_plan", "recipient", "end_turn"),
)


def user(content: Any) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def answer_to(prompt: Any, text: str) -> Any:
    """A text as a prompt's answer: messages where the prompt is a conversation."""
    return [assistant(text)] if is_conversation(prompt) else text


def system_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system's message of a row that has the column `system`, else none."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def messages_of(value: Any, role: str = "assistant") -> list[dict[str, Any]]:
    """Messages from what datasets write: a list or a single one, with role/content or from/value; a bare string is one of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, (dict, list, tuple)):
        raise Bad("unexpected value", f"{value!r} stands where a text or messages should be")
    return [_message(message) for message in ([value] if isinstance(value, dict) else value)]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not ("role" in message or "from" in message):
        raise Bad("unexpected value", f"{reprlib.repr(message)} stands where a message should be, {{'role': .., 'content': ..}}")
    speaker = message["role"] if "role" in message else message["from"]
    if speaker not in _ROLES:
        raise Bad("unknown role", f"{speaker!r}")
    content = message["content"] if "content" in message else message.get("value")
    extras = {key: message[key] for key in _EXTRAS if message.get(key) is not None}  # Parquet writes None for missing keys
    if "tool_calls" in extras:
        extras["tool_calls"] = [_call(call) for call in extras["tool_calls"]]
    if speaker == "function_call":  # ShareGPT writes a call as JSON text
        calls = json.loads(content)
        extras["tool_calls"] = [_call({"type": "function", "function": call}) for call in (calls if isinstance(calls, list) else [calls])]
        content = None
    if content is None:
        if not extras.get("tool_calls"):
            raise Bad("missing column", f"a message of {speaker!r} without content")
        content = ""
    if not isinstance(content, (str, list, tuple)):
        raise Bad("unexpected value", f"{reprlib.repr(content)} stands where the content of a message should be")
    return {"role": _ROLES[speaker], "content": content if isinstance(content, str) else [_part(part) for part in content], **extras}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool without Parquet's Nones; arguments, which OpenAI writes as JSON text, as an object: so templates want them."""
    call = without_none(call)
    function = call.get("function")
    if function and isinstance(function.get("arguments"), str):
        call["function"] = {**function, "arguments": json.loads(function["arguments"])}
    return call


def without_none(value: Any) -> Any:
    """The same without keys whose value is None: Parquet writes them where other rows have something."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("text" if part.get("type") == "text" else "type"), str):
        raise Bad("unexpected value", f"{reprlib.repr(part)} stands where a part of a message should be, {{'type': 'text', 'text': ..}}")
    kind = part["type"].removesuffix("_url")  # OpenAI's image_url
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind in MEDIA:  # Parquet fills the keys that other parts have with None
        keys = (kind, "path", "base64", "url", f"{kind}_url")
        payload = next((part[key] for key in keys if part.get(key) is not None), None)
        payload = payload.get("url", payload) if isinstance(payload, dict) else payload
        return {"type": kind} if payload is None else {"type": kind, kind: payload}
    raise Bad("unknown content", f"a part of type {kind!r}; text, {', '.join(MEDIA)} are known")


def media_in(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The pictures, sounds and clips of a row by kind: column `images` (a list) or `image` (one, or a list), and so on."""
    found = {}
    for kind in MEDIA:
        value = row.get(f"{kind}s")
        if value is None:
            value = row.get(kind)
        if value is not None and not (isinstance(value, str) and not value):
            found[kind] = list(value) if isinstance(value, (list, tuple)) else [value]
    return found


def place_media(text: Any, media: Mapping[str, list[Any]]) -> Any:
    """Put a row's media where its text marks them (`<image>`, or an image part without a payload), else before the first user's text.

    Args:
        text: a conversation or plain text.
        media: kind -> references, as `media_in` gives them.

    Raises:
        Bad: the marks and the media of a kind differ in number.
    """
    for kind in reversed(MEDIA):  # what comes last goes to the front: pictures before sounds before clips
        text = _place(text, kind, media.get(kind) or [])
    return text


def marked(text: str) -> bool:
    """Whether a plain text marks where pictures, sounds or clips stand."""
    return any(f"<{kind}>" in text for kind in MEDIA)


def place_images(text: Any, images: list[Any]) -> Any:
    """`place_media` of images alone."""
    return place_media(text, {"image": images})


def _place(text: Any, kind: str, items: list[Any]) -> Any:
    if not items:
        if {"type": kind} in parts_of(text):
            raise Bad(f"{kind} placeholders", f"the text marks {article(kind)}, the row has none")
        return text
    if not is_conversation(text):
        return _fill(_split(text, kind), kind, items)
    split = [{**message, "content": _split(message["content"], kind)} for message in text]
    if not any(part["type"] == kind for message in split for part in message["content"]):
        first = next((message for message in split if message["role"] == "user"), None)
        if first is None:
            raise Bad(f"{kind} placeholders", f"there is no user message to put the {kind} in")
        first["content"] = [{"type": kind} for _ in items] + first["content"]
    filled = iter(_fill([part for message in split for part in message["content"]], kind, items))
    return [{**message, "content": [next(filled) for _ in message["content"]]} for message in split]


def _split(content: Any, kind: str) -> list[dict[str, Any]]:
    """Parts of a content, cut at the marks. One line break beside a mark belongs to the mark: templates write their own."""
    if not isinstance(content, str):
        return [piece for part in content for piece in (_split(part["text"], kind) if part["type"] == "text" else [part])]
    parts, pieces = [], content.split(f"<{kind}>")
    for number, piece in enumerate(pieces):
        if number:
            if piece.startswith("\n"):
                piece = piece[1:]
            elif parts and parts[-1]["type"] == "text" and parts[-1]["text"].endswith("\n"):
                parts[-1]["text"] = parts[-1]["text"][:-1]
            parts.append({"type": kind})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _fill(parts: list[dict[str, Any]], kind: str, items: list[Any]) -> list[dict[str, Any]]:
    empty = sum(part == {"type": kind} for part in parts)
    if empty != len(items):
        raise Bad(f"{kind} placeholders", f"the text marks {empty}, the row has {len(items)} {kind}s")
    rest = iter(items)
    return [{"type": kind, kind: next(rest)} if part == {"type": kind} else part for part in parts]


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
