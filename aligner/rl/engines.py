"""Who writes the answers of a rollout: the sampler of this process, or a vLLM or SGLang server that is asked over HTTP.

A server's weights are refreshed from a folder of exported safetensors that both can read, as often as the run asks for; in between the
server's policy lags behind, and `config.generation.importance_cap` corrects for it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from aligner.data.samples import is_conversation, parts_of
from aligner.generation.engine import Completion, Engine, Prompt, generate_all
from aligner.generation.sampling import Sampling
from aligner.rl.remote import post
from aligner.types import Params, UserError

AT_ONCE = 64  # requests to a server side by side


class RolloutEngine(Protocol):
    """What writes answers."""

    def update(self, params: Params, version: int) -> None:
        """From now on write as these parameters do, or as soon as it is worth the trouble."""

    def generate(self, prompts: Sequence[Prompt], n: int, ids: Sequence[int]) -> list[list[Completion]]:
        """n answers to each prompt, with the log-probabilities that they were drawn with; `ids` are the prompts' numbers in the run."""


class Local:
    """The built-in engine: the training parameters themselves, in this process."""

    def __init__(self, engine: Engine, key: jax.Array):
        self.engine, self.key, self.params = engine, key, None

    def update(self, params: Params, version: int) -> None:
        self.params = self.engine.prepare(params)

    def generate(self, prompts: Sequence[Prompt], n: int, ids: Sequence[int]) -> list[list[Completion]]:
        return generate_all(self.engine, self.params, prompts, self.key, n, ids=ids)


