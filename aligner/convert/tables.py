"""Which Hugging Face tensors a parameter tree consists of: one table per model that serves import, export and old Flax checkpoints.

The generic rule: our tree is Hugging Face's module tree, so `model/norm/scale` is `model.norm.weight`. The name of a leaf tells the rest:

    kernel             `.weight`, last two axes first and swapped: [in, out] <-> [out, in], [h, w, in, out] <-> [out, in, h, w]
    scale, embedding   `.weight`, copied
    any other          the same name, copied

Layers that are stacked on leading axes are `Conversion.stacks`: tree prefix -> Hugging Face prefix with one `{...}` per stacked axis, the
outermost first: {"model/layers": "model.layers.{i}", "model/layers/mlp/experts": "model.layers.{i}.mlp.experts.{e}"}. The longest prefix
wins.

Where the layers of a stack are not numbered one after another, the pattern lists them: "model.layers.{i:0 1 3}".

What the rule does not cover is a row of `Conversion.exceptions`, (Hugging Face name pattern, tree path, operation):

    ("h.{i}.ln.weight", "layers/ln/scale", "copy")
    ("h.{i}.mlp.weight", "layers/mlp/kernel", "transpose")   also "conv": the kernel rule above
    ("h.{i}.qkv.weight", ("layers/q/kernel", "layers/k/kernel", "layers/v/kernel"), ("split", "transpose", 0))

The last is one tensor on disk that holds several leaves, one after another along the given axis of the tensor on disk. A fourth item
says that the axis is a row of so many blocks, such as heads, each of which holds its share of every leaf:
("split", "transpose", 0, 12). Every row becomes an `Entry`, from which both directions follow.

A stack's prefix without `{...}` just names a module otherwise: {"model/embed_tokens": "transformer.wte"}.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from aligner.trees import flatten
from aligner.types import Conversion

Slices = tuple[slice, ...]
TILE = (256, 256)  # of a matrix that is turned: what lies in the second level of a CPU's cache
PIECE = 1 << 21  # values that one thread reads or writes at a time


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of our tree and the Hugging Face tensors that it is made of.

    Attributes:
        path: tree path of the leaf, "model/layers/mlp/up_proj/kernel".
        shape: shape of the leaf: stacked axes, then the core.
        names: Hugging Face names, an object array over the stacked axes (shape () where nothing is stacked).
        perm: the core is the Hugging Face tensor (or its part) transposed by this.
        full: shape of each Hugging Face tensor.
        part: (axis, start, stop) of the Hugging Face tensor that this leaf takes; None is all of it.
        blocks: the axis of `part` is so many blocks, and the leaf takes its share of each; start and stop are of one block.
    """

    path: str
    shape: tuple[int, ...]
    names: np.ndarray
    perm: tuple[int, ...]
    full: tuple[int, ...]
    part: tuple[int, int, int] | None = None
    blocks: int = 1

    def source(self, core: Slices) -> Slices:
        """Where in the Hugging Face tensor the slices `core` of our core axes lie; the axis of several blocks is taken whole."""
        index = [slice(None)] * len(core)
        for ours, theirs in enumerate(self.perm):
            index[theirs] = slice(*core[ours].indices(self.shape[self.names.ndim + ours]))
        if self.part:
            axis, start, _ = self.part
            whole = slice(0, self.full[axis])
            index[axis] = whole if self.blocks > 1 else slice(start + index[axis].start, start + index[axis].stop)
        return tuple(index)

    def core(self, tensor: np.ndarray, core: Slices) -> np.ndarray:
        """What was read from `source(core)` -> our core[core]."""
        if self.blocks > 1:
            axis, start, stop = self.part
            shape = tensor.shape
            blocks = tensor.reshape(*shape[:axis], self.blocks, -1, *shape[axis + 1 :])
            tensor = blocks[(slice(None),) * (axis + 1) + (slice(start, stop),)].reshape(*shape[:axis], -1, *shape[axis + 1 :])
            ours = self.perm.index(axis)
            tensor = tensor[(slice(None),) * axis + (core[ours],)]
        return tensor.transpose(self.perm)

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Pairs of (index on the stacked axes, Hugging Face name)."""
        for index in np.ndindex(self.names.shape):
            yield index, self.names[index]


def table(conversion: Conversion, params: Mapping[str, Any]) -> list[Entry]:
    """Every leaf of a parameter tree with the Hugging Face tensors that it is made of.

    Args:
        conversion: how the family's tree and names differ.
        params: the tree; only shapes are read (`jax.eval_shape(model.init, key)`).

    Returns:
        One Entry per leaf. No two leaves claim the same piece, and every tensor is covered whole.

    Raises:
        ValueError: the conversion contradicts the tree (a mistake in a model, not in the input).
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    entries = {}
    for pattern, paths, operation in conversion.exceptions:
        paths = (paths,) if isinstance(paths, str) else tuple(paths)
        if not any(path in leaves for path in paths):
            continue  # a leaf that this config leaves out, such as a bias
        for entry in _exception(pattern, {path: leaves[path] for path in paths}, operation):
            entries[entry.path] = entry
    for path, shape in leaves.items():
        if path not in entries:
            entries[path] = _generic(conversion.stacks, path, shape)
    _check_cover(entries.values())
    return [entries[path] for path in leaves]


