"""Tokens per second of `aligner`'s generation against `transformers.generate`, the same weights and prompts, taking turns in one process.

    python -m benchmarks.generation --rounds 3

Llama 512 wide, 8 layers, 8 heads, 4 KV heads, MLP 1408, vocabulary 32000; batch 8, prompts of 64 tokens, 128 new tokens each, drawn at
temperature 1 from the whole distribution on both sides, or the likeliest with --greedy (whose tokens are then compared).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import machine, torch_sides
from benchmarks.dpo_step import SHAPE

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--greedy", action="store_true")
    options = parser.parse_args()
    print(machine.cpu_name())
    prompts = np.random.default_rng(0).integers(4, SHAPE["vocabulary"], (BATCH, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE)
        sides = {"transformers": transformers_side, "aligner": aligner_side}
        sides = {name: make(Path(folder), prompts, options.dtype, options.greedy) for name, make in sides.items()}
        tokens = {name: run() for name, run in sides.items()}  # compile, warm up
        if options.greedy:
            print(f"greedy tokens equal: {np.mean(tokens['transformers'] == tokens['aligner']):.3f}")
        ratios = []
        for number in range(options.rounds):
            rates, cpu = {}, {}
            for name, run in sides.items():
                start = time.perf_counter(), time.process_time()
                run()
                rates[name], cpu[name] = BATCH * NEW / (time.perf_counter() - start[0]), time.process_time() - start[1]
            ratios.append((rates["aligner"] / rates["transformers"], cpu["transformers"] / cpu["aligner"]))
            said = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
            print(f"round {number + 1}: {said}; aligner is {ratios[-1][0]:.2f} times as fast ({ratios[-1][1]:.2f} in CPU time)", flush=True)
    print(f"median of {options.rounds} rounds, {options.dtype}: {statistics.median(r for r, _ in ratios):.2f}")


if __name__ == "__main__":
    main()
