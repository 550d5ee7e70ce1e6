"""A reward server and how to ask it: POST {prompts, responses, golden} -> {rewards}, as other systems speak it too."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from aligner.types import UserError

RETRIES, WAIT = 4, 1.0  # tries after the first, and seconds before the second, doubled each time


def post(url: str, body: dict[str, Any], timeout: float, retries: int = RETRIES, wait: float = WAIT) -> dict[str, Any]:
    """A JSON answer to a JSON question, {} where the answer is empty; asked again where the server is away or says that it is busy.

    Args:
        timeout: seconds for each try.
        retries, wait: tries after the first, seconds before the second; doubled each time.

    Raises:
        UserError: the server refuses, does not answer in time after all tries, or answers something else than a JSON object.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for left in range(retries, -1, -1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found = json.loads(answer.read() or b"{}")
            if not isinstance(found, dict):
                raise UserError(f"{url} answered a {type(found).__name__} where a JSON object is needed")
            return found
        except urllib.error.HTTPError as error:
            reason, again = f"{error.code}: {error.read().decode(errors='replace').strip()[:200]}", error.code in (429, 500, 502, 503, 504)
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, timed out, torn
            reason, again = str(error), True
        if not again or not left:
            break
        time.sleep(wait)
        wait *= 2
    tries = f" after {retries + 1} tries" if again else ""
    raise UserError(f"{url} gives no answer{tries} ({reason}); see that the server is up, then give the same command again")


def make_remote_reward(url: str, *, timeout: float = 60.0, retries: int = RETRIES, wait: float = WAIT) -> Callable[..., list[float | None]]:
    """A reward function that asks a server. Pictures are not sent."""

    def reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
        golden = columns.get("ground_truth") or [None] * len(completions)
        body = {"prompts": [_text(prompt) for prompt in prompts], "responses": list(completions), "golden": golden}
        found = post(url, body, timeout, retries, wait)
        if "rewards" not in found:
            raise UserError(f"{url} answered without `rewards`; its keys are {', '.join(found) or 'none'}")
        return found["rewards"]

    return reward


def _text(prompt: Any) -> Any:
    """A prompt without pictures' data."""
    from aligner.data.formatters import MARK
    from aligner.data.samples import is_conversation, parts_of

    words = lambda content: "".join(part["text"] if part["type"] == "text" else MARK for part in parts_of(content))
    if is_conversation(prompt):
        return [{**message, "content": words(message["content"])} for message in prompt]
    return words(prompt)
