"""Named arrays in a file of their own, which is there whole or not at all: what a run keeps beside its checkpoints."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def write(path: Path, **arrays: np.ndarray | str) -> None:
    """Whole or not at all, also when the process is killed meanwhile.

    An .npz file and behind it a checksum of all of it: zip's own is of what it finds, and a flipped bit can hide an array.
    """
    whole = io.BytesIO()
    np.savez(whole, **arrays)
    beside = part(path)
    with beside.open("wb") as file:
        file.write(whole.getbuffer())
        file.write(checksum(whole.getbuffer()))
    os.replace(beside, path)


def read(path: Path) -> dict[str, np.ndarray] | None:
    """What `write` wrote; None where the file is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if checksum(memoryview(data)[:-4]) != data[-4:]:
        return None
    with np.load(io.BytesIO(data)) as stored:
        return dict(stored)


def part(path: Path) -> Path:
    """Where a file is written until it is whole; every process has its own."""
    return path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left half written in a folder."""
    for left in folder.glob(f"*.{os.uname().nodename}.*.part"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OSError):  # another's file, or another user's process
            continue


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Where to write a file that appears at `path` when the block ends; nothing is left where it ends by an error or Ctrl-C."""
    beside = part(Path(path))
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def checksum(data: bytes | memoryview) -> bytes:
    """Four bytes that another content hardly has."""
    return zlib.crc32(data).to_bytes(4, "little")
