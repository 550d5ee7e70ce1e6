"""A DPO step on the CPU: aligner, TRL and plain torch, on the same weights and the same rows, taking turns in one process.

    python -m benchmarks.dpo_step --rounds 5 --dtype both --json dpo_step.json

Llama 512 wide, 8 layers, 8 heads, 4 KV heads, MLP 1408, vocabulary 32000; 4 pairs of 256 tokens (128 of prompt, 128 of answer). Every side
computes the reference in the step (a second copy of the weights), clips at 1.0 and takes an AdamW step on float32 master weights.
Ratios are paired: each round runs every side once, and the median over rounds of time(TRL) / time(side) is printed. Peak memory is
measured in a fresh process per side: the highest resident memory during two steps after the first (which compiles), less what
the process held after its imports, before it made anything.

CPU seconds (of all threads) tell the sides apart also on a machine that others use; set OMP_WAIT_POLICY=passive for them, or torch's
waiting threads count as work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import machine, torch_sides

SHAPE = dict(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1408, vocabulary=32000)
PAIRS, PROMPT, ANSWER = 4, 128, 128
OURS = {"aligner": dict(shared_prompt=False), "aligner, shared prompt": dict(shared_prompt=True)}
TORCH = {"torch": dict(answers_only=False), "torch, answers only": dict(answers_only=True)}
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


def compare(folder: Path, dtype: str, rounds: int, names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds) per round of every side; TRL's loop leads and the others take their turn after each of its steps."""
    others = {name: make_side(name, folder, dtype) for name in names if name != "TRL"}
    for step in others.values():
        step()  # compile, warm up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def turns() -> None:
        for name, step in others.items():
            start = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        last = {name: f"{seconds[-1][0]:.2f}" for name, seconds in times.items()}
        print(f"  round {len(next(iter(times.values()))) - 1}: {last}", flush=True)

    def after_step(*seconds: float) -> None:
        times["TRL"].append(seconds)
        turns()

    if "TRL" in names:
        torch_sides.run_trl(folder, [as_text(row) for row in pairs()], dtype, rounds + 1, after_step)
    else:
        for _ in range(rounds + 1):
            turns()
    return {name: seconds[1:] for name, seconds in times.items()}  # TRL's first step is its warm-up


def peak_memory(name: str, folder: Path, dtype: str) -> dict[str, float]:
    """MiB of this process while it steps: run in a process of its own."""
    if name == "TRL" or name in TORCH:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl.trainer.dpo_trainer  # noqa: F401
    else:
        import benchmarks.aligner_side  # noqa: F401
    imported = machine.resident_mib()
    if name == "TRL":
        done = []

        def after_step(*_):
            done.append(machine.resident_mib(peak=True))
            if len(done) == 1:
                machine.forget_peak()

        torch_sides.run_trl(folder, [as_text(row) for row in pairs()], dtype, 3, after_step)
        peak = done[-1]
    else:
        step = make_side(name, folder, dtype)
        step()
        machine.forget_peak()
        step()
        step()
        peak = machine.resident_mib(peak=True)
    return {"imported": imported, "peak": peak, "net": peak - imported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)  # the process that measures one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print("MEMORY " + json.dumps(peak_memory(options.memory_of, options.folder, options.dtype)))
        return

    result = {"cpu": machine.cpu_name(), "gemm_gflops": machine.gemm_rates(), "steps": {}}
    print(result["cpu"])
    print("GEMM 2048x512x1408, GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in result["gemm_gflops"].items()))
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE)
        for dtype in ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]:
            result["steps"][dtype] = rows = measure(Path(folder), dtype, options)
            print(f"\n{dtype}, median of {options.rounds} rounds; ratios of times, paired by round")
            print("side                      s/step   CPU s  TRL/side   CPU  torch/side   CPU  peak MiB  net MiB")
            for name, row in rows.items():
                seconds = f"{row['seconds']:7.2f} {row['cpu_seconds']:7.2f}"
                ratios = f"{row['TRL'][0]:9.2f} {row['TRL'][1]:5.2f} {row['torch'][0]:11.2f} {row['torch'][1]:5.2f}"
                print(f"{name:24} {seconds} {ratios} {row['peak']:9.0f} {row['net']:8.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def measure(folder: Path, dtype: str, options) -> dict[str, dict]:
    """Times, ratios and memory of every side. A ratio is (of wall clock, of CPU time), the median over rounds."""
    times = compare(folder, dtype, options.rounds, options.sides)

    def ratio(base: str, name: str) -> list[float]:
        rounds = list(zip(times.get(base, []), times[name]))
        return [statistics.median(a[i] / b[i] for a, b in rounds) if rounds else float("nan") for i in (0, 1)]

    rows = {}
    for name in options.sides:
        command = [sys.executable, "-m", "benchmarks.dpo_step", "--memory-of", name, "--folder", folder, "--dtype", dtype]
        memory = dict.fromkeys(("imported", "peak", "net"), float("nan"))
        if not options.no_memory:
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            memory = json.loads(next(line for line in output.splitlines() if line.startswith("MEMORY")).split(" ", 1)[1])
        seconds, cpu_seconds = (statistics.median(values) for values in zip(*times[name]))
        rows[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "TRL": ratio("TRL", name), "torch": ratio("torch", name),
                      **memory, "rounds": times[name]}  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
