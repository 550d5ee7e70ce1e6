"""A GRPO step against TRL's on the same work: 8 answers of 64 tokens to each of 2 prompts of 64, their scoring, one update.

    python -m benchmarks.grpo_step --rounds 3

Llama as in benchmarks/dpo_step.py, float32, drawn at temperature 1, no KL term, a reward that costs nothing (the share of even token
ids), clip at 1.0 and AdamW on both sides. TRL's own training loop runs; the seconds of a step are those between two `on_step_end`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import machine, torch_sides
from benchmarks.dpo_step import SHAPE

PROMPTS, ANSWERS, PROMPT, NEW = 2, 8, 64, 64


def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(4, SHAPE["vocabulary"], (PROMPTS, PROMPT))


def as_text(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


def even(prompts, completions, **columns) -> list[float]:
    """The reward: the share of words with an even number; special tokens do not count."""
    return [float(np.mean([int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()] or [0.0])) for text in completions]


def trl_seconds(folder: Path, steps: int) -> list[tuple[float, float]]:
    """(seconds, CPU seconds) of TRL's steps, the first one left out."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            out, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=PROMPTS * ANSWERS,
            num_generations=ANSWERS, max_completion_length=NEW, temperature=1.0, beta=0.0, max_steps=steps + 1, learning_rate=1e-6,
            lr_scheduler_type="constant", max_grad_norm=1.0, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            generation_kwargs={"min_new_tokens": NEW}, shuffle_dataset=False,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": as_text(ids)} for ids in prompts()])
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder), reward_funcs=even, args=args, train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"), callbacks=[Clock()],
        ).train()  # fmt: skip
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]


def aligner_seconds(folder: Path, steps: int) -> list[tuple[float, float]]:
    """The same of `aligner.online`, by its own parts: rollout, reward, advantages, update."""
    import jax

    import aligner
    from aligner import algorithms, optim, sharding, state
    from aligner.data.templates import Encoded
    from aligner.generation.engine import Prompt, make_engine
    from aligner.generation.sampling import Sampling
    from aligner.rl import rollouts
    from aligner.rl.engines import Local
    from aligner.rl.prompts import Item
    from aligner.rl.rewards import Reward
    from aligner.train_step import jit, make_train_step
    from configs import common

    config = common.base()
    config.model.dtype = "float32"
    config.algorithm = common.grpo()
    config.algorithm.reward_funcs = ("even",)
    config.generation.max_new_tokens = NEW
    config.optim.schedule = "constant"
    mesh = sharding.make_mesh({"data": -1})
    with jax.set_mesh(mesh):
        model, params = aligner.load(folder, mesh=mesh)
        algorithm, schedule = algorithms.make(config, model), optim.make_schedule(config.optim, steps)
        optimizer = optim.make_optimizer(config.optim, schedule)
        train_state = state.create(params, optimizer, algorithm.carry, 0, mesh)
        step = jit(make_train_step(algorithm, optimizer, dtype="float32", schedule=schedule), donate_argnums=0)
        engine = make_engine(model, Sampling(max_new_tokens=NEW), rows=PROMPTS * ANSWERS, detokenize=model.assets.tokenizer.decode)
        writer = rollouts.Writer(Local(engine, jax.random.key(0)), engine.detokenize, [Reward("even", even)], np.ones(1), 60.0)
        item = lambda i, ids: Item(i, as_text(ids), Encoded(ids, ()), Prompt(ids), {})
        items = [item(i, ids.astype(np.int32)) for i, ids in enumerate(prompts())]
        seconds = []
        for number in range(steps + 1):
            start = time.perf_counter(), time.process_time()
            writer.engine.update(train_state.trainable, number)
            groups = rollouts.write(writer, items, range(number * PROMPTS, (number + 1) * PROMPTS), ANSWERS)
            batch = rollouts.lay_out(groups, model, True, 64)
            batch, _, _ = rollouts.learnable(config, groups, None, batch, np.ones(1), {})
            train_state, found = step(train_state, {"base": {}}, batch)
            jax.block_until_ready(found)
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(machine.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE)
        found = {"TRL": trl_seconds(Path(folder), rounds), "aligner": aligner_seconds(Path(folder), rounds)}
    for name, seconds in found.items():
        print(f"{name}: " + ", ".join(f"{wall:.2f} s ({cpu:.2f} CPU s)" for wall, cpu in seconds))
    wall, cpu = (statistics.median(s[i] for s in found["TRL"]) / statistics.median(s[i] for s in found["aligner"]) for i in (0, 1))
    print(f"time(TRL) / time(aligner), medians: {wall:.2f}; of CPU time {cpu:.2f}")


if __name__ == "__main__":
    main()