def read_leaf(entry: Entry, index: Slices, read: Callable[[str, Slices], np.ndarray], dtype: Any, map: Callable = map) -> np.ndarray:
    """A slice of a leaf, read from Hugging Face tensors.

    Args:
        entry: the leaf.
        index: one slice per axis of the leaf.
        read: (Hugging Face name, slices of that tensor) -> array.
        dtype: dtype of the result.
        map: how the pieces of its tensors are gone through; a thread pool's reads them side by side.

    Returns:
        Array of shape `leaf[index].shape` in `dtype`. Only what the slice needs is read, one piece of a tensor at a time.
    """
    index = tuple(slice(*s.indices(n)) for s, n in zip(index, entry.shape, strict=True))
    stacked, core = index[: entry.names.ndim], index[entry.names.ndim :]
    names = entry.names[(*stacked, ...)]
    out = aligned([s.stop - s.start for s in index], dtype)

    def fill(job):
        position, piece = job
        theirs = tuple(slice(whole.start + s.start, whole.start + s.stop) for whole, s in zip(core, piece, strict=True))
        copy_into(out[(*position, *piece, ...)], entry.core(read(names[position], entry.source(theirs)), theirs))

    for _ in map(fill, itertools.product(np.ndindex(names.shape), _pieces(entry, out.shape[names.ndim :]))):
        pass
    return out


def _pieces(entry: Entry, shape: tuple[int, ...]) -> list[Slices]:
    """Slices that together are a core of this shape, each of them rows of the tensor on disk; all at once where its axis is of blocks."""
    whole = tuple(slice(0, n) for n in shape)
    if not shape or entry.blocks > 1:
        return [whole]
    axis = entry.perm.index(0)
    return [(*whole[:axis], rows, *whole[axis + 1 :]) for rows in row_slices(shape[axis], math.prod(shape))]


