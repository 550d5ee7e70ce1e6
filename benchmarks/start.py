"""From the start of the program to its first training step: the first time, and again with what the first one compiled.

    python -m benchmarks.start

Both are the same command line with a workdir of its own, on a demo LLaVA made beforehand; the compile cache, which is on by default, is
empty at first. The time is the one that a run tells ("first step .. s after the start"), plus that of starting Python and importing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import cpu_name

TOLD = re.compile(r"first step ([\d.]+) s after the start")


def start(folder: Path, workdir: str, arguments: list[str]) -> dict[str, float]:
    """Seconds of one start to the line that tells of the first step."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "aligner.main", f"--workdir={folder / workdir}", *arguments]
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    told = []
    for line in process.stderr:
        told.append(line)
        if found := TOLD.search(line):
            seconds = time.perf_counter() - begun
            process.kill()
            process.wait()
            return {"from the command": seconds, "from the start of the run": float(found[1])}
    raise SystemExit("the run ended before its first step:\n" + "".join(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/dpo_llava.py")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--again", type=int, default=3, help="starts after the first; their median counts")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    from scripts.make_tiny_checkpoint import make_llava, make_pictures

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_llava(folder / "model", hidden_size=256, layers=options.layers, vision_layers=4)
        make_pictures(folder / "data", n_train=64, n_heldout=8)
        settings = {
            "model.path": folder / "model", "data.train.path": folder / "data" / "train.jsonl", "data.train.split": "train",
            "data.max_length": 160, "data.batch_size": 8, "train.steps": 4, "checkpoint.export": False,
        }  # fmt: skip
        arguments = [f"--config={options.config}", *(f"--config.{key}={value}" for key, value in settings.items())]
        first, *again = [start(folder, f"run{number}", arguments) for number in range(1 + options.again)]
    print(cpu_name())
    figures = {}
    for what, seconds in first.items():
        second = statistics.median(found[what] for found in again)
        figures[what] = {"first": seconds, "second": second}
        print(f"first step {what:26} {seconds:6.1f} s, again {second:6.1f} s, ratio {second / seconds:.2f}")
    print("the bar: 0.33")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
