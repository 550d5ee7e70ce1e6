"""A checkpoint read for training and written back: aligner against transformers, the same files, taking turns.

    python -m benchmarks.checkpoint_io --rounds 5

A Llama of 254 M parameters stored in bfloat16. "import" is from the folder to float32 parameters in memory, each of which has been read
once (transformers may leave what it has not read in the file); "export" is from those to a folder in bfloat16 again. The files lie in the
page cache on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine, sides, torch_sides

SHAPE = dict(hidden=1024, layers=16, heads=16, kv_heads=8, intermediate=2816, vocabulary=32000)
CASES = ("import", "export")


def transformers_side() -> tuple[Callable[[Path], Any], Callable[[Any, Path], None]]:
    """(load, save)."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(folder: Path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            float(sum(parameter.sum() for parameter in model.parameters()))
        return model

    def save(model, out: Path) -> None:
        model.save_pretrained(out, state_dict={name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})

    return load, save


def aligner_side() -> tuple[Callable[[Path], Any], Callable[[Any, Path], None]]:
    """(load, save)."""
    import jax
    import jax.numpy as jnp

    from aligner import convert

    total = jax.jit(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))

    def load(folder: Path):
        model, params = convert.load(folder, dtype="float32")
        float(total(params))
        return model, params

    def save(loaded, out: Path) -> None:
        convert.save(*loaded, out, dtype="bfloat16", progress=False)

    return load, save


SIDES = {"transformers": transformers_side, "aligner": aligner_side}


def serve(name: str, case: str, folder: Path) -> None:
    """The process of one side."""
    if name == "aligner":
        restart_with_huge_pages()
    load, save = SIDES[name]()
    answer = sides.answering(machine.resident_mib())
    if case == "import":
        sides.serve(lambda: load(folder) and None, answer)
    loaded = load(folder)
    with tempfile.TemporaryDirectory() as out:
        sides.serve(lambda: save(loaded, Path(out) / "exported"), answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.cases[0], options.folder)
    import torch
    from transformers import AutoModelForCausalLM

    print(machine.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        torch_sides.make_checkpoint(Path(folder), **SHAPE)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        for case in options.cases:
            commands = {name: ["benchmarks.checkpoint_io", "--serve", name, "--cases", case, "--folder", folder] for name in SIDES}
            found = sides.take_turns(commands, options.rounds)
            print(f"\n{case}, median of {options.rounds} rounds; ratios of times, paired by round")
            sides.summary(found, ("transformers",))


if __name__ == "__main__":
    main()