class Server:
    """A vLLM server with the OpenAI-compatible `/v1/completions` (with pictures `/v1/chat/completions`), or an SGLang server with its own
    `/generate`.

    Weights: SGLang's `/update_weights_from_disk`; vLLM's `/collective_rpc` with `reload_weights`, then `/reset_prefix_cache`, which the
    server offers when it was started with VLLM_SERVER_DEV_MODE=1 on the very folder that is exported to. A temperature other than 1 needs
    a vLLM that was started with `--logprobs-mode processed_logprobs`: others give log-probabilities as if it were 1.
    """

    def __init__(
        self, url: str, kind: str, sampling: Sampling, folder: Path, export: Callable[[Params, Path], None], *,
        placeholder: int | None = None, every: int = 1, seed: int = 0, timeout: float = 600.0, retries: int = 4, wait: float = 1.0,
    ):  # fmt: skip
        """
        Args:
            url: such as http://HOST:8000.
            kind: "vllm" or "sglang".
            sampling: how tokens are drawn.
            folder: where weights are exported to.
            export: (parameters, folder) writes them in Hugging Face layout.
            placeholder: token that stands for a picture's features; a server puts one for all of a picture's, or as many as it takes.
            every: weights are refreshed at every so many versions.
            seed: of the draws, where the server takes one.
            timeout, retries, wait: of a request; see `aligner.rl.remote.post`.
        """
        self.url, self.kind, self.sampling, self.folder, self.export = url.rstrip("/"), kind, sampling, folder, export
        self.placeholder, self.every, self.seed = placeholder, every, seed
        self.options = dict(timeout=timeout, retries=retries, wait=wait)
        self.version = -1

    def update(self, params: Params, version: int) -> None:
        if self.version >= 0 and version - self.version < self.every:
            return
        self.export(params, self.folder)
        if self.kind == "sglang":
            answer = self._post("update_weights_from_disk", {"model_path": str(self.folder)})
            if not answer.get("success"):
                raise UserError(f"{self.url} did not take the weights in {self.folder}: {answer.get('message', answer)}")
        else:
            self._post("collective_rpc", {"method": "reload_weights"})
            # what the old weights made of prompts; SGLang sees to it itself
            if self._post("reset_prefix_cache", {}).get("success") is False:
                raise UserError(f"{self.url} still keeps what earlier weights made of prompts; is something else asking it?")
        self.version = version

    def generate(self, prompts: Sequence[Prompt], n: int, ids: Sequence[int]) -> list[list[Completion]]:
        ask = self._sglang if self.kind == "sglang" else self._vllm
        with ThreadPoolExecutor(AT_ONCE) as pool:  # the server makes batches of what is asked at once
            return list(pool.map(lambda pair: ask(*pair, n), zip(prompts, ids)))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return post(f"{self.url}/{path}", body, **self.options)

    def _vllm(self, prompt: Prompt, number: int, n: int) -> list[Completion]:
        s, seeing = self.sampling, len(prompt.pictures) > 0
        body = {
            "model": str(self.folder), "n": n, "temperature": s.temperature, "top_p": s.top_p, "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty, "seed": self.seed + int(number), "stop_token_ids": list(s.stop_tokens),
            "stop": list(s.stop_strings) or None, "skip_special_tokens": False, "return_token_ids": True,
        }  # fmt: skip
        if s.top_k:
            body["top_k"] = s.top_k
        if seeing:  # only the chat takes pictures; the server makes the prompt of them
            answer = self._post("v1/chat/completions", {**body, "messages": self._messages(prompt), "max_tokens": s.max_new_tokens,
                                                        "logprobs": True, "top_logprobs": 0})  # fmt: skip
            theirs = answer.get("prompt_token_ids")
            if theirs is None or self._short(theirs) != self._short(prompt.tokens):
                raise UserError(f"{self.url} reads a prompt with pictures otherwise than it is learnt from; is its chat template another?")
        else:
            answer = self._post("v1/completions", {**body, "prompt": prompt.tokens.tolist(), "max_tokens": s.max_new_tokens, "logprobs": 0})
        choices = answer.get("choices") or []
        if len(choices) != n:
            raise UserError(f"{self.url} gave {len(choices)} answers where {n} were asked for")
        found = []
        for choice in sorted(choices, key=lambda choice: choice.get("index", 0)):
            logps = choice.get("logprobs") or {}
            logps = [one["logprob"] for one in logps.get("content") or []] if seeing else logps.get("token_logprobs")
            found.append(self._completion(choice.get("token_ids"), logps, choice.get("finish_reason") == "stop"))
        return found

    def _sglang(self, prompt: Prompt, number: int, n: int) -> list[Completion]:
        s = self.sampling
        manner = {
            "max_new_tokens": s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k or -1, "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty, "stop_token_ids": list(s.stop_tokens), "stop": list(s.stop_strings) or None,
            "skip_special_tokens": False,  # a stop string may be one
        }  # fmt: skip
        body = {"input_ids": self._once(prompt), "sampling_params": manner, "return_logprob": True}
        if len(prompt.pictures):
            body["image_data"] = [as_url(image) for image in self._source(prompt)[1]]
        found = []
        for _ in range(n):  # they share the prompt in the server's cache
            answer = self._post("generate", body)
            about = answer.get("meta_info") or {}
            logps = [one[0] for one in about.get("output_token_logprobs") or []]
            found.append(self._completion(answer.get("output_ids"), logps, (about.get("finish_reason") or {}).get("type") == "stop"))
        return found

    def _completion(self, tokens: Any, logps: Any, stopped: bool) -> Completion:
        if not tokens or not logps or len(tokens) != len(logps):
            names = "output_ids with output_token_logprobs" if self.kind == "sglang" else "token_ids with logprobs (`return_token_ids`)"
            raise UserError(f"{self.url} gives no {names}; take a newer server")
        return Completion(np.array(tokens, np.int32), np.array(logps, np.float32), stopped)

    def _source(self, prompt: Prompt) -> tuple[Any, Sequence[Any]]:
        if prompt.source is None:
            raise UserError(f"{self.url}: later turns of an episode with pictures cannot be sent; leave config.generation.server empty")
        return prompt.source

    def _once(self, prompt: Prompt) -> list[int]:
        """Its tokens with one placeholder for each picture, as the server wants them before it makes room."""
        places = np.flatnonzero(prompt.tokens == self.placeholder)
        firsts = np.cumsum([0, *(len(picture.index) for picture in prompt.pictures)])[:-1]
        return np.delete(prompt.tokens, np.delete(places, firsts)).tolist()

    def _short(self, tokens: Sequence[int]) -> list[int]:
        """Tokens with one placeholder for pictures that stand side by side, however many they take."""
        tokens = np.asarray(tokens)
        again = (tokens[1:] == tokens[:-1]) & (tokens[1:] == self.placeholder)
        return tokens[np.append(True, ~again)].tolist()

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The prompt as a chat, pictures as data."""
        conversation, images = self._source(prompt)
        if not is_conversation(conversation):
            raise UserError(f"{self.url}: vLLM takes pictures in conversations alone; give the prompts as messages")
        left = iter(images)
        show = lambda part: {"type": "image_url", "image_url": {"url": as_url(next(left))}} if part["type"] == "image" else part
        return [{**message, "content": [show(part) for part in parts_of(message["content"])]} for message in conversation]


def as_url(image: Any) -> str:
    """A PIL image as a data URL, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
