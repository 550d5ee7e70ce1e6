"""Proof that a checkpoint survives: read it, write it again, compare every tensor byte for byte."""

from __future__ import annotations

import dataclasses
import filecmp
import tempfile
from pathlib import Path

import numpy as np

from aligner.convert import disk, export, hf
from aligner.convert.disk import Checkpoint
from aligner.types import Model


@dataclasses.dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        tensors: number of tensors compared.
        nbytes: their bytes.
        dtype: dtype of most of them.
        kind: "safetensors" or "flax msgpack".
        renamed: how many have another name in the layout that we write.
        tied: stored heads that equal the embedding; not written again.
        ignored: buffers that carry no parameter; not written again.
        companions: number of other files compared.
        different: what differs, tensors and files.
    """

    tensors: int
    nbytes: int
    dtype: str
    kind: str
    renamed: int
    tied: tuple[str, ...]
    ignored: tuple[str, ...]
    companions: int
    different: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors, {self.nbytes:,} bytes, {self.dtype}, {self.kind}"]
        lines.append(f"names: {self.renamed} of another layout, renamed" if self.renamed else "names: the layout that aligner writes")
        lines += [f"tied to the embedding, not written again: {name}" for name in self.tied]
        if self.ignored:
            lines.append(f"buffers that carry no parameter, not written again: {len(self.ignored)}, such as {self.ignored[0]}")
        return "\n".join(lines)


def verify(folder: str | Path, dry_run: bool = False, scratch: str | Path | None = None, progress: bool | None = None) -> Report:
    """Check a checkpoint folder.

    Args:
        folder: local folder or Hub id.
        dry_run: check names, shapes and dtypes by the headers alone.
        scratch: where the copy is written meanwhile; it needs as much room as the weights. None is the system's temporary folder.
        progress: show bars; None only on a terminal.

    Returns:
        The report; `different` is empty when everything is equal.

    Raises:
        UserError: the folder cannot be read as a checkpoint, or its tensors do not fit its config.
    """
    model, checkpoint = hf.open_model(folder)
    if dry_run:
        return _report(model, checkpoint, ())
    params = hf.load_params(model, checkpoint, dtype=None, progress=progress)
    with tempfile.TemporaryDirectory(prefix="aligner-verify-", dir=scratch) as temporary:
        copy = Path(temporary) / "copy"
        export.save(model, params, copy, progress=progress)
        written = disk.open_checkpoint(copy)
        names = hf.bar(sorted(checkpoint.tensors), "comparing", progress)
        different = [name for name in names if _differs(model, checkpoint, written, name)]
        expected = {hf.canonical_name(model.conversion, name) for name in checkpoint.tensors} | {o for _, o in model.conversion.tied}
        different += [name for name in written.tensors if name not in expected]
        different += [str(file) for file in model.assets.files if not filecmp.cmp(model.assets.folder / file, copy / file, shallow=False)]
    return _report(model, checkpoint, tuple(different))


def _differs(model: Model, checkpoint: Checkpoint, written: Checkpoint, name: str) -> bool:
    if hf.is_ignored(model.conversion, name):
        return False
    canonical = hf.canonical_name(model.conversion, name)
    canonical = dict(model.conversion.tied).get(canonical, canonical)
    if canonical not in written.tensors:
        return True
    ours, theirs = written.read(canonical), checkpoint.read(name)
    return ours.dtype != theirs.dtype or ours.shape != theirs.shape or not np.array_equal(_raw(ours), _raw(theirs))


def _raw(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, order="C").reshape(-1).view(np.uint8)


def _report(model: Model, checkpoint: Checkpoint, different: tuple[str, ...]) -> Report:
    names = {name: hf.canonical_name(model.conversion, name) for name in sorted(checkpoint.tensors)}
    ignored = tuple(name for name in names if hf.is_ignored(model.conversion, name))
    heads = dict(model.conversion.tied)
    tied = tuple(name for name, canonical in names.items() if canonical in heads)
    kept = [name for name in names if name not in ignored]
    return Report(
        tensors=len(kept),
        nbytes=sum(checkpoint.tensors[name].nbytes for name in kept),
        dtype=model.source_dtype,
        kind=checkpoint.kind,
        renamed=sum(name != names[name] for name in kept),
        tied=tied,
        ignored=ignored,
        companions=len(model.assets.files),
        different=different,
    )
