"""A DPO and an SFT step on the CPU: aligner and Tunix, on the same weights and the same rows, taking turns.

    python -m benchmarks.tunix_step --tunix-python TUNIX/bin/python --rounds 5 --json tunix_step.json

TUNIX is a virtual environment with google-tunix 0.1.7 and its JAX; nothing of aligner need be installed there. The Llama of
benchmarks/dpo_step.py. DPO: the pairs of benchmarks/dpo_step.py, the reference computed in the step. SFT: 8 rows of 256 tokens, learned are
all but the first or, in `sft_answers`, the 128 of the answer, as in instruction tuning; Tunix cannot pack, so the rows are full without
packing. Both sides clip at 1.0 and take an AdamW step. In bfloat16 Tunix's weights and moments are bfloat16 too, aligner's float32. Tunix's
own loop runs, and what it does from one batch to the next is timed; "Tunix, huge pages" is Tunix with what aligner's command line asks of
the C library. Tunix's Llama ignores the checkpoint's RoPE base and takes 1e6, so the checkpoint here has that. The losses of all steps are
compared: those after the first depend on gradients, clipping and optimizer, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine, sides
from benchmarks.dpo_step import OURS, SHAPE, pairs

ROWS, LENGTH = 8, 256
HUGE = "Tunix, huge pages"
TUNIX = ("Tunix", HUGE)
CASES = {"dpo": OURS, "sft": {"aligner": {}}, "sft_answers": {"aligner": {}}}
ROPE_THETA = 1e6


def documents(prompt: int = 1) -> list[dict[str, list[int]]]:
    """Rows as token ids. The first token at least is the prompt, because nothing can predict it."""
    tokens = np.random.default_rng(1).integers(4, SHAPE["vocabulary"], (ROWS, LENGTH)).tolist()
    return [{"prompt": row[:prompt], "completion": row[prompt:]} for row in tokens]


def serve(name: str, case: str, folder: Path, dtype: str, turn: int) -> None:
    """The process of one side; answers with the losses of all steps so far."""
    rows = {"dpo": pairs, "sft": documents, "sft_answers": lambda: documents(LENGTH // 2)}[case]()
    algorithm = case.removesuffix("_answers")
    if name in TUNIX:
        from benchmarks import tunix_side

        return tunix_side.train(algorithm, folder, [rows], dtype, sides.answering(machine.resident_mib(), turn))
    restart_with_huge_pages()
    from benchmarks.aligner_side import aligner_step

    answer = sides.answering(machine.resident_mib(), turn)
    step, losses = aligner_step(folder, rows, dtype, algorithm=algorithm, **CASES[case][name]), []
    sides.serve(lambda: losses.append(step()) or losses, answer)


def compare(case: str, options: argparse.Namespace, folder: str) -> dict[str, dict]:
    """Take turns at one algorithm; print times, memory and losses."""
    names = [*options.sides, *CASES[case]]
    rest = ["--cases", case, "--folder", folder, "--dtype", options.dtype, "--turn", str(options.turn)]
    commands = {name: ["benchmarks.tunix_step", "--serve", name, *rest] for name in names}
    interpreters = dict.fromkeys(TUNIX, options.tunix_python)
    found = sides.take_turns(commands, options.rounds, {HUGE: sides.HUGE_PAGES}, interpreters)
    print(f"\n{case}, {options.dtype}, median of {options.rounds} rounds; ratios of times, paired by round")
    figures = sides.summary(found, ("Tunix",))
    losses = {name: rounds[-1]["result"] for name, rounds in found.items()}
    for name, values in losses.items():
        print(f"{name:24} losses of {len(values)} steps, from {values[0]:.6f} to {values[-1]:.6f}")
    off = max(abs(value / theirs - 1) for values in losses.values() for value, theirs in zip(values, losses["Tunix"]))
    print(f"losses differ from Tunix's by at most {off:.1e}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix-python", metavar="PATH", help="the interpreter of the environment that has Tunix")
    parser.add_argument("--sides", nargs="+", default=TUNIX, choices=TUNIX, help="of Tunix's")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=int, default=4, help="steps that a side takes in a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.cases[0], options.folder, options.dtype, options.turn)
    if not options.tunix_python:
        parser.error("--tunix-python is needed: the interpreter of the environment that has Tunix")
    from benchmarks import torch_sides

    print(machine.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE, rope_theta=ROPE_THETA)
        figures = {case: compare(case, options, folder) for case in options.cases}
    if options.json:
        options.json.write_text(json.dumps({"cpu": machine.cpu_name(), "steps": figures}, indent=1))


if __name__ == "__main__":
    main()
