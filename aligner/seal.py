"""Checksums of a checkpoint's files, so that a torn or flipped one is known before anything reads it.

They stand in WORKDIR/checksums/<step>.json, written as soon as a save is complete. A checkpoint without them was killed between the
two: what reads it then has to notice by itself, and several processes, which would wait for each other, use an older one that has them.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

FOLDER = "checksums"


def _path(checkpoint: Path) -> Path:
    return checkpoint.parent.parent / FOLDER / f"{checkpoint.name}.json"


def _crc32(path: Path) -> int:
    crc, block = 0, bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:size], crc)
    return crc


def write(checkpoint: Path) -> None:
    """Note size and CRC-32 of every file; forget those of checkpoints that are gone."""
    folder = _path(checkpoint).parent
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json"):
        if not (checkpoint.parent / old.stem).exists():
            old.unlink(missing_ok=True)
    try:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        sums = {str(path.relative_to(checkpoint)): [path.stat().st_size, _crc32(path)] for path in files}
    except FileNotFoundError:  # a newer save has pushed it out meanwhile
        return
    beside = folder / f".{checkpoint.name}.tmp"
    beside.write_text(json.dumps(sums))
    os.replace(beside, _path(checkpoint))


def exists(checkpoint: Path) -> bool:
    """Whether anything was noted."""
    return _path(checkpoint).exists()


def check(checkpoint: Path) -> bool:
    """Compare the files with what was noted. Returns whether anything was.

    Raises:
        ValueError: a file is missing or holds something else.
    """
    if not exists(checkpoint):
        return False
    try:
        noted = json.loads(_path(checkpoint).read_text())
    except ValueError:  # the note is torn, which says nothing of the checkpoint
        return False
    for name, (size, crc) in noted.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if _crc32(path) != crc:
            raise ValueError(f"{name} has changed since it was written")
    return True


def remove(checkpoint: Path) -> None:
    """Forget what was noted, before the checkpoint is set aside or written again."""
    _path(checkpoint).unlink(missing_ok=True)


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint that cannot be read out of the way, to WORKDIR/torn-checkpoint-<step>."""
    aside = checkpoint.parent.parent / f"torn-checkpoint-{checkpoint.name}"
    remove(checkpoint)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)
