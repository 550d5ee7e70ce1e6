"""Where rows come from: `open_rows` gives random access to a local file, a folder, or a Hub dataset, without reading it all."""

from __future__ import annotations

import bisect
import contextlib
import csv
import dataclasses
import difflib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aligner.types import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".array_record", ".txt")
_TEXTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")  # may also be compressed, with .gz behind
SAMPLE_BY = ("line", "paragraph", "document")
csv.field_size_limit(1 << 30)  # of a cell: a document may be longer than Python's 131,072 characters
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
        kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"config.{name}.path is empty; give a {kinds} file, a folder of them, or a Hub dataset id.")
    sample_by = source.get("sample_by", "paragraph")
    if sample_by not in SAMPLE_BY:
        raise UserError(f"config.{name}.sample_by is {sample_by!r}; it must be one of {', '.join(SAMPLE_BY)}.")
    path = Path(source.path).expanduser()
    if source.path.startswith("tfds:"):
        rows = _tfds(source.path.removeprefix("tfds:"), source.split, name)
    elif path.exists():
        if "[" in source.split:  # which would be passed over where no file is named after a split
            how = f"only of a dataset on the Hub; config.{name}.size takes the first rows"
            raise UserError(f"config.{name}.split is {source.split!r} and {path} is here: a slice can be taken {how}.")
        try:
            rows = _folder(path, source.split, name, sample_by) if path.is_dir() else _file(path, name, sample_by)
        except OSError as error:
            raise UserError(f"config.{name}.path: {error.filename or path} cannot be read: {error.strerror or error}.") from None
    elif path.is_symlink():
        raise UserError(f"config.{name}.path: {source.path} is a link to {os.readlink(path)}, which does not exist.")
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
    if path.startswith((".", "~", os.sep)) or _suffix(Path(path)) in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return True
    return "/" in path and Path(path).parent.is_dir()


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.5)
    return f" (did you mean {parent / names[0]}?)" if names else f" (nothing like it in {parent.resolve()})"


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}"


def _zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _suffix(path: Path) -> str:
    """".jsonl" of rows.jsonl, of rows.jsonl.gz and of ROWS.JSONL."""
    inner = Path(path.stem).suffix.lower() if _zipped(path) else ""
    return inner if inner in _TEXTS else path.suffix.lower()


def _file(path: Path, name: str, sample_by: str) -> Rows:
    suffix = _suffix(path)
    if suffix == ".jsonl":
        return _jsonl(path)
    if suffix == ".json":
        return _json(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, "," if suffix == ".csv" else "\t")
    if suffix in (".parquet", ".arrow"):
        return _arrow(path, name, suffix)
    if suffix == ".array_record":
        return _array_record(path)
    if suffix == ".txt":
        return _text(path, sample_by)
    raise UserError(f"config.{name}.path: {path} has no suffix that is known; name it {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")


def _bytes(path: Path) -> bytes:
    """The whole of a file, uncompressed."""
    data = path.read_bytes()
    if not _zipped(path):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again.") from None


def _folder(path: Path, split: str, name: str, sample_by: str) -> Rows:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise UserError(f"config.{name}.split: {path} has no split {split!r}; it has {', '.join(data)}.")
            data = data[split]
        return _datasets(data, path, f"{path} ({split})")
    files = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
    files = [file for file in files if _suffix(file) != ".txt"] or files  # beside rows a text is a licence or a note
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
    """Rows by byte offset: only offsets are held in memory. Read by position, not mapped: mapped pages count as this process's memory."""
    starts, ends, lines = array("q"), array("q"), array("q")
    whole = _bytes(path) if _zipped(path) else None
    file = path.open("rb") if whole is None else io.BytesIO(whole)
    start = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            starts.append(start)
            ends.append(start + len(line))
            lines.append(number)
        start += len(line)

    def read(index: int) -> dict:
        start, end = starts[index], ends[index]
        text = whole[start:end] if whole is not None else os.pread(file.fileno(), end - start, start)
        where = f"{path}, line {lines[index]}"
        if index == 0 and text.lstrip().startswith(b"["):
            raise UserError(f"{where}: a list begins here, but in .jsonl every line is a row; name the file .json.")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; brackets without end
            raise UserError(f"{where}: not valid JSON ({error}); repair or remove the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object {{column: value}}, this is a {type(row).__name__}.")
        return row

    return Rows(read, len(lines), path.parent, str(path), _stamp(path))