def row_slices(rows: int, size: int) -> list[slice]:
    """An array's rows in runs of about PIECE values, and of no fewer rows than a tile has."""
    step = max(PIECE * rows // max(size, 1) // TILE[0], 1) * TILE[0]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An array for a device: where that is a CPU, memory that begins at a multiple of 64 bytes becomes its own without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_into(out: np.ndarray, tensor: np.ndarray) -> None:
    """`out[...] = tensor`, cast. A matrix that lies transposed goes through tiles that stay in the cache, cast as they are fetched and then
    turned: NumPy, left to itself, fetches every line of one side once an element."""
    if tensor.ndim != 2 or tensor.strides[0] >= tensor.strides[1]:
        out[...] = tensor
        return
    rows, columns = TILE
    # rows a line longer than a power of two: else those of a tile share a few places of the cache
    scratch = np.empty((rows, columns + 64 // out.itemsize), out.dtype)
    bits = f"u{out.itemsize}"  # which NumPy moves faster than bfloat16
    for row in range(0, tensor.shape[1], rows):
        for column in range(0, tensor.shape[0], columns):
            part = (slice(column, column + columns), slice(row, row + rows))
            lying = tensor[part].T
            tile = scratch[: lying.shape[0], : lying.shape[1]]
            tile[...] = lying
            out[part].view(bits)[...] = tile.view(bits).T


def by_tensor(entries: list[Entry]) -> dict[str, list[tuple[Entry, tuple[int, ...]]]]:
    """Hugging Face name -> its parts in order, each (entry, index on the stacked axes); names in the order of a model: layer by layer."""
    tensors: dict[str, list] = {}
    for entry in entries:
        for index, name in entry.tensors():
            tensors.setdefault(name, []).append((entry, index))
    for parts in tensors.values():
        parts.sort(key=lambda part: part[0].part or (0, 0, 0))
    return dict(sorted(tensors.items(), key=lambda item: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", item[0])]))


def write_tensor(parts: list[tuple[Entry, tuple[int, ...]]], leaf: Callable[[str, tuple[int, ...]], np.ndarray]) -> np.ndarray:
    """One Hugging Face tensor from the leaves that it holds: the inverse of `read_leaf`.

    Args:
        parts: an item of `by_tensor`.
        leaf: (tree path, index on the stacked axes) -> the core of that leaf.

    Returns:
        The tensor in the leaves' dtype, as laid out on disk.
    """
    pieces = [leaf(entry.path, index).transpose(np.argsort(entry.perm)) for entry, index in parts]
    first = parts[0][0]
    if len(pieces) == 1:
        [piece] = pieces
        if piece.flags.c_contiguous:
            return piece
        out = np.empty(piece.shape, piece.dtype)
        copy_into(out, piece)
        return out
    out, axis = np.empty(first.full, pieces[0].dtype), first.part[0]
    by_block = lambda x: np.moveaxis(x.reshape(*x.shape[:axis], first.blocks, -1, *x.shape[axis + 1 :]), axis, 0)
    for piece, (entry, _) in zip(pieces, parts, strict=True):
        part = (slice(None),) * axis + (slice(*entry.part[1:]),)
        for theirs, ours in zip(by_block(out), by_block(piece), strict=True):
            copy_into(theirs[part], ours)
    return out


def kernel_perm(ndim: int) -> tuple[int, ...]:
    """Hugging Face's [out, in, ...] -> our [..., in, out]."""
    return (*range(2, ndim), 1, 0)


def _generic(stacks: Mapping[str, str], path: str, shape: tuple[int, ...]) -> Entry:
    prefix = max((p for p in stacks if path.startswith(p + "/")), key=len, default="")
    head = stacks[prefix] + "." if prefix else ""
    *modules, leaf = path[len(prefix) + 1 if prefix else 0 :].split("/")
    name = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return _entry(head + ".".join([*modules, name]), path, shape, "transpose" if leaf == "kernel" else "copy")


def _exception(pattern: str, leaves: Mapping[str, tuple[int, ...]], operation: Any) -> list[Entry]:
    if isinstance(operation, str):
        [(path, shape)] = leaves.items()
        return [_entry(pattern, path, shape, operation)]
    kind, operation, axis, *blocks = operation
    blocks = blocks[0] if blocks else 1
    if kind != "split":
        raise ValueError(f"{pattern}: unknown operation {kind!r}")
    whole = [_entry(pattern, path, shape, operation) for path, shape in leaves.items()]
    total, entries = sum(entry.full[axis] for entry in whole), []
    sizes = [entry.full[axis] // blocks for entry in whole]
    for start, size, entry in zip(np.cumsum([0] + sizes).tolist(), sizes, whole, strict=False):
        full = (*entry.full[:axis], total, *entry.full[axis + 1 :])
        entries.append(dataclasses.replace(entry, full=full, part=(axis, start, start + size), blocks=blocks))
    return entries


def _entry(pattern: str, path: str, shape: tuple[int, ...], operation: str) -> Entry:
    if operation not in ("copy", "transpose", "conv"):
        raise ValueError(f"{pattern}: unknown operation {operation!r}")
    keys = re.findall(r"\{(\w+)(?::[^}]*)?\}", pattern)
    stacked, core = shape[: len(keys)], shape[len(keys) :]
    perm = tuple(range(len(core))) if operation == "copy" else kernel_perm(len(core))
    names = np.empty(stacked, object)
    for index in np.ndindex(stacked):
        names[index] = pattern.format(**dict(zip(keys, map(Number, index), strict=True)))
    return Entry(path, shape, names, perm, tuple(core[ours] for ours in np.argsort(perm)))


class Number(int):
    """A place in a stack. `{i:0 2 5}` writes the number on disk that is in that place of the list."""

    def __format__(self, numbers: str) -> str:
        return numbers.split()[self] if numbers else str(int(self))


def _check_cover(entries) -> None:
    claimed: dict[str, list[Entry]] = {}
    for entry in entries:
        for _, name in entry.tensors():
            claimed.setdefault(name, []).append(entry)
    for name, claims in claimed.items():
        if len({entry.full for entry in claims}) > 1:
            raise ValueError(f"{name}: leaves disagree about its shape: {sorted((entry.path, entry.full) for entry in claims)}")
        covered = sum(e.blocks * (e.part[2] - e.part[1]) / e.full[e.part[0]] if e.part else 1 for e in claims)
        if not math.isclose(covered, 1):
            raise ValueError(f"{name}: its pieces are not each held by one leaf: {sorted(entry.path for entry in claims)}")
