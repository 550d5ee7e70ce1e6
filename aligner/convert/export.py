"""Models and parameter trees -> Hugging Face checkpoint folders."""

from __future__ import annotations

import collections
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aligner.convert import disk
from aligner.convert.assets import Assets
from aligner.convert.hf import FLOATS, abstract_params, bar, dtype_name
from aligner.convert.tables import Entry, by_tensor, copy_into, row_slices, table, write_tensor
from aligner.trees import flatten
from aligner.types import Model, Params, UserError


def save(
    model: Model, params: Params, out_dir: str | Path, dtype: Any = None, max_shard_size: int | str = "5GB", progress: bool | None = None
) -> None:
    """Write a Hugging Face checkpoint folder.

    It is written beside `out_dir` and renamed at the end, so that a kill leaves no half folder. Every process of a multi-host run must
    call this; process 0 writes.

    Args:
        model: the model with its `assets`, which are copied byte for byte.
        params: its parameters; any dtype, any sharding.
        out_dir: new or empty, or a former export, which is replaced.
        dtype: dtype of the tensors; None is that of the checkpoint the model came from.
        max_shard_size: most bytes of a file, such as "5GB".
        progress: show a bar; None only on a terminal.

    Raises:
        UserError: `out_dir` holds something else, the parameters are not this model's, the model has no assets, or a value does not
            fit float16.
    """
    out = Path(out_dir).expanduser().absolute()
    if model.assets is None:
        raise UserError(f"cannot write {out}: the model was made from a bare config, so there is no config.json; load it from a folder.")
    if dtype is not None and dtype_name(dtype) not in FLOATS:
        raise UserError(f"cannot write {out} in dtype {dtype!r}; choose one of {', '.join(FLOATS)}.")
    _check_replaceable(out)
    entries = _entries_of(model, params)
    leaves = flatten(params)
    tensors = by_tensor(entries)
    kept = {} if dtype is not None else model.assets.dtypes
    want = {name: np.dtype(dtype_name(dtype or kept.get(name, model.source_dtype))) for name in tensors}
    sizes = {name: int(np.prod(parts[0][0].full)) * want[name].itemsize for name, parts in tensors.items()}

    shown = bar(tensors, "writing", progress)

    def to_host(path: str, index: tuple[int, ...]) -> np.ndarray:
        return _to_host(leaves[path], index)

    def tensor(name: str, parts: list) -> disk.Later | np.ndarray:
        if any(_is_elsewhere(leaves[entry.path]) for entry, _ in parts):  # gathered by all processes, in the same order
            shown.update()
            return _cast(name, write_tensor(parts, to_host), want[name])
        full = parts[0][0].full

        def made() -> list[Callable[[], np.ndarray]]:
            shown.update()
            if len(parts) > 1 or not full:
                return [lambda: _cast(name, write_tensor(parts, to_host), want[name])]
            [(entry, index)] = parts
            piece = to_host(entry.path, index).transpose(np.argsort(entry.perm))
            return [functools.partial(_cast, name, piece[rows], want[name]) for rows in row_slices(full[0], piece.size)]

        return disk.Later(full, want[name], made)

    with shown:
        arrays = ((name, tensor(name, parts)) for name, parts in tensors.items())
        if jax.process_index() == 0:
            _write_folder(out, model, arrays, sizes, dtype, max_shard_size)
        else:
            collections.deque(arrays, maxlen=0)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"aligner.convert.save {out}")


def _entries_of(model: Model, params: Params) -> list[Entry]:
    ours = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params(model)).items()}
    given = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    if ours != given:
        path = min(path for path in {*ours, *given} if ours.get(path) != given.get(path))
        raise UserError(
            f"these parameters are not this {model.family} model's: {path} is {given.get(path, 'absent')}, "
            f"the model has {ours.get(path, 'no such leaf')}; merge adapters first, or use the model that they were loaded with."
        )
    return table(model.conversion, params)


def _is_elsewhere(leaf: Any) -> bool:
    """Whether other processes hold a part of it."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _to_host(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    if isinstance(leaf, jax.Array) and {device.platform for device in leaf.devices()} == {"cpu"} and len(leaf.devices()) == 1:
        leaf = np.asarray(leaf)  # the very memory
    piece = leaf[index] if index else leaf
    if _is_elsewhere(piece):
        return np.asarray(multihost_utils.process_allgather(piece, tiled=True))
    return np.asarray(piece)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in a dtype, C-contiguous."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    cast = np.empty(array.shape, dtype)
    with np.errstate(over="ignore"):
        copy_into(cast, array)
    if dtype == np.float16 and np.isinf(cast).sum() > np.isinf(array).sum():
        raise UserError(f"{name} holds values beyond float16's range (65504); write bfloat16 or float32.")
    return cast


def _check_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() and disk.is_export(out):
        known = {out / file for file in Assets(out).files} | {out / "model.safetensors.index.json"}
        foreign = [p for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors" and p not in known]
        if not foreign:
            return
        raise UserError(f"{out} holds {foreign[0].relative_to(out)} besides a former export and would lose it; choose another folder.")
    raise UserError(f"{out} exists and is no former export; choose another folder or remove it.")


def _write_folder(out: Path, model: Model, arrays: Iterator, sizes: Mapping[str, int], dtype: Any, max_shard_size: int | str) -> None:
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    for left_behind in (partial, old):
        shutil.rmtree(left_behind, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.assets.copy_to(partial)
        if dtype is not None and dtype_name(dtype) != model.source_dtype:
            config = _with_dtype(model.assets.config_dict, dtype_name(dtype))
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        disk.write_shards(partial, arrays, sizes, max_shard_size)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose every dtype says `dtype`, also in its parts; `torch_dtype`, which all releases read, where it says none."""

    def changed(part):
        return {
            key: dtype if key in ("dtype", "torch_dtype") and value is not None else changed(value) if isinstance(value, dict) else value
            for key, value in part.items()
        }

    result = changed(config)
    return result if result.get("dtype") or result.get("torch_dtype") else {**result, "torch_dtype": dtype}
