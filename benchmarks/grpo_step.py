"""A GRPO step against TRL's and Tunix's on the same work: 8 answers of 64 tokens to each of 2 prompts of 64, their scoring, one update.

    python -m benchmarks.grpo_step --rounds 3 --tunix-python TUNIX/bin/python

Llama as in benchmarks/dpo_step.py, float32, drawn at temperature 1, no KL term, a reward that costs nothing (the share of even token
ids), clip at 1.0 and AdamW on all sides, each a process of its own that waits while the other works. TRL's own training loop runs; its
step is what lies between `on_step_begin` and `on_step_end`: writing the answers, the reward, the update. Tunix's is what its own loop does
from one batch of prompts to the next; TUNIX is a virtual environment as in benchmarks/tunix_step.py, whose checkpoint is taken too, and
without the option two sides are compared. Ratios are paired by round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine, sides, torch_sides
from benchmarks.dpo_step import SHAPE
from benchmarks.tunix_step import ROPE_THETA

PROMPTS, ANSWERS, PROMPT, NEW = 2, 8, 64, 64
SIDES = ("TRL", "Tunix", "aligner")


def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(4, SHAPE["vocabulary"], (PROMPTS, PROMPT))


def as_text(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


def even(prompts, completions, **columns) -> list[float]:
    """The reward: the share of words with an even number; special tokens do not count."""
    return [float(np.mean([int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()] or [0.0])) for text in completions]


def run_trl(folder: Path, answer: Callable[[float, float], None]) -> None:
    """TRL's loop; `answer` is called with the seconds and CPU seconds of each step, and ends the process when no more are wanted."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            out, use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=PROMPTS * ANSWERS,
            num_generations=ANSWERS, max_completion_length=NEW, temperature=1.0, beta=0.0, max_steps=10**6, learning_rate=1e-6,
            lr_scheduler_type="constant", max_grad_norm=1.0, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            generation_kwargs={"min_new_tokens": NEW}, shuffle_dataset=False,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": as_text(ids)} for ids in prompts()])
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder), reward_funcs=even, args=args, train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"), callbacks=[torch_sides.step_clock(answer)],
        ).train()  # fmt: skip


def aligner_step(folder: Path) -> Callable[[], float]:
    """A function that takes a step of `aligner.online`, by its own parts: rollout, reward, advantages, update. It returns the loss."""
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
    from aligner.train_step import jit_train_step
    from configs import common

    config = common.base()
    config.model.dtype = "float32"
    config.algorithm = common.grpo()
    config.algorithm.reward_funcs = ("even",)
    config.generation.max_new_tokens = NEW
    config.optim.schedule = "constant"
    mesh = sharding.make_mesh({"data": -1})
    jax.set_mesh(mesh)
    model, params = aligner.load(folder, mesh=mesh)
    algorithm, schedule = algorithms.make(config, model), optim.make_schedule(config.optim, 10**6)
    optimizer = optim.make_optimizer(config.optim, schedule)
    train_state = state.create(params, optimizer, algorithm.carry, 0, mesh)
    del params
    step = jit_train_step(config, algorithm, optimizer, schedule, train_state, mesh)
    engine = make_engine(model, Sampling(max_new_tokens=NEW), rows=PROMPTS * ANSWERS)
    writer = rollouts.Writer(Local(engine, jax.random.key(0)), model.assets.tokenizer.decode, [Reward("even", even)], np.ones(1), 60.0)
    item = lambda i, ids: Item(i, as_text(ids), Encoded(ids, ()), Prompt(ids), {})
    items = [item(i, ids.astype(np.int32)) for i, ids in enumerate(prompts())]
    number = 0

    def one() -> float:
        nonlocal train_state, number
        writer.engine.update(train_state.trainable, number)
        groups = rollouts.write(writer, items, range(number * PROMPTS, (number + 1) * PROMPTS), ANSWERS)
        batch = rollouts.lay_out(groups, model, config.data.shared_prompt, config.data.pad_to_multiple)
        batch, _, _ = rollouts.learnable(config, groups, None, batch, np.ones(1), {})
        train_state, found = step(train_state, {"base": {}}, batch)
        number += 1
        return float(found["loss"].value)

    return one


def serve(name: str, folder: Path) -> None:
    """The process of one side."""
    if name == "aligner":
        restart_with_huge_pages()
        one = aligner_step(folder)
        sides.serve(one, sides.answering(machine.resident_mib()))
    if name == "Tunix":
        from benchmarks import tunix_side

        return tunix_side.grpo(folder, prompts(), ANSWERS, NEW, even, sides.answering(machine.resident_mib()))
    run_trl(folder, sides.answering(machine.resident_mib()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tunix-python", metavar="PATH", help="the interpreter of an environment that has Tunix")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.folder)
    print(machine.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE, rope_theta=ROPE_THETA)
        names = [name for name in SIDES if name != "Tunix" or options.tunix_python]
        commands = {name: ["benchmarks.grpo_step", "--serve", name, "--folder", folder] for name in names}
        found = sides.take_turns(commands, options.rounds, interpreters={"Tunix": options.tunix_python})
    sides.summary(found, names[:-1])


if __name__ == "__main__":
    main()
