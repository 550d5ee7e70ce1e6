"""A DPO step on the CPU: aligner, TRL and plain torch, on the same weights and the same rows, taking turns.

    python -m benchmarks.dpo_step --rounds 5 --dtype both --json dpo_step.json

Llama 512 wide, 8 layers, 8 heads, 4 KV heads, MLP 1408, vocabulary 32000; 4 pairs of 256 tokens (128 of prompt, 128 of answer). Every side
computes the reference in the step (a second copy of the weights), clips at 1.0 and takes an AdamW step on float32 master weights.
Every side is a process of its own, set up as its users run it (aligner's command line asks the C library for huge pages; the side
"TRL, huge pages" is TRL with the same), and waits while another steps. Ratios are paired: in each round every side takes a turn of
a few steps, and the median over rounds of time(TRL) / time(side) is printed. Peak memory is that of the steps after the first.

CPU seconds (of all threads) tell the sides apart also on a machine that others use; set OMP_WAIT_POLICY=passive for them, or torch's
waiting threads count as work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine, sides, torch_sides

SHAPE = dict(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1408, vocabulary=32000)
PAIRS, PROMPT, ANSWER = 4, 128, 128
OURS = {"aligner": dict(shared_prompt=False), "aligner, shared prompt": dict(shared_prompt=True)}
TORCH = {"torch": dict(answers_only=False), "torch, answers only": dict(answers_only=True)}
HUGE = "TRL, huge pages"
TRL = ("TRL", HUGE)
SIDES = ["TRL", *TORCH, *OURS]


def pairs() -> list[dict[str, list[int]]]:
    """The rows as token ids; every answer ends with EOS, as TRL appends it."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(4, SHAPE["vocabulary"], n).tolist()
    return [{"prompt": draw(PROMPT), "chosen": [*draw(ANSWER - 1), 2], "rejected": [*draw(ANSWER - 1), 2]} for _ in range(PAIRS)]


def as_text(pair: dict[str, list[int]]) -> dict[str, str]:
    """The same row as strings, for TRL, whose tokenizer gives back the ids and adds EOS."""
    words = {key: " ".join(f"w{i}" for i in ids if i != 2) for key, ids in pair.items()}
    return {"prompt": words["prompt"], "chosen": " " + words["chosen"], "rejected": " " + words["rejected"]}


def make_side(name: str, folder: Path, dtype: str):
    """A function that takes one step and returns its loss. TRL has none: it runs its own loop."""
    rows = pairs()
    if name in TORCH:
        tokens = [row["prompt"] + row[answer] for answer in ("chosen", "rejected") for row in rows]
        return torch_sides.bare_step(folder, tokens, PROMPT, dtype, **TORCH[name])
    from benchmarks.aligner_side import aligner_step

    return aligner_step(folder, rows, dtype, **OURS[name])


def serve(name: str, folder: Path, dtype: str, turn: int) -> None:
    """The process of one side."""
    if name in OURS:
        restart_with_huge_pages()
        import benchmarks.aligner_side  # noqa: F401
    else:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl.trainer.dpo_trainer  # noqa: F401
    answer = sides.answering(machine.resident_mib(), turn)
    if name in TRL:
        torch_sides.run_trl(folder, [as_text(row) for row in pairs()], dtype, 10**6, answer)
    step = make_side(name, folder, dtype)
    sides.serve(lambda: step() and None, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=int, default=4, help="steps that a side takes in a turn")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=[HUGE, *SIDES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=[HUGE, *SIDES], help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.folder, options.dtype, options.turn)

    result = {"cpu": machine.cpu_name(), "gemm_gflops": machine.gemm_rates(), "steps": {}}
    print(result["cpu"])
    print("GEMM 2048x512x1408, GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in result["gemm_gflops"].items()))
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE)
        for dtype in ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]:
            found = measure(Path(folder), dtype, options)
            print(f"\n{dtype}, median of {options.rounds} rounds; ratios of times, paired by round")
            result["steps"][dtype] = sides.summary(found, ("TRL", "torch"))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def measure(folder: Path, dtype: str, options) -> dict[str, list[dict]]:
    """Times and memory of every side in every round."""
    rest = ["--folder", str(folder), "--dtype", dtype, "--turn", str(options.turn)]
    commands = {name: ["benchmarks.dpo_step", "--serve", name, *rest] for name in options.sides}
    return sides.take_turns(commands, options.rounds, {HUGE: sides.HUGE_PAGES})


if __name__ == "__main__":
    main()
