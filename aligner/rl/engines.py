"""Who writes the answers of a rollout: the sampler of this process, or a vLLM or SGLang server that is asked over HTTP.

A server's weights are refreshed from a folder of exported safetensors that both can read, as often as the run asks for; in between the
server's policy lags behind, and `config.generation.importance_cap` corrects for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from aligner.generation.engine import Completion, Engine, Prompt, generate_all
from aligner.generation.sampling import Sampling
from aligner.rl.remote import post
from aligner.types import Params, UserError


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
    """A vLLM or SGLang server with the OpenAI-compatible `/v1/completions`.

    Weights: SGLang's `/update_weights_from_disk`; vLLM's `/collective_rpc` with `reload_weights`, which the server offers when it was
    started with VLLM_SERVER_DEV_MODE=1 on the very folder that is exported to.
    """

    def __init__(
        self, url: str, kind: str, sampling: Sampling, folder: Path, export: Callable[[Params, Path], None], *,
        every: int = 1, seed: int = 0, timeout: float = 600.0, retries: int = 4, wait: float = 1.0,
    ):  # fmt: skip
        """
        Args:
            url: such as http://HOST:8000.
            kind: "vllm" or "sglang".
            sampling: how tokens are drawn.
            folder: where weights are exported to.
            export: (parameters, folder) writes them in Hugging Face layout.
            every: weights are refreshed at every so many versions.
            seed: of the draws.
            timeout, retries, wait: of a request; see `aligner.rl.remote.post`.
        """
        self.url, self.kind, self.sampling, self.folder, self.export = url.rstrip("/"), kind, sampling, folder, export
        self.every, self.seed, self.options = every, seed, dict(timeout=timeout, retries=retries, wait=wait)
        self.version = -1

    def update(self, params: Params, version: int) -> None:
        if self.version >= 0 and version - self.version < self.every:
            return
        self.export(params, self.folder)
        if self.kind == "sglang":
            answer = post(f"{self.url}/update_weights_from_disk", {"model_path": str(self.folder)}, **self.options)
            if not answer.get("success"):
                raise UserError(f"{self.url} did not take the weights in {self.folder}: {answer.get('message', answer)}")
        else:
            post(f"{self.url}/collective_rpc", {"method": "reload_weights"}, **self.options)
        self.version = version

    def generate(self, prompts: Sequence[Prompt], n: int, ids: Sequence[int]) -> list[list[Completion]]:
        return [self._answers(prompt, n, number) for prompt, number in zip(prompts, ids)]

    def _answers(self, prompt: Prompt, n: int, number: int) -> list[Completion]:
        if len(prompt.pictures):
            raise UserError(f"{self.url}: pictures cannot be sent to a server yet; leave config.generation.server empty")
        s = self.sampling
        body = {
            "model": str(self.folder), "prompt": prompt.tokens.tolist(), "n": n, "max_tokens": s.max_new_tokens,
            "temperature": s.temperature, "top_p": s.top_p, "min_p": s.min_p, "repetition_penalty": s.repetition_penalty,
            "logprobs": 0, "seed": self.seed + int(number),
            "stop_token_ids": list(s.stop_tokens), "stop": list(s.stop_strings) or None, "return_token_ids": True,
        }  # fmt: skip
        if s.top_k:
            body["top_k"] = s.top_k
        choices = post(f"{self.url}/v1/completions", body, **self.options).get("choices") or []
        if len(choices) != n:
            raise UserError(f"{self.url} gave {len(choices)} answers where {n} were asked for")
        return [self._completion(choice) for choice in sorted(choices, key=lambda choice: choice.get("index", 0))]

    def _completion(self, choice: dict[str, Any]) -> Completion:
        tokens = choice.get("token_ids")
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or not logps or len(tokens) != len(logps):
            raise UserError(f"{self.url} gives no token_ids with token_logprobs; it must know `return_token_ids` and `logprobs`")
        return Completion(np.array(tokens, np.int32), np.array(logps, np.float32), choice.get("finish_reason") == "stop")
