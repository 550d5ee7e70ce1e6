"""Weights on disk: a folder of safetensors (or an old flax_model.msgpack) as names, shapes, dtypes and slices that are read on demand."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from aligner.convert.tables import Slices, kernel_perm
from aligner.trees import flatten
from aligner.types import UserError

# Written into every file's metadata beside {"format": "pt"}, so that an export may be overwritten and nothing else.
PRODUCER = "aligner"

_DTYPES = {"BF16": "bfloat16", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPES |= {f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
_DTYPES |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}
_LETTERS = {name: letters for letters, name in _DTYPES.items()}
_THREADS = min(8, os.cpu_count() or 1)  # that make a file's parts while one writes


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a header says of one tensor. `array` is set where a format gives no other way than reading the whole file."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name, or safetensors' where NumPy has none
    file: Path
    offset: int = 0  # bytes of the file before it
    array: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors under the names they have on disk; Hugging Face names and layout, also for a msgpack source.

    Attributes:
        folder: where it is.
        tensors: name -> what its header says. Only headers have been read.
        kind: "safetensors" or "flax msgpack".
    """

    folder: Path
    tensors: Mapping[str, Stored]
    kind: str = "safetensors"

    def read(self, name: str, index: Slices = ()) -> np.ndarray:
        """A slice of a tensor, in the dtype on disk. It is the file itself, mapped, to be read where it is looked at and let go soon.

        Args:
            name: name on disk.
            index: slices of the first axes; () is all.

        Raises:
            UserError: the file cannot be read any more.
        """
        stored = self.tensors[name]
        if stored.array is not None:
            return stored.array[index]
        if not stored.nbytes:
            return np.empty(stored.shape, stored.dtype)[index]
        try:  # mapped anew each time (30 microseconds): the pages are given back with it, and threads share nothing
            return np.memmap(stored.file, stored.dtype, "r", stored.offset, stored.shape).view(np.ndarray)[index]
        except (OSError, ValueError, TypeError) as error:  # ValueError: shorter than it was; TypeError: a dtype that NumPy has not
            raise UserError(f"{stored.file}: {name} cannot be read ({first_line(error)}); fetch the file again.") from error

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({stored.file for stored in self.tensors.values()})


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the headers of a folder's weights; no tensor of safetensors is read (an old msgpack is read whole).

    Args:
        folder: holds model.safetensors, or shards of it with or without their index, or flax_model.msgpack (also sharded).

    Raises:
        UserError: no such weights, a shard is missing, or a file is corrupt or cut short. The sentence names the file.
    """
    folder = Path(folder)
    for stem, suffix, kind, headers in (
        ("model", "safetensors", "safetensors", _safetensors_headers),
        ("flax_model", "msgpack", "flax msgpack", _msgpack_headers),
    ):
        if files := _weight_files(folder, stem, suffix):
            tensors: dict[str, Stored] = {}
            for file, expected in files.items():
                found = headers(file)
                if absent := sorted(set(expected) - set(found)):
                    raise UserError(f"{file} lacks {absent[0]}{_more(absent)}, which the index places there; fetch both again.")
                if twice := sorted(set(found) & set(tensors)):
                    raise UserError(f"{file} and {tensors[twice[0]].file} both hold {twice[0]}; remove the stale shards.")
                tensors |= found
            return Checkpoint(folder, tensors, kind)
    pickled = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickled:
        raise UserError(
            f"{folder} holds only pickled weights ({pickled[0]}{_more(pickled)}), which can run code when read; load it with transformers "
            "and PyTorch once and write it with save_pretrained, as safetensors."
        )
    raise UserError(f"{folder} holds no weights: expected model.safetensors, its shards, or an old flax_model.msgpack.")


@dataclasses.dataclass(frozen=True)
class Later:
    """A tensor that is made while it is written, by several threads, and of which never more than a few parts are there.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        parts: called when its turn has come; functions of which each makes the next rows, C-contiguous and in `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], list[Callable[[], np.ndarray]]]

    def copy(self) -> np.ndarray:
        """The tensor as an array."""
        return np.concatenate([make().reshape(-1) for make in self.parts()]).reshape(self.shape)


def write_shards(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray | Later]], sizes: Mapping[str, int], max_shard_size: int | str
) -> None:
    """Write tensors as safetensors, with an index when they need more than one file.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) pairs, in the order of `sizes`; consumed a file at a time.
        sizes: name -> bytes.
        max_shard_size: most bytes of a file, a number or such as "5GB"; a larger tensor gets a file of its own.
    """
    shards = _split(sizes, max_shard_size)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(next(tensors) for _ in names)
        write(shard, folder / file, {"format": "pt", "producer": PRODUCER})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write(tensors: Mapping[str, np.ndarray | Later], file: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file, read by whom its folder is read."""
    save_file(dict(tensors), file, metadata=dict(metadata))
    with contextlib.suppress(OSError):  # of a mounted bucket, which may know no modes
        file.chmod(file.parent.stat().st_mode & 0o666)


def save_file(tensors: Mapping[str, np.ndarray | Later], file: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file, from front to back: what the format's own library writes, which wants all tensors in memory at once.

    Tensors lie in their order, those of wider dtypes first, so that each begins at a multiple of its dtype's size.

    Raises:
        OSError: what the system refused, with the file's name.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in order:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _LETTERS[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with file.open("wb") as out, ThreadPoolExecutor(_THREADS) as pool:
            out.write(len(text).to_bytes(8, "little") + text)
            ahead = collections.deque()
            for make in (make for name in order for make in _parts(tensors[name])):
                ahead.append(pool.submit(make))
                if len(ahead) > _THREADS:
                    out.write(_bytes(ahead.popleft().result()))
            for part in ahead:
                out.write(_bytes(part.result()))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def _parts(tensor: np.ndarray | Later) -> list[Callable[[], np.ndarray]]:
    return tensor.parts() if isinstance(tensor, Later) else [lambda: np.asarray(tensor, order="C")]


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def is_export(folder: Path) -> bool:
    """Whether every weight file in a folder was written by `write_shards`."""
    files = list(folder.glob("*.safetensors"))
    try:
        return bool(files) and all(_producer(file) == PRODUCER for file in files)
    except UserError:
        return False


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that tells checkpoints apart in seconds: names, shapes, dtypes, file sizes, and a sample of every tensor's values.

    A sample is the whole of a small tensor, else eight evenly spaced rows, the first and the last among them, cut to 1024 values
    each. A change of a few single values can escape it; training or merging does not.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for file in checkpoint.files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    for name, stored in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
        source = checkpoint.read(name)
        for index in _samples(stored):
            digest.update(source[index].tobytes())
    return digest.hexdigest()


def _samples(stored: Stored) -> list[Any]:
    if not stored.shape or np.prod(stored.shape) <= 8192:
        return [...]
    if len(stored.shape) == 1:
        return [slice(start, start + 1024) for start in np.linspace(0, stored.shape[0] - 1024, 8).astype(int).tolist()]
    rows = sorted(set(np.linspace(0, stored.shape[0] - 1, 8).astype(int).tolist()))
    return [(slice(row, row + 1), slice(0, min(1024, stored.shape[1]))) for row in rows]


def _weight_files(folder: Path, stem: str, suffix: str) -> dict[Path, list[str]]:
    """File -> tensors that the index places there; {} where the folder has no weights of this kind."""
    if (whole := folder / f"{stem}.{suffix}").is_file():
        return {whole: []}
    index, files = folder / f"{stem}.{suffix}.index.json", {}
    if index.is_file():
        try:
            for name, file in json.loads(index.read_text())["weight_map"].items():
                files.setdefault(folder / file, []).append(name if suffix == "safetensors" else _hf_name(name)[0])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is no valid index of weights; fetch it again, or remove it to use the shards as they are.") from None
        why = f"which {index.name} names"
    else:
        shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
        totals = {int(match[1]) for path in shards if (match := re.search(rf"-of-(\d+)\.{suffix}$", path.name))}
        if not totals:
            return {}
        if len(totals) > 1:
            raise UserError(f"{folder} holds shards of several checkpoints ({shards[0].name}, {shards[-1].name}); keep those of one.")
        [total] = totals
        files = {folder / f"{stem}-{number:05d}-of-{total:05d}.{suffix}": [] for number in range(1, total + 1)}
        why = f"one of {total} shards"
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{absent[0]}{_more(absent)} is missing, {why}; fetch it again.")
    return files


def _safetensors_headers(path: Path) -> dict[str, Stored]:
    with _opened(path), path.open("rb") as file:  # what is opened has been checked: the header, and that the file holds what it says
        size = int.from_bytes(file.read(8), "little")
        headers = json.loads(file.read(size))
    headers.pop("__metadata__", None)
    return {
        name: Stored(tuple(header["shape"]), _DTYPES.get(header["dtype"], header["dtype"]), path, 8 + size + header["data_offsets"][0])
        for name, header in headers.items()
    }


def _msgpack_headers(path: Path) -> dict[str, Stored]:
    from flax.serialization import msgpack_restore

    try:
        leaves = flatten(msgpack_restore(path.read_bytes()))
        tensors = {}
        for leaf, array in leaves.items():
            name, is_kernel = _hf_name(leaf.removeprefix("params/"))
            array = np.asarray(array)
            array = array.transpose(np.argsort(kernel_perm(array.ndim))) if is_kernel else array
            tensors[name] = Stored(array.shape, array.dtype.name, path, array=array)
        return tensors
    except Exception as error:  # msgpack raises a dozen kinds, ValueError and its own, on torn input
        raise UserError(f"{path} is corrupt or cut short ({first_line(error)}); fetch it again.") from error


def _hf_name(leaf: str) -> tuple[str, bool]:
    """An old Flax path -> Hugging Face's name, and whether it is a kernel. FlaxLlama's norms are called `weight` already."""
    *modules, last = leaf.split("/")
    return ".".join([*modules, "weight" if last in ("kernel", "scale", "embedding") else last]), last == "kernel"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or cut short ({first_line(error)}); fetch it again.") from error


def _producer(path: Path) -> str | None:
    with _opened(path) as file:
        return (file.metadata() or {}).get("producer")


def _split(sizes: Mapping[str, int], limit: int | str) -> list[list[str]]:
    if isinstance(limit, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", limit.strip(), re.IGNORECASE)
        if not match:
            raise UserError(f"max_shard_size={limit!r} is no size; write it as 5GB or 500MB.")
        limit = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def first_line(error: Exception) -> str:
    """The start of a library's message up to the first line that is more than an opening such as "validation failed:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = next((number for number, line in enumerate(lines, 1) if not line.endswith((":", ","))), len(lines))
    return " ".join(lines[:end])
