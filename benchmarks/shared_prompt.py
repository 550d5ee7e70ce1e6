"""DPO of a small LLaVA with 576 image tokens a prompt: the prompt computed once for both answers, against once for each.

    python -m benchmarks.shared_prompt --rounds 5
    python -m benchmarks.shared_prompt --rounds 1 --dtype float64

A CLIP tower of 336 pixels by patches of 14 (2 layers, frozen, as in configs/dpo_llava.py) and a Llama 512 wide with 8 layers; 2 pairs about
drawn pictures, answers of some 30 tokens, float32, the reference computed in the step. Both sides stand in one process and take turns;
after their first step the losses and the gradients (the optimizer's first moments) are compared. The rejected answers say something else
altogether: of answers that are alike most of the gradients cancels, and in float32 what is left is the rounding of what cancelled (--alike
shows it; float64 tells whether more is wrong).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine

PAIRS = 2
SIDES = {"duplicated": False, "shared": True}
NORMS = {"largest entry": lambda a: np.abs(a).max(), "norm": np.linalg.norm}


def make_input(folder: Path, alike: bool) -> None:
    """The checkpoint, and rows whose answers are some 30 tokens long."""
    from scripts.make_tiny_checkpoint import ENGLISH, make_llava, make_pictures

    make_llava(folder / "model", vocab_size=4096, hidden_size=512, intermediate_size=1408, layers=8, heads=8, kv_heads=4, image_size=336,
               patch_size=14, vision_hidden_size=128, vision_layers=2)  # fmt: skip
    make_pictures(folder / "data", n_train=PAIRS, n_heldout=2, size=336)
    if not alike:
        file = folder / "data" / "train.jsonl"
        rows = [json.loads(line) | {"rejected": said} for line, said in zip(file.read_text().splitlines(), ENGLISH.splitlines())]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_side(folder: Path, shared: bool, dtype: str):
    """(a function that takes one step and returns its loss, columns of a row)."""
    from aligner import convert
    from aligner.data import loader
    from benchmarks.aligner_side import make_config, make_steps

    config = make_config(dtype)
    config.optim.freeze = ("vision_tower/.*",)
    config.data.train.path = str(folder / "data" / "train.jsonl")
    config.data.batch_size, config.data.pad_to_multiple = PAIRS, 8
    config.data.shared_prompt = shared
    model, disk = convert.open_model(folder / "model")
    dataset = loader.load_dataset(config, "train", model, "preference", progress=False)
    batches = [*loader.batches(dataset, PAIRS, seed=0, shuffle=False, epochs=1)]
    return make_steps(config, model, convert.load_params(model, disk, dtype), batches, folder / "model"), dataset.shape[0]


def moments(step) -> dict[str, np.ndarray]:
    """The optimizer's first moments: after one step, the gradients but for a factor."""
    leaves = jax.tree_util.tree_leaves_with_path(step.box[0].opt_state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--alike", action="store_true", help="answers of a pair that differ by a word")
    options = parser.parse_args()
    restart_with_huge_pages()
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    print(machine.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        make_input(Path(folder), options.alike)
        made = {name: make_side(Path(folder), shared, options.dtype) for name, shared in SIDES.items()}
    steps = {name: step for name, (step, _) in made.items()}
    losses = {name: step() for name, step in steps.items()}
    gradients = {name: moments(step) for name, step in steps.items()}
    pairs = [(a, gradients["shared"][path]) for path, a in gradients["duplicated"].items()]
    off = {of: max(size(a - b) / max(size(a), 1e-30) for a, b in pairs) for of, size in NORMS.items()}
    seconds = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    for name, (_, columns) in made.items():
        print(f"{name:10} {columns} columns a row, {statistics.median(seconds[name]):.2f} s a step, loss {losses[name]:.7f}")
    ratio = statistics.median(a / b for a, b in zip(seconds["duplicated"], seconds["shared"]))
    print(f"time(duplicated) / time(shared) {ratio:.2f}, median of {options.rounds} rounds")
    print("gradients differ by at most " + ", ".join(f"{value:.1e} of a tensor's {of}" for of, value in off.items()))


if __name__ == "__main__":
    main()
