"""Tokens per second of `aligner`'s generation against `transformers.generate` and Tunix's sampler: same weights and prompts, taking turns.

    python -m benchmarks.generation --rounds 5 --tunix-python TUNIX/bin/python

Llama 512 wide, 8 layers, 8 heads, 4 KV heads, MLP 1408, vocabulary 32000; batch 8, prompts of 64 tokens, 128 new tokens each, drawn at
temperature 1 from the whole distribution on all sides, or the likeliest with --greedy (whose tokens are then compared). TUNIX is a virtual
environment as in benchmarks/tunix_step.py, whose checkpoint is taken too; without the option two sides are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine, sides, torch_sides
from benchmarks.dpo_step import SHAPE
from benchmarks.tunix_step import ROPE_THETA

BATCH, PROMPT, NEW = 8, 64, 128


def transformers_side(folder: Path, prompts: np.ndarray, dtype: str, greedy: bool):
    """A function that writes all answers with `transformers` and returns their tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts)
    options = dict(do_sample=not greedy, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    options |= {} if greedy else dict(temperature=1.0, top_k=0, top_p=1.0)

    def run() -> np.ndarray:
        with torch.no_grad():
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].numpy()

    return run


def aligner_side(folder: Path, prompts: np.ndarray, dtype: str, greedy: bool):
    """The same with aligner; log-probabilities come with the tokens."""
    import jax

    import aligner
    from aligner.generation.engine import Prompt, generate_all, make_engine
    from aligner.generation.sampling import Sampling

    model, params = aligner.load(folder, dtype=dtype)
    engine = make_engine(model, Sampling(max_new_tokens=NEW, temperature=0.0 if greedy else 1.0), rows=BATCH, dtype=dtype)
    params = engine.prepare(params)
    rows = [Prompt(row.astype(np.int32)) for row in prompts]

    def run() -> np.ndarray:
        return np.stack([answer.tokens for (answer,) in generate_all(engine, params, rows, jax.random.key(0))])

    return run


def tunix_sampler(folder: Path, prompts: np.ndarray, dtype: str, greedy: bool):
    """The same with Tunix; without log-probabilities."""
    from benchmarks import tunix_side

    return tunix_side.sampler(folder, prompts, dtype, NEW, greedy)


def serve(name: str, folder: Path, dtype: str, greedy: bool) -> None:
    """The process of one side."""
    if name == "aligner":
        restart_with_huge_pages()
        import aligner.generation.engine  # noqa: F401
    elif name == "transformers":
        import transformers  # noqa: F401
    else:
        import tunix.generate.sampler  # noqa: F401
    answer = sides.answering(machine.resident_mib())
    run = SIDES[name](folder, np.random.default_rng(0).integers(4, SHAPE["vocabulary"], (BATCH, PROMPT)), dtype, greedy)
    sides.serve(lambda: run().tolist(), answer)


SIDES = {"transformers": transformers_side, "Tunix": tunix_sampler, "aligner": aligner_side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--tunix-python", metavar="PATH", help="the interpreter of an environment that has Tunix")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.folder, options.dtype, options.greedy)
    print(machine.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE, rope_theta=ROPE_THETA)
        rest = ["--folder", folder, "--dtype", options.dtype, *["--greedy"] * options.greedy]
        commands = {name: ["benchmarks.generation", "--serve", name, *rest] for name in SIDES if name != "Tunix" or options.tunix_python}
        found = sides.take_turns(commands, options.rounds, interpreters={"Tunix": options.tunix_python})
    for name, rounds in found.items():
        rate = statistics.median(BATCH * NEW / answer["seconds"] for answer in rounds)
        print(f"{name:12} {rate:5.0f} tokens/s, net peak memory {max(answer['net'] for answer in rounds):5.0f} MiB")
    print(f"medians of {options.rounds} rounds, {options.dtype}")
    ours = np.asarray(found["aligner"][-1]["result"])
    for name, rounds in found.items():
        if name == "aligner":
            continue
        wall, cpu = (sides.ratio(found, name, "aligner", key) for key in ("seconds", "cpu_seconds"))
        print(f"aligner is {wall:.2f} times as fast as {name}, {cpu:.2f} in CPU time")
        if options.greedy:
            print(f"    greedy tokens equal: {np.mean(np.asarray(rounds[-1]['result']) == ours):.3f}")


if __name__ == "__main__":
    main()
