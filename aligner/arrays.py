"""Named arrays in a file of their own, which is there whole or not at all: what a run keeps beside its checkpoints."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np


def write(path: Path, **arrays: np.ndarray | str) -> None:
    """Whole or not at all, also when the process is killed meanwhile."""
    beside = part(path)
    with beside.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(beside, path)


def read(path: Path) -> dict[str, np.ndarray] | None:
    """What `write` wrote; None where the file is missing or damaged."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return None


def part(path: Path) -> Path:
    """Where a file is written until it is whole; every process has its own."""
    return path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.part")
