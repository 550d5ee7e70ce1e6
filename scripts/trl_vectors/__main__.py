"""Run the real TRL on given log-probabilities and store what its losses, gradients and metrics are.

    python -m scripts.trl_vectors --out tests/golden/vectors

Needs torch and trl (the `test` extra on Python 3.11), which only this folder and tests import. No model and no tokenizer take part: a stub
stands in for the model and returns the log-probabilities, everything after that is TRL's own code. tests/golden/test_trl_losses.py,
test_trl_policy_losses.py and test_trl_distillation_losses.py compare with the files, without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np

from scripts.trl_vectors import distillation, offline, online
from scripts.trl_vectors.batches import make_batches


def in_float64() -> contextlib.ExitStack:
    """TRL takes some losses in float32 whatever it is given; within, what it calls float32 is float64, and rounding is no difference."""
    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(torch, "float32", torch.float64))
    stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
    return stack


def rounded(array: np.ndarray) -> list:
    """To ten digits; the bar is 1e-6."""
    return np.vectorize(lambda x: float(f"{x:.10g}"), otypes=[float])(array).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden/vectors"))
    parser.add_argument("--only", nargs="*", default=(), help="some of the files, by their names behind trl_losses_")
    args = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import trl

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args.out.mkdir(parents=True, exist_ok=True)
    batches = make_batches()
    flat = {f"{name}/{key}": value for name, arrays in batches.items() for key, value in arrays.items()}
    np.savez_compressed(args.out / "trl_batches.npz", **flat)
    for name, (run, cases) in {**offline.TRAINERS, **online.TRAINERS, **distillation.TRAINERS}.items():
        if args.only and name not in args.only:
            continue
        found = []
        for case, changes in cases.items():
            for batch, arrays in batches.items():
                with in_float64():
                    loss, variable, metrics = run(arrays, changes)
                    if variable.grad is None:  # a trainer that steps by itself has gone back already
                        loss.backward()
                record = {"case": case, "batch": batch, "settings": changes, "loss": loss.item(), "metrics": metrics}
                found.append(record | {"gradient": rounded(variable.grad.numpy())})
        path = args.out / f"trl_losses_{name}.json"
        path.write_text(json.dumps({"trl": trl.__version__, "cases": found}) + "\n")
        print(f"{path}: {len(found)} cases of TRL {trl.__version__}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
