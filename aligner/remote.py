"""A workdir in a bucket, `--workdir gs://bucket/runs/dpo`: a run writes a folder on this machine; what is complete in it is copied there.

Anything that fsspec reaches will do (gs:// with gcsfs, s3:// with s3fs, hf://, file://). A run that starts where the folder is missing or
older, such as on another machine after a preemption, first fetches it. What a kill can lose is what was saved since the last copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligner import checkpoint, seal
from aligner.types import UserError

EVERY = 5.0  # seconds between looks at what is new
log = logging.getLogger(__name__)


def is_remote(workdir: str | Path) -> bool:
    return "://" in str(workdir)


@contextlib.contextmanager
def local(workdir: str) -> Iterator[str]:
    """The folder on this machine that stands for a workdir: itself, or the copy of a remote one, which is kept up with until the end.

    Raises:
        UserError: no such file system, or it cannot be read, or in the end not written.
    """
    if not is_remote(workdir):
        yield workdir
        return
    import jax

    if jax.process_count() > 1:
        raise UserError(f"--workdir {workdir} serves one process; several need a folder that all of them see, such as the bucket mounted")
    folder = folder_of(workdir)
    try:
        fs, root = _open(workdir)
        sent: dict[str, Any] = dict.fromkeys(pull(fs, root, folder))
    except Exception as error:  # each file system has its own
        raise UserError(f"--workdir {workdir} cannot be read: {checkpoint.first_line(error)}") from error
    left = threading.Event()

    def keep_up() -> None:
        while not left.wait(EVERY):
            if new_checkpoint(folder, sent):
                try:
                    push(folder, fs, root, sent)
                except Exception as error:
                    log.warning("%s could not be written (%s); trying again", workdir, checkpoint.first_line(error))

    thread = threading.Thread(target=keep_up, name="copy to the workdir", daemon=True)
    thread.start()
    try:
        yield str(folder)
    finally:
        left.set()
        thread.join()
        try:
            push(folder, fs, root, sent)
        except Exception as error:
            reason = checkpoint.first_line(error)
            raise UserError(f"--workdir {workdir} could not be written ({reason}); all of it is in {folder}") from error


def folder_of(workdir: str) -> Path:
    """Where the copy of a remote workdir lies on this machine."""
    name = hashlib.sha256(workdir.rstrip("/").encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "aligner" / "workdirs" / f"{workdir.rstrip('/').rpartition('/')[2]}-{name}"


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url, **{"auto_mkdir": True} if url.startswith("file://") else {})  # only a disk has folders to be made
    return fs, root.rstrip("/")


def sealed(folder: Path) -> list[int]:
    """Steps whose checkpoints are whole."""
    return [step for step in checkpoint.steps(folder) if (folder / seal.FOLDER / f"{step}.json").exists()]


def new_checkpoint(folder: Path, sent: dict[str, Any]) -> bool:
    return any(sent.get(f"{seal.FOLDER}/{step}.json") is None for step in sealed(folder))


def push(folder: Path, fs: Any, root: str, sent: dict[str, Any]) -> None:
    """Copy what is new; at any moment the newest whole checkpoint there has all that belongs to it.

    Args:
        folder: here.
        fs, root: there.
        sent: file that is there -> its size and time here when it was copied, None where an earlier run did that; brought up to date.
    """
    steps = sealed(folder)

    def put(*files: Path) -> None:
        for path in files:
            name, stamp = path.relative_to(folder).as_posix(), (path.stat().st_size, path.stat().st_mtime_ns)
            if sent.get(name) != stamp:
                fs.put_file(str(path), f"{root}/{name}")
                sent[name] = stamp

    inside = (f"{checkpoint.FOLDER}/", f"{seal.FOLDER}/")
    apart = lambda path: path.relative_to(folder).as_posix().startswith((*inside, "torn-checkpoint-")) or path.suffix in (".tmp", ".part")
    put(*sorted(path for path in folder.rglob("*") if path.is_file() and not apart(path)))
    for step in steps:
        with contextlib.suppress(FileNotFoundError):  # a newer one has pushed it out meanwhile
            put(*sorted(filter(Path.is_file, (folder / checkpoint.FOLDER / str(step)).rglob("*"))))
            put(folder / seal.FOLDER / f"{step}.json")
    for name in [name for name in sorted(sent, reverse=True) if name.startswith(inside) and not (folder / name).exists()]:
        fs.rm_file(f"{root}/{name}")  # checksums first
        del sent[name]


def pull(fs: Any, root: str, folder: Path) -> list[str]:
    """Fetch a run, unless the folder here holds a checkpoint as new. Returns the names of all files there."""
    names = [name.removeprefix(root).lstrip("/") for name in fs.find(root)] if fs.exists(root) else []
    whole = {int(name.split("/")[1].removesuffix(".json")) for name in names if name.startswith(f"{seal.FOLDER}/")}
    if not names and checkpoint.steps(folder):
        log.warning("there is no run any more where the workdir is; it goes on from the copy in %s: remove that to start anew", folder)
    if not names or (folder.exists() and max(whole, default=0) <= max(checkpoint.steps(folder), default=0)):
        return names
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    for name in names:
        first, _, rest = name.partition("/")
        if first != checkpoint.FOLDER or int(rest.split("/")[0]) in whole:
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{name}", str(beside / name))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return names
