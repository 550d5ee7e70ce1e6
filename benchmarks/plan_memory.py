"""What `aligner.plan` says a step will hold against what a real run holds: resident memory at its peak, less the process's own.

    python -m benchmarks.plan_memory                 # six configs, one after the other; about ten minutes on two cores
    python -m benchmarks.plan_memory --only kto,lora

Every config is run as `aligner.main` runs it, in a process of its own. Its own memory (Python, imports, compiled programs: 100 MiB of them
after the imports, whatever the model) is what is resident between the second step and the third, memory that was freed given back to the
system, less the arrays that live then. The peak is the highest from there to the last step, so that reading weights and compiling do not
count. The plan is made in another process from the same command line and config.json; what it says lives between steps is shown beside the
arrays that do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aligner.allocator import give_back
from benchmarks.machine import cpu_name, forget_peak, resident_mib
from benchmarks.sides import MARK

STEPS = 5
TEXT = dict(vocab_size=8192, hidden_size=512, intermediate_size=1408, layers=6, heads=8, kv_heads=4)  # 24 M parameters
WIDE = dict(vocab_size=8192, hidden_size=1024, intermediate_size=2816, layers=6, heads=16, kv_heads=8)  # 86 M
SEEING = dict(**{**TEXT, "layers": 4}, image_size=112, patch_size=14, vision_hidden_size=256, vision_layers=4, vision_heads=4)


class Case(NamedTuple):
    """A config file, the sizes of a model, the length of texts in words, settings."""

    config: str
    model: dict[str, int]
    words: tuple[int, int]  # of a prompt, of an answer
    settings: dict[str, Any]


CASES = {
    "dpo": Case("dpo_llama3", TEXT, (40, 60), {"model.dtype": "float32", "train.remat": "none", "data.batch_size": 8}),
    "dpo, remat, copy": Case(
        "dpo_llama3", TEXT, (60, 100),
        {"model.dtype": "float32", "train.remat": "full", "data.batch_size": 16, "train.accumulate": 4, "reference.kind": "copy"},
    ),
    "sft, packed": Case(
        "sft_llama3", TEXT, (20, 40),
        {"model.dtype": "bfloat16", "train.remat": "none", "data.batch_size": 4, "data.packed_length": 512, "data.max_length": 512},
    ),
    "kto": Case("kto_llama3", TEXT, (40, 60), {"model.dtype": "float32", "train.remat": "dots", "data.batch_size": 8}),
    "lora": Case(
        "dpo_llama3", WIDE, (30, 50),
        {"model.dtype": "bfloat16", "train.remat": "none", "data.batch_size": 8, "lora.rank": 16, "reference.kind": "base"},
    ),
    "qlora": Case(
        "sft_llama3", WIDE, (30, 50),
        {"model.dtype": "float32", "train.remat": "full", "data.packing": False, "data.batch_size": 16, "lora.rank": 16,
         "quant.base": "nf4"},
    ),
    "llava": Case("dpo_llava", SEEING, (20, 40), {"model.dtype": "float32", "train.remat": "none", "data.batch_size": 8}),
}  # fmt: skip


def write_data(folder: Path, words: tuple[int, int], seeing: bool, count: int = 64) -> None:
    """rows.jsonl of pairs, which serve every kind of sample, and their pictures."""
    from PIL import Image

    draw = random.Random(0)
    text = lambda n: " ".join(draw.choice(("the", "dog", "sleeps", "in", "sun", "people", "walking", "table", "answer")) for _ in range(n))
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            asked, (good, bad) = text(words[0]), (text(draw.randint(words[1] // 2, words[1])) for _ in range(2))
            row = {"prompt": asked, "chosen": good, "rejected": bad} if not seeing else {"question": asked, "chosen": good, "rejected": bad}
            if seeing:
                row["image"] = f"{number}.png"
                Image.new("RGB", (112, 112), (number, 80, 200)).save(folder / row["image"])
            file.write(json.dumps(row) + "\n")


def command(case: Case, folder: Path) -> list[str]:
    """The command line of a run of the case, and of its plan; makes what it needs."""
    from scripts.make_tiny_checkpoint import make_llama, make_llava

    seeing = "image_size" in case.model
    (make_llava if seeing else make_llama)(folder / "model", **case.model)
    write_data(folder / "data", case.words, seeing)
    settings = {
        "model.path": folder / "model", "data.train.path": folder / "data" / "rows.jsonl", "data.train.split": "train",
        "data.eval.path": "", "data.pad_to_multiple": 8, "train.steps": STEPS, "checkpoint.export": False, **case.settings,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config=configs/{case.config}.py", f"--workdir={folder / 'run'}", *flags]


def measure(argv: list[str]) -> int:
    """Run the config; tell what it held, in MiB, and the sizes of its rows."""
    import jax

    from aligner import run
    from aligner.main import CONFIG, WORKDIR

    held, sizes = {}, {}
    load_dataset = run.loader.load_dataset

    def looking(*arguments: Any, **options: Any) -> Any:
        dataset = load_dataset(*arguments, **options)
        sizes.update(zip(("tokens", "scored", "images"), dataset.shape), examples=dataset.examples)
        return dataset

    @contextlib.contextmanager
    def watching(*_: Any) -> Iterator[Callable[[int], None]]:
        def trace(step: int) -> None:
            if step == 2:
                living = jax.block_until_ready(jax.live_arrays())
                held["arrays"] = sum(array.nbytes for array in living) / 2**20
                time.sleep(1)  # results are there a moment before the program's temporaries are given up
                give_back()
                held["before"] = resident_mib() - held["arrays"]
                forget_peak()
            held["peak"] = resident_mib(peak=True)  # the last time before the last step, which saves

        yield trace

    run.loader.load_dataset, run.tracing = looking, watching
    run.run(CONFIG.value, WORKDIR.value)
    print(MARK + json.dumps({"row": sizes, "net": held["peak"] - held["before"], **held}), flush=True)
    return 0


def one(name: str) -> dict[str, Any]:
    """MiB that the run of a case held and that its plan says."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    ours = lambda *command: subprocess.run([sys.executable, "-m", *command], env=environment, text=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = command(CASES[name], Path(folder))
        ran = ours("benchmarks.plan_memory", "--measure", *arguments)
        found = next((json.loads(line[len(MARK) :]) for line in ran.stdout.splitlines() if line.startswith(MARK)), None)
        if found is None:
            raise SystemExit(f"{name} did not run:\n{ran.stderr}")
        sizes = [f"--{key}={value}" for key, value in found["row"].items()]
        out = Path(folder) / "plan.json"
        planned = ours("aligner.plan", *arguments, *sizes, "--topology=cpu:1", f"--json={out}")
        if planned.returncode:
            raise SystemExit(f"{name} could not be planned:\n{planned.stderr}")
        figures = json.loads(out.read_text())
    parts = {key: figures[f"{key}_bytes"] / 2**20 for key in ("resident", "temporary", "total")}
    return {**found, **parts, "ratio": parts["total"] / found["net"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {', '.join(CASES)}, by the beginning of their names, comma between")
    parser.add_argument("--json", help="file to write the figures to")
    options = parser.parse_args()
    chosen = [name for name in CASES if not options.only or any(name.startswith(only.strip()) for only in options.only.split(","))]
    print(cpu_name())
    print(f"{'MiB':18} {'arrays':>8} {'planned':>8} {'+ within':>9} {'= in all':>9} {'measured':>9} {'planned / measured':>19}", flush=True)
    figures = {}
    for name in chosen:
        figures[name] = found = one(name)
        planned = f"{found['resident']:8.0f} {found['temporary']:9.0f} {found['total']:9.0f}"
        print(f"{name:18} {found['arrays']:8.0f} {planned} {found['net']:9.0f} {found['ratio']:19.3f}", flush=True)
    print(f"furthest from 1: {max((found['ratio'] for found in figures.values()), key=lambda ratio: abs(ratio - 1)):.3f}; the bar is 15 %")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        sys.argv.remove("--measure")
        from absl import app

        from aligner.main import parse

        app.run(measure, flags_parser=parse)
    else:
        main()
