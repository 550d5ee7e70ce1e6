"""Where rows come from: `open_rows` gives random access to a local file, a folder, or a Hub dataset, without reading it all."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import itertools
import json
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aligner.types import UserError

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
SAMPLE_BY = ("line", "paragraph", "document")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to the rows of a dataset.

    Attributes:
        read: row number -> dict.
        size: number of rows.
        folder: images named in the rows are looked up here.
        description: what was opened, for people.
        identity: changes when the content does (sizes and times of files, or the fingerprint that `datasets` keeps).
    """

    read: Callable[[int], dict[str, Any]]
    size: int
    folder: Path
    description: str
    identity: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        return self.read(index)

    def columns(self, look: int = 20) -> list[str]:
        """Column names of the first rows, in the order they are met."""
        return list(dict.fromkeys(name for i in range(min(look, self.size)) for name in self[i]))


def open_rows(source: Any, name: str = "data.train") -> Rows:
    """Open one dataset.

    Args:
        source: a config section with `path`, `split`, `subset`, `image_folder`, `sample_by`, `size` (configs/common.py).
        name: what errors call the section.

    Returns:
        Its rows, cut to `source.size`.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if not source.path:
        raise UserError(f"config.{name}.path is empty; give a .json, .jsonl, .parquet or .txt file, a folder of them, or a Hub dataset id.")
    sample_by = source.get("sample_by", "paragraph")
    if sample_by not in SAMPLE_BY:
        raise UserError(f"config.{name}.sample_by is {sample_by!r}; it must be one of {', '.join(SAMPLE_BY)}.")
    path = Path(source.path).expanduser()
    if path.is_dir():
        rows = _folder(path, source.split, name, sample_by)
    elif path.exists():
        rows = _file(path, name, sample_by)
    elif _looks_local(source.path):
        raise UserError(f"config.{name}.path: {source.path} does not exist{_nearest(path)}.")
    else:
        rows = _hub(source, name)
    if source.image_folder:
        folder = Path(source.image_folder).expanduser()
        if not folder.is_dir():
            why = "a file, no folder" if folder.exists() else f"no folder{_nearest(folder)}"
            raise UserError(f"config.{name}.image_folder: {source.image_folder} is {why}.")
        rows = dataclasses.replace(rows, folder=folder)
    if source.size is not None:
        if source.size < 1:
            raise UserError(f"config.{name}.size is {source.size}; it must be at least 1, or None for all rows.")
        rows = dataclasses.replace(rows, size=min(source.size, rows.size), identity=f"{rows.identity}[:{source.size}]")
    if not rows.size:
        raise UserError(f"config.{name}.path: {source.path} holds no rows.")
    return rows


def _looks_local(path: str) -> bool:
    """A Hub id is `name` or `owner/name`; everything else, and everything that stands in an existing folder, is a path."""
    if path.startswith((".", "~", os.sep)) or Path(path).suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return True
    return "/" in path and Path(path).parent.is_dir()


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.5)
    return f"; did you mean {parent / names[0]}?" if names else f" (nothing like it in {parent.resolve()})"


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}"


def _file(path: Path, name: str, sample_by: str) -> Rows:
    if path.suffix == ".jsonl":
        return _jsonl(path)
    if path.suffix == ".json":
        return _json(path)
    if path.suffix == ".parquet":
        return _parquet(path, name)
    if path.suffix == ".txt":
        return _text(path, sample_by)
    raise UserError(f"config.{name}.path: {path} has no suffix that is known; name it {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")


def _folder(path: Path, split: str, name: str, sample_by: str) -> Rows:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise UserError(f"config.{name}.split: {path} has no split {split!r}; it has {', '.join(data)}.")
            data = data[split]
        return _datasets(data, path, f"{path} ({split})")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    files = [file for file in files if file.suffix != ".txt"] or files  # beside rows a text is a licence or a note
    # Files that are named after splits are not mixed: a held-out file must not slip into training.
    named = {file: found[0] for file in files if (found := re.findall(rf"^({'|'.join(_SPLITS)})(?![a-z])", file.stem))}
    if named:
        chosen = [file for file in files if re.match(rf"{re.escape(split)}(?![a-z])", file.stem)]
        if not chosen:
            raise UserError(f"config.{name}.split: no file of {path} is named {split}*; there are {', '.join(f.name for f in files)}.")
        files = chosen
    if not files:
        raise UserError(f"config.{name}.path: {path} holds no {', '.join(SUFFIXES)} file and no dataset written by save_to_disk.")
    opened = [_file(file, name, sample_by) for file in files]
    if len(opened) == 1:
        return opened[0]
    ends = list(itertools.accumulate(len(rows) for rows in opened))

    def read(index: int) -> dict:
        which = bisect.bisect_right(ends, index)
        return opened[which][index - (ends[which - 1] if which else 0)]

    description = f"{path} ({', '.join(file.name for file in files)})"
    return Rows(read, ends[-1], path, description, "|".join(rows.identity for rows in opened))


def _jsonl(path: Path) -> Rows:
    """Rows by byte offset in a memory-mapped file: only offsets are held in memory."""
    starts, lines = [], []
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(start)
                lines.append(number)
            start += len(line)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if start else b""
    starts, lines, end = np.array(starts + [start], np.int64), np.array(lines, np.int64), start

    def read(index: int) -> dict:
        text = data[int(starts[index]) : int(starts[index + 1]) if index + 1 < len(lines) else end]
        where = f"{path}, line {lines[index]}"
        try:
            row = json.loads(text)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise UserError(f"{where}: not valid JSON ({error}); repair or remove the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object {{column: value}}, this is a {type(row).__name__}.")
        return row

    return Rows(read, len(lines), path.parent, str(path), _stamp(path))


def _text(path: Path, sample_by: str) -> Rows:
    """Rows {"text": document} of a plain text file."""
    try:
        whole = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it.") from None
    breaks = {"line": r"\n", "paragraph": r"\n\s*\n"}
    pieces = re.split(breaks[sample_by], whole) if sample_by in breaks else [whole]
    documents = [stripped for piece in pieces if (stripped := piece.strip())]
    return Rows(lambda index: {"text": documents[index]}, len(documents), path.parent, str(path), f"{_stamp(path)}:{sample_by}")


def _json(path: Path) -> Rows:
    """A list of rows, or an object that holds exactly one list of rows."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under the name .json, as the Hub has many
            return _jsonl(path)
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if isinstance(data, dict):
        lists = {key: value for key, value in data.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
        if len(lists) != 1:
            raise UserError(f"{path}: must hold a list of rows, or an object with one such list; its keys are {list(data)[:8]}.")
        data = next(iter(lists.values()))
    if not isinstance(data, list):
        raise UserError(f"{path}: must hold a list of rows, or an object with one such list; this is a {type(data).__name__}.")

    def read(index: int) -> dict:
        if not isinstance(data[index], dict):
            raise UserError(f"{path}, row {index}: a row must be an object {{column: value}}, this is a {type(data[index]).__name__}.")
        return data[index]

    return Rows(read, len(data), path.parent, str(path), _stamp(path))


def _parquet(path: Path, name: str) -> Rows:
    from datasets import Dataset

    try:
        data = Dataset.from_parquet(str(path))
    except Exception as error:  # pyarrow's and datasets' errors have no common base
        raise UserError(f"config.{name}.path: {path} cannot be read as Parquet ({_first_line(error)}).") from None
    return dataclasses.replace(_datasets(data, path.parent, str(path)), identity=_stamp(path))


def _hub(source: Any, name: str) -> Rows:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, name=source.subset, split=source.split)
    except Exception as error:  # offline, unknown id, unknown split or subset: `datasets` says which
        raise UserError(
            f"config.{name}.path: {source.path} is no file or folder here{_nearest(Path(source.path))}, "
            f"and as a Hub dataset (subset {source.subset}, split {source.split}) it cannot be loaded: {_first_line(error)}"
        ) from None
    rows = _datasets(data, Path.cwd(), f"{source.path} ({source.split})")

    def with_bytes(value: Any) -> Any:
        # The Hub's image folders give paths into the download cache, outside of any image folder: read them here.
        if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None and value["path"]:
            return {"bytes": Path(value["path"]).read_bytes(), "path": value["path"]}
        return [with_bytes(item) for item in value] if isinstance(value, list) else value

    return dataclasses.replace(rows, read=lambda index: {key: with_bytes(value) for key, value in rows.read(index).items()})


def _datasets(data: Any, folder: Path, description: str) -> Rows:
    """Rows of a `datasets.Dataset`, images left encoded: they are decoded once, by `aligner.data.media`."""
    from datasets import Image, List

    for column, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            data = data.cast_column(column, List(Image(decode=False)))
    return Rows(lambda index: data[index], len(data), folder, description, f"datasets:{data._fingerprint}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
