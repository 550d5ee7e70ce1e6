"""Files of every kind open to the same rows; what cannot be opened is named."""

import gzip
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from aligner.data import sources
from aligner.data.sources import open_rows
from aligner.types import UserError
from tests.data.tiny import source

ROWS = [{"prompt": f"q{i}", "chosen": "é" * i, "rejected": "x"} for i in range(5)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_records(path, records):
    writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    (tmp_path / "gaps.jsonl").write_text("\n" + lines(ROWS[:2]) + "\n\n" + lines(ROWS[2:]).rstrip("\n"))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "held.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "lines.json").write_text(lines(ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text(lines(ROWS[:2]))
    (tmp_path / "folder" / "b.json").write_text(json.dumps(ROWS[2:]))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train-00000-of-1.jsonl").write_text(lines(ROWS))
    (tmp_path / "splits" / "test.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "rows.arrow")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    write_records(tmp_path / "rows.array_record", [json.dumps(row).encode() for row in ROWS])
    names = ["rows.jsonl", "gaps.jsonl", "rows.json", "held.json", "lines.json", "rows.parquet", "saved", "dict", "folder", "splits",
             "rows.jsonl.gz", "rows.json.gz", "rows.array_record", "rows.arrow"]  # fmt: skip
    for name in names:
        rows = open_rows(source(tmp_path / name))
        assert [rows[i] for i in range(len(rows))] == ROWS, name
        assert rows.columns() == ["prompt", "chosen", "rejected"]
        assert len(open_rows(source(tmp_path / name, size=2))) == 2
    assert len(open_rows(source(tmp_path / "dict", split="test"))) == 1
    assert len(open_rows(source(tmp_path / "splits", split="test"))) == 1


def test_images_in_parquet_stay_encoded(tmp_path):
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Pictures

    features = Features({"image": Image(), "images": List(Image()), "q": Value("string")})
    picture = Pictures.new("RGB", (3, 2))
    Dataset.from_list([{"image": picture, "images": [picture], "q": "?"}], features=features).to_parquet(tmp_path / "rows.parquet")
    row = open_rows(source(tmp_path / "rows.parquet"))[0]
    assert row["image"]["bytes"].startswith(b"\x89PNG") and row["images"][0]["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["Audio", "Video"])
def test_sounds_and_clips_in_parquet_stay_encoded(tmp_path, kind):
    """Reading them by `datasets` would want PyTorch."""
    import datasets

    feature = getattr(datasets, kind)
    features = datasets.Features({"one": feature(), "several": datasets.List(feature())})
    file = {"bytes": b"a file", "path": None}
    datasets.Dataset.from_list([{"one": file, "several": [file]}]).cast(features).to_parquet(tmp_path / "rows.parquet")
    assert datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")).features == features
    row = open_rows(source(tmp_path / "rows.parquet"))[0]
    assert row["one"] == file and row["several"] == [file]


def test_identity_changes_with_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(ROWS))
    before = open_rows(source(path)).identity
    assert open_rows(source(path)).identity == before
    path.write_text(lines(ROWS[1:]))
    assert open_rows(source(path)).identity != before


@pytest.mark.parametrize(
    ("files", "ask", "message"),
    [
        ({}, {"path": ""}, "path is empty"),
        ({"train.jsonl": "{}"}, {"path": "trian.jsonl"}, r"trian.jsonl does not exist \(did you mean .*/train.jsonl\?\)\."),
        ({"rows/x.jsonl": "{}"}, {"path": "row/x.jsonl"}, r"row/x.jsonl does not exist \(did you mean .*/rows\?\)\."),
        ({"a.jsonl": '{"a": 1}\n{"a": \n'}, {"path": "a.jsonl"}, "a.jsonl, line 2: not valid JSON"),
        ({"a.jsonl": "{}\n[1]\n"}, {"path": "a.jsonl"}, "a.jsonl, line 2: a row must be an object"),
        ({"a.jsonl": '\n[\n {"a": 1}\n]\n'}, {"path": "a.jsonl"}, "a.jsonl, line 2: a list begins here, .* name the file .json"),
        ({"a.json": "[{]"}, {"path": "a.json"}, "a.json: not valid JSON"),
        ({"a.json": '{"x": 1}'}, {"path": "a.json"}, "must hold a list of rows"),
        ({"a.json": "3"}, {"path": "a.json"}, "this is a int"),
        ({"a.jsonl": "\n"}, {"path": "a.jsonl"}, "holds no rows"),
        ({"a.parquet": "nonsense"}, {"path": "a.parquet"}, "cannot be read as Parquet"),
        ({"a.xls": "x"}, {"path": "a.xls"}, "no suffix that is known"),
        ({"d/a.xls": "x"}, {"path": "d"}, "holds no .json"),
        ({"d/train.jsonl": "{}", "d/test.jsonl": "{}"}, {"path": "d", "split": "val"}, r"no file of .* is named val\*"),
        ({"a.jsonl": "{}"}, {"path": "a.jsonl", "split": "train[:10%]"}, r"split is 'train\[:10%\]' and .*a.jsonl is here: .*config.data.train.size"),
        ({"a.jsonl": "{}"}, {"path": "a.jsonl", "image_folder": "nowhere"}, "nowhere is no folder"),
        ({"a.jsonl": "{}"}, {"path": "a.jsonl", "size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, files, ask, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / ask["path"]) if ask["path"] else ""
    with pytest.raises(UserError, match=message):
        rows = open_rows(source(**ask | {"path": path}))
        [rows[i] for i in range(len(rows))]


def test_a_hub_dataset_that_cannot_be_loaded(monkeypatch):
    import datasets

    def offline(path, name, split):
        raise ConnectionError(f"no {path}/{name}/{split}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"someone/pairs is no file or folder here.*cannot be loaded: no someone/pairs/None/train$"):
        open_rows(source("someone/pairs"))


def test_text_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "b.txt").write_text("vier é\n", encoding="utf-8")

    def read(path, **options):
        rows = open_rows(source(path, **options))
        return [rows[i]["text"] for i in range(len(rows))]

    assert read(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert read(tmp_path / "a.txt", sample_by="line") == ["one", "two", "three"]
    assert read(tmp_path / "a.txt", sample_by="document") == ["one\ntwo\n\n\nthree"]
    assert read(tmp_path) == ["one\ntwo", "three", "vier é"]
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n')
    assert read(tmp_path) == ["row"], "beside rows a text file is a note"
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"c.txt: not UTF-8 text"):
        open_rows(source(tmp_path / "c.txt"))


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffquestion,answer\n"one, two","line\nbreak"\nthree,\n\n')
    (tmp_path / "b.tsv").write_text("question\tanswer\na, b\tc\n")
    rows = open_rows(source(tmp_path / "a.csv"))
    assert [rows[i] for i in range(len(rows))] == [
        {"question": "one, two", "answer": "line\nbreak"}, {"question": "three", "answer": None},
    ]  # fmt: skip
    assert open_rows(source(tmp_path / "b.tsv"))[0] == {"question": "a, b", "answer": "c"}
    (tmp_path / "c.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(UserError, match=r"c.csv, line 3: 3 cells, the header has 2 \(a, b\)"):
        open_rows(source(tmp_path / "c.csv"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    with pytest.raises(UserError, match=r"d.jsonl.gz: not a whole gzip file"):
        open_rows(source(tmp_path / "d.jsonl.gz"))


def test_a_long_document_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'word ' * 40_000}\n")
    assert len(open_rows(source(tmp_path / "a.csv"))[0]["text"]) == 200_000


def test_array_records(tmp_path, monkeypatch):
    write_records(tmp_path / "a.array_record", [b"{", b"3"])
    rows = open_rows(source(tmp_path / "a.array_record"))
    for index, message in enumerate(["record 0: not valid JSON", "record 1: a row must be an object"]):
        with pytest.raises(UserError, match=message):
            rows[index]
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_data_source", None)
    with pytest.raises(UserError, match=r"need the package array_record; pip install aligner\[sources\]"):
        open_rows(source(tmp_path / "a.array_record"))


def test_tensorflow_datasets(monkeypatch):
    example = {"question": b"q", "ids": np.arange(2), "image": np.zeros((2, 3, 3), np.uint8), "raw": b"\xff", "nested": {"n": np.int64(3)}}
    asked = []
    fake = SimpleNamespace(data_source=lambda name, **options: asked.append((name, options)) or [example])
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    rows = open_rows(source("tfds:some_set/config:1.0.0@/data", split="train[:5]"))
    example["grey"] = np.zeros((2, 3, 1), np.uint8)
    example["mask"] = np.zeros((1, 1, 2), np.uint8)
    assert rows[0]["grey"].mode == "L" and rows[0]["grey"].size == (3, 2) and rows[0]["mask"] == [[[0, 0]]]
    del example["grey"], example["mask"]
    image = rows[0].pop("image")
    assert rows[0] | {"image": None} == {"question": "q", "ids": [0, 1], "image": None, "raw": b"\xff", "nested": {"n": 3}}
    assert image.size == (3, 2)
    assert asked == [("some_set/config:1.0.0", {"split": "train[:5]", "data_dir": "/data", "download": False})]
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"tfds:mnist needs the package tensorflow-datasets; pip install aligner\[sources\]"):
        open_rows(source("tfds:mnist"))


def test_the_first_rows_of_a_stream(tmp_path, monkeypatch):
    import datasets

    read = []

    def endless():
        for i in range(10**6):
            read.append(i)
            yield {"prompt": f"q{i}"}

    features = datasets.Features({"prompt": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(endless, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, streaming, **options: stream)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for _ in range(2):
        rows = open_rows(source("owner/set", streaming=True, size=5))
        assert [rows[i]["prompt"] for i in range(len(rows))] == [f"q{i}" for i in range(5)]
    assert len(read) < 20, "read once, and no more than asked for"

    def offline(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert len(open_rows(source("owner/set", streaming=True, size=5))) == 5, "what is here needs no network"
    with pytest.raises(UserError, match="cannot be loaded: offline"):
        open_rows(source("owner/set", streaming=True, size=6))


def test_pictures_of_a_stream_stay_encoded(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "a.png").write_bytes(b"no image")
    features = datasets.Features({"image": datasets.Image(), "sound": datasets.Audio(), "images": datasets.List(datasets.Image())})
    file, named = {"bytes": b"no image", "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}
    table = datasets.Dataset.from_list([{"image": named, "sound": file, "images": [file, named]}]).cast(features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table.to_iterable_dataset())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    row = open_rows(source("owner/set", streaming=True))[0]
    assert [one["bytes"] for one in (row["image"], row["sound"], *row["images"])] == [b"no image"] * 4
    address = {"bytes": None, "path": "https://example.org/a.png"}
    monkeypatch.setattr("datasets.utils.file_utils.xopen", None)
    assert sources._with_bytes([address]) == [address], "what a row names is not fetched"


def test_what_is_odd_in_a_file_is_told(tmp_path):
    write = lambda name, text: (tmp_path / name).write_text(text) and tmp_path / name
    deep = "[" * 100_000
    for path, message in [
        (write("deep.json", deep), r"deep.json: not valid JSON \(maximum recursion"),
        (write("twice.csv", "a,b,a\n1,2,3\n"), "twice.csv: the header names 'a' twice"),
    ]:
        with pytest.raises(UserError, match=message):
            open_rows(source(path))
    rows = open_rows(source(write("deep.jsonl", f'{{"a": 1}}\n{{"a": {deep}\n')))
    with pytest.raises(UserError, match=r"deep.jsonl, line 2: not valid JSON \(maximum recursion"):
        rows[1]


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"config.data.train.path: .*rows.jsonl cannot be read: Permission denied\."):
        open_rows(source(path))


def test_what_windows_writes_is_read(tmp_path):
    """A byte order mark, suffixes in capitals, spaces behind the commas of a header, carriage returns."""
    (tmp_path / "a.TXT").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    assert [open_rows(source(tmp_path / "a.TXT"))[i]["text"] for i in range(2)] == ["one", "two"]
    (tmp_path / "B.CSV").write_bytes("\ufeffprompt, chosen\r\nq,\"a\r\nb\"\r\n".encode())
    assert open_rows(source(tmp_path / "B.CSV"))[0] == {"prompt": "q", "chosen": "a\r\nb"}
    (tmp_path / "c.JSONL.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    assert open_rows(source(tmp_path / "c.JSONL.gz"))[4] == ROWS[4]
    (tmp_path / "D.JSONL.GZ").write_bytes(gzip.compress(lines(ROWS).encode()))
    assert open_rows(source(tmp_path / "D.JSONL.GZ"))[4] == ROWS[4]
    (tmp_path / "E.CSV.GZ").write_bytes(gzip.compress(b"prompt,chosen\nq,a\n"))
    assert open_rows(source(tmp_path / "E.CSV.GZ"))[0] == {"prompt": "q", "chosen": "a"}


def test_a_table_takes_little_more_memory_than_its_cells(tmp_path):
    import tracemalloc

    (tmp_path / "rows.csv").write_text("text\n" + f"{'word ' * 200}\n" * 4000)
    tracemalloc.start()
    try:
        assert len(open_rows(source(tmp_path / "rows.csv"))) == 4000
        assert tracemalloc.get_traced_memory()[1] < 6e6  # 4 MB of cells; the text of the whole file beside them takes four times as much
    finally:
        tracemalloc.stop()


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to("elsewhere.jsonl")
    with pytest.raises(UserError, match=r"gone.jsonl is a link to elsewhere.jsonl, which does not exist"):
        open_rows(source(tmp_path / "gone.jsonl"))
    (tmp_path / "latin.csv").write_bytes("text\na\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.csv: not UTF-8 text \(byte 0xe9 after line \d: "):
        open_rows(source(tmp_path / "latin.csv"))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet cannot be read as Parquet \(.*text"):
        open_rows(source(tmp_path / "twice.parquet"))
