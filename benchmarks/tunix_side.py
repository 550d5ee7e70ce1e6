"""Tunix's side of comparisons: its own trainers and their loop. Runs in Tunix's environment, and imports nothing that is not there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer

from benchmarks.torch_sides import BETA, LEARNING_RATE, MAX_GRAD_NORM


def load(folder: Path) -> llama3.Llama3:
    """The Hugging Face checkpoint by Tunix's own loader, which wants its sizes told."""
    hf = json.loads((folder / "config.json").read_text())
    config = llama3.ModelConfig(
        num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"], hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"], head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"], rope_theta=hf["rope_parameters"]["rope_theta"], norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )  # fmt: skip
    return llama3_params.create_model_from_safe_tensors(str(folder), config)


def dpo(folder: Path, rows: list[dict[str, list[int]]], optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """(trainer, batch): prompts of one length and answers of one length, so that nothing is padding."""
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=BETA)
    ids = {key: np.array([row[key] for row in rows], np.int32) for key in ("prompt", "chosen", "rejected")}
    masks = {f"{key}_mask": np.ones_like(value) for key, value in ids.items()}
    batch = dpo_trainer.TrainingInput(**{f"{key}_ids": value for key, value in ids.items()}, **masks)
    return dpo_trainer.DPOTrainer(load(folder), load(folder), optimizer, config), batch


def sft(folder: Path, rows: list[dict[str, list[int]]], optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """(trainer, batch): rows of one length, of which the completions are learned."""

    def model_input(x: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
        real = jax.numpy.ones_like(x.input_mask)  # the batch's mask says what is learned
        places = dict(positions=utils.build_positions_from_mask(real), attention_mask=utils.make_causal_attn_mask(real))
        return dict(input_tokens=x.input_tokens, input_mask=x.input_mask, **places)

    tokens = np.array([row["prompt"] + row["completion"] for row in rows], np.int32)
    trainer = peft_trainer.PeftTrainer(load(folder), optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9))
    learned = np.array([[False] * len(row["prompt"]) + [True] * len(row["completion"]) for row in rows])
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=learned)
    return trainer.with_gen_model_input_fn(model_input), batch


def train(case: str, folder: Path, rows: list[dict[str, list[int]]], answer: Callable[..., None]) -> None:
    """Train for ever. What is timed lies between two batches that Tunix's loop asks for: all that it does for one of them.

    Args:
        case: dpo or sft.
        folder: Hugging Face checkpoint of policy and reference, with the RoPE base that Tunix's Llama always has, 1e6.
        answer: called after each step with its seconds, its CPU seconds and the losses of all steps so far.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    trainer, batch = {"dpo": dpo, "sft": sft}[case](folder, rows, optimizer)

    def turns() -> Iterator[Any]:
        losses = []
        while True:
            start = time.perf_counter(), time.process_time()
            yield batch
            jax.block_until_ready(nnx.state((trainer.model, trainer.optimizer)))  # the loop goes on before the step has ended
            seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
            losses.append(float(trainer._prev_buffered_train_metrics.loss))  # what it will log after the next step
            answer(seconds, cpu_seconds, losses)

    trainer.train(turns())
