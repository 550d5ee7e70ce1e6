"""From the start of the program to its first training step: the first time, and again with what the first one left.

    python -m benchmarks.start

The same command every time, on a demo LLaVA made beforehand, killed once its first step is done. The compile cache, which is on by
default, and the workdir are empty at first. What a run keeps in its workdir (the census of the rows, the reference's numbers) the second
start finds there, as after a preemption; "in another workdir" it finds what was compiled and nothing else. The time is the one that a run
tells ("first step .. s after the start"), and that from giving the command, with Python's own start and the imports.
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
    parser.add_argument("--rows", type=int, default=64, help="of the training set, each with a picture")
    parser.add_argument("--again", type=int, default=5, help="starts after the first; their median counts")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    from scripts.make_tiny_checkpoint import make_llava, make_pictures

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_llava(folder / "model", hidden_size=256, layers=options.layers, vision_layers=4)
        make_pictures(folder / "data", n_train=options.rows, n_heldout=8)
        settings = {
            "model.path": folder / "model", "data.train.path": folder / "data" / "train.jsonl", "data.train.split": "train",
            "data.max_length": 160, "data.batch_size": 8, "train.steps": 4, "checkpoint.export": False,
        }  # fmt: skip
        arguments = [f"--config={options.config}", *(f"--config.{key}={value}" for key, value in settings.items())]
        first = start(folder, "run", arguments)
        again = [start(folder, "run", arguments) for _ in range(options.again)]
        elsewhere = [start(folder, f"other{number}", arguments) for number in range(options.again)]
    print(cpu_name())
    figures = {}
    for what, seconds in first.items():
        figures[what] = {"first": seconds}
        print(f"first step {what}: {seconds:.1f} s")
        for where, starts in (("again", again), ("in another workdir", elsewhere)):
            second = statistics.median(found[what] for found in starts)
            figures[what][where] = second
            print(f"    {where:20} {second:6.1f} s, ratio {second / seconds:.2f}")
    print("the bar: 0.33")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