def _text(path: Path, sample_by: str) -> Rows:
    """Rows {"text": document} of a plain text file."""
    try:
        whole = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it.") from None
    breaks = {"line": r"\n", "paragraph": r"\n\s*\n"}
    pieces = re.split(breaks[sample_by], whole) if sample_by in breaks else [whole]
    documents = [stripped for piece in pieces if (stripped := piece.strip())]
    return Rows(lambda index: {"text": documents[index]}, len(documents), path.parent, str(path), f"{_stamp(path)}:{sample_by}")


def _json(path: Path) -> Rows:
    """A list of rows, or an object that holds exactly one list of rows."""
    try:
        data = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
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


def _csv(path: Path, separator: str) -> Rows:
    """Rows of a table with a header; every value is a string. Empty cells are None."""
    file = io.BytesIO(_bytes(path)) if _zipped(path) else path.open("rb")
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            table = csv.reader(text, delimiter=separator, strict=True)
            header, rows = [column.strip() for column in next(table, [])], []
            if twice := [column for column in header if header.count(column) > 1]:
                raise UserError(f"{path}: the header names {twice[0]!r} twice; rename one of the two columns.")
            for cells in table:
                if cells and len(cells) != len(header):
                    needed = f"the header has {len(header)} ({', '.join(header)})"
                    raise UserError(f"{path}, line {table.line_num}: {len(cells)} cells, {needed}.")
                rows += [cells] if cells else []
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} after line {table.line_num}"
        raise UserError(f"{path}: not UTF-8 text ({byte}: {error.reason}); convert it.") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: not valid CSV ({error}).") from None
    read = lambda index: {name: cell or None for name, cell in zip(header, rows[index])}
    return Rows(read, len(rows), path.parent, str(path), _stamp(path))


def _arrow(path: Path, name: str, suffix: str) -> Rows:
    """Parquet, or the Arrow files that `datasets` writes."""
    from datasets import Dataset

    try:
        data = Dataset.from_parquet(str(path)) if suffix == ".parquet" else Dataset.from_file(str(path))
    except Exception as error:  # pyarrow's and datasets' errors have no common base
        what = "Parquet" if suffix == ".parquet" else "an Arrow stream"
        why = _first_line(error.__cause__ or error)
        raise UserError(f"config.{name}.path: {path} cannot be read as {what} ({why}).") from None
    return dataclasses.replace(_datasets(data, path.parent, str(path)), identity=_stamp(path))


def _array_record(path: Path) -> Rows:
    """Records that are JSON objects."""
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError:
        raise UserError(f"{path}: ArrayRecord files need the package array_record; pip install aligner[sources].") from None
    try:
        data = ArrayRecordDataSource([str(path)])
    except Exception as error:
        raise UserError(f"{path}: cannot be read as ArrayRecord ({_first_line(error)}).") from None

    def read(index: int) -> dict:
        try:
            row = json.loads(data[index])
        except ValueError as error:
            raise UserError(f"{path}, record {index}: not valid JSON ({error}); write records as JSON objects.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, record {index}: a row must be an object {{column: value}}, this is a {type(row).__name__}.")
        return row

    return Rows(read, len(data), path.parent, str(path), _stamp(path))


