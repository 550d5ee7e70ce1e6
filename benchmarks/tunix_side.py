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
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer

from benchmarks.torch_sides import BETA, LEARNING_RATE, MAX_GRAD_NORM


class Words:
    """A tokenizer whose token `i` is the word `w{i}`; no token ends an answer."""

    encode = staticmethod(lambda text: [int(word[1:]) for word in text.split()])
    decode = staticmethod(lambda ids: " ".join(f"w{i}" for i in ids))
    bos_id = pad_id = staticmethod(lambda: 0)
    eos_id = staticmethod(lambda: -1)


def sampler(folder: Path, prompts: np.ndarray, dtype: str, new: int, greedy: bool) -> Callable[[], np.ndarray]:
    """A function that answers prompts [N,P] of token ids with `new` tokens each, [N,new], by Tunix's own sampler."""
    model = load(folder, getattr(jax.numpy, dtype))
    config = model.config
    cache = CacheConfig(prompts.shape[1] + new, config.num_layers, config.num_kv_heads, config.head_dim)
    write = Sampler(model, Words(), cache)
    texts = list(map(Words.decode, prompts))
    how = {} if greedy else dict(temperature=1.0, top_p=1.0)
    return lambda: np.stack(write(texts, new, max_prompt_length=prompts.shape[1], **how).tokens)


def grpo(folder: Path, prompts: np.ndarray, answers: int, new: int, reward: Callable, answer: Callable[..., None]) -> None:
    """Train by GRPO for ever: `answers` of `new` tokens each to prompts [N,P], drawn at temperature 1, no KL term, one update.

    `answer` is called after each step with its seconds and CPU seconds: of all that Tunix's loop does for one batch of prompts.
    """
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    length = prompts.shape[1]
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE), mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=clipped_adamw(), eval_every_n_steps=10**9, max_steps=10**6, mini_batch_size=len(prompts)
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=new, max_prompt_length=length, kv_cache_size=length + new, temperature=1.0, top_p=1.0
        ),
    )
    cluster = rl_cluster.RLCluster(actor=load(folder, mesh=mesh), tokenizer=Words(), cluster_config=config)
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=answers, beta=0.0), reward)

    def turns() -> Iterator[dict[str, np.ndarray]]:
        texts = np.array(list(map(Words.decode, prompts)))
        yield {"prompts": texts}  # what the loop reads ahead, of sizes alone
        while True:
            start = time.perf_counter(), time.process_time()
            yield {"prompts": texts}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            answer(time.perf_counter() - start[0], time.process_time() - start[1])

    learner.train(turns())


def clipped_adamw() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))


def load(folder: Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> llama3.Llama3:
    """The Hugging Face checkpoint by Tunix's own loader, which wants its sizes told."""
    hf = json.loads((folder / "config.json").read_text())
    config = llama3.ModelConfig(
        num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"], hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"], head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"], rope_theta=hf["rope_parameters"]["rope_theta"], norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )  # fmt: skip
    return llama3_params.create_model_from_safe_tensors(str(folder), config, mesh, dtype)


def padded(texts: list[list[int]], multiple: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N,T] and 1 where they are real, T the next multiple of a number; zeros stand behind or before a text."""
    width = -(-max(map(len, texts)) // multiple) * multiple
    ids, real = np.zeros((2, len(texts), width), np.int32)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(len(text))
        ids[row, place], real[row, place] = text, 1
    return ids, real


def dpo(folder: Path, rows: list[list[dict]], optimizer: optax.GradientTransformation, dtype: Any, multiple: int) -> tuple[Any, list]:
    """(trainer, batches), padded as Tunix's own tokenizing does it: prompts from the left, answers from the right."""

    def made(batch: list[dict[str, list[int]]]) -> dpo_trainer.TrainingInput:
        prompts, asked = padded([row["prompt"] for row in batch], multiple, left=True)
        # one width for both answers, which the trainer wants
        answers, real = padded([row[key] for key in ("chosen", "rejected") for row in batch], multiple)
        (chosen, rejected), (chosen_mask, rejected_mask) = np.split(answers, 2), np.split(real, 2)
        return dpo_trainer.TrainingInput(
            prompt_ids=prompts, chosen_ids=chosen, rejected_ids=rejected,
            prompt_mask=asked, chosen_mask=chosen_mask, rejected_mask=rejected_mask,
        )  # fmt: skip

    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=BETA)
    return dpo_trainer.DPOTrainer(load(folder, dtype), load(folder, dtype), optimizer, config), [*map(made, rows)]


def sft(folder: Path, rows: list[list[dict]], optimizer: optax.GradientTransformation, dtype: Any, multiple: int) -> tuple[Any, list]:
    """(trainer, batches), of which the completions are learned."""

    def made(batch: list[dict[str, list[int]]]) -> peft_trainer.TrainingInput:
        tokens, _ = padded([row["prompt"] + row["completion"] for row in batch], multiple)
        learned = np.zeros(tokens.shape, bool)
        for row, text in zip(learned, batch):
            row[len(text["prompt"]) : len(text["prompt"]) + len(text["completion"])] = True
        return peft_trainer.TrainingInput(input_tokens=tokens, input_mask=learned)

    def model_input(x: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
        real = x.input_tokens != 0  # the batch's mask says what is learned
        places = dict(positions=utils.build_positions_from_mask(real), attention_mask=utils.make_causal_attn_mask(real))
        return dict(input_tokens=x.input_tokens, input_mask=x.input_mask, **places)

    trainer = peft_trainer.PeftTrainer(load(folder, dtype), optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9))
    return trainer.with_gen_model_input_fn(model_input), [*map(made, rows)]


def train(
    case: str, folder: Path, rows: list[list[dict[str, list[int]]]], dtype: str, answer: Callable[..., None], multiple: int = 1
) -> None:
    """Train for ever. What is timed lies between two batches that Tunix's loop asks for: all that it does for one of them.

    Args:
        case: dpo or sft.
        folder: Hugging Face checkpoint of policy and reference, with the RoPE base that Tunix's Llama always has, 1e6.
        rows: batches of token ids, none of them 0.
        dtype: of everything: weights, moments and computation.
        answer: called after each pass over the batches with its seconds, its CPU seconds and the losses of all steps so far.
        multiple: of tokens, to which the texts of a batch are padded.
    """
    trainer, batches = {"dpo": dpo, "sft": sft}[case](folder, rows, clipped_adamw(), getattr(jax.numpy, dtype), multiple)

    def turns() -> Iterator[Any]:
        losses = []
        while True:
            seconds, cpu_seconds = 0.0, 0.0
            for batch in batches:
                start = time.perf_counter(), time.process_time()
                yield batch
                jax.block_until_ready(nnx.state((trainer.model, trainer.optimizer)))  # the loop goes on before the step has ended
                seconds, cpu_seconds = seconds + time.perf_counter() - start[0], cpu_seconds + time.process_time() - start[1]
                losses.append(float(trainer._prev_buffered_train_metrics.loss))  # what it will log after the next step
            answer(seconds, cpu_seconds, losses)

    trainer.train(turns())