def _tfds(path: str, split: str, name: str) -> Rows:
    """A dataset of tensorflow-datasets that was prepared as ArrayRecord; TensorFlow itself is not needed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"config.{name}.path: tfds:{path} needs the package tensorflow-datasets; pip install aligner[sources].") from None
    dataset, _, folder = path.partition("@")  # tfds:NAME, or tfds:NAME@DATA_DIR
    try:
        data = tfds.data_source(dataset, split=split, data_dir=folder or None, download=False)
    except Exception as error:  # unknown names, splits and formats: tfds says which
        raise UserError(f"config.{name}.path: tfds:{path} (split {split}) cannot be opened: {_first_line(error)}") from None
    return Rows(lambda index: _plain(data[index]), len(data), Path.cwd(), f"tfds:{path} ({split})", f"tfds:{path}:{split}:{len(data)}")


def _plain(value: Any) -> Any:
    """NumPy values as JSON would have them; bytes that are text become text, others (images) stay."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] in (1, 3, 4):
        from PIL import Image

        return Image.fromarray(value.squeeze(-1) if value.shape[-1] == 1 else value)  # greys have a channel too
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _hub(source: Any, name: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    load = lambda **options: load_dataset(source.path, name=source.subset, split=source.split, **options)
    try:
        data = _spooled(lambda: load(streaming=True), source) if source.get("streaming", False) else load()
    except UserError:
        raise
    except Exception as error:  # offline, unknown id, unknown split or subset: `datasets` says which
        error = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(
            f"config.{name}.path: {source.path} is no file or folder here{_nearest(Path(source.path))}, "
            f"and as a Hub dataset (subset {source.subset}, split {source.split}) it cannot be loaded: {_first_line(error)}"
        ) from None
    rows = _datasets(data, Path.cwd(), f"{source.path} ({source.split})")

    return dataclasses.replace(rows, read=lambda index: {key: _with_bytes(value) for key, value in rows.read(index).items()})


def _with_bytes(value: Any) -> Any:
    """The value with its encoded media: some datasets give paths, into the download cache or on the Hub, outside of any image folder."""
    from datasets.utils.file_utils import xopen

    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None and value["path"]:
        if value["path"].startswith("http"):
            return value  # a row's own address is not followed; it is refused where media are opened
        with contextlib.suppress(OSError), xopen(value["path"], "rb") as file:  # else the row is dropped where its media are opened
            return {"bytes": file.read(), "path": value["path"]}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value


def _spooled(open_stream: Callable[[], Any], source: Any) -> Any:
    """The first rows of a stream, written once to an Arrow file in the cache of `datasets`: only what is used is downloaded, and what has
    been downloaded opens offline."""
    import datasets

    words = json.dumps([source.path, source.subset, source.split, source.size])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "aligner" / hashlib.sha256(words.encode()).hexdigest()[:16]
    if not folder.exists():
        stream = _encoded(open_stream())
        rows = stream if source.size is None else stream.take(source.size)
        whole = lambda: ({key: _with_bytes(value) for key, value in row.items()} for row in rows)
        features = stream.features and datasets.Features({key: _as_file(feature) for key, feature in stream.features.items()})
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        datasets.Dataset.from_generator(whole, features=features).save_to_disk(part)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(part, folder)
    return datasets.load_from_disk(folder)


def _datasets(data: Any, folder: Path, description: str) -> Rows:
    """Rows of a `datasets.Dataset`, media left encoded."""
    data = _encoded(data)
    return Rows(lambda index: data[index], len(data), folder, description, f"datasets:{data._fingerprint}")


def _as_file(feature: Any) -> Any:
    """What holds encoded media; `datasets` wants PyTorch to write sounds as what they are."""
    from datasets import Audio, Image, List, Value, Video

    file, item = {"bytes": Value("binary"), "path": Value("string")}, getattr(feature, "feature", feature)
    return feature if not isinstance(item, (Audio, Image, Video)) else file if item is feature else List(file)


def _encoded(data: Any) -> Any:
    """A `datasets.Dataset` or stream whose media stay encoded: they are decoded once, by `aligner.data.modalities`."""
    from datasets import Audio, Image, List, Video

    for column, feature in (data.features or {}).items():
        item = getattr(feature, "feature", feature)
        if isinstance(item, (Audio, Image, Video)):
            encoded = dataclasses.replace(item, decode=False)
            data = data.cast_column(column, encoded if item is feature else List(encoded))
    return data


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
