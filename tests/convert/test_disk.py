"""Folders of weights as files: every form they come in, and every way they break."""

import errno
import json
import resource
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file

from aligner.convert import disk, fingerprint, open_checkpoint
from aligner.convert.disk import Later, is_export, write_shards
from aligner.types import UserError

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c.bias": np.arange(5, dtype=np.float16),
    "d.bias": np.asarray(np.float64(3.5)),
}


def write(folder, limit="1GB", tensors=TENSORS):
    folder.mkdir(exist_ok=True)
    write_shards(folder, iter(tensors.items()), {name: array.nbytes for name, array in tensors.items()}, limit)
    return folder


def check(checkpoint, tensors=TENSORS):
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        header = checkpoint.tensors[name]
        assert (header.shape, header.dtype, header.nbytes) == (array.shape, array.dtype.name, array.nbytes)
        got = checkpoint.read(name)
        assert got.dtype == array.dtype and got.tobytes() == array.tobytes()
    np.testing.assert_array_equal(checkpoint.read("a.weight", (slice(1, 3), slice(0, 2))), tensors["a.weight"][1:3, 0:2])


def test_one_file(tmp_path):
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    check(open_checkpoint(tmp_path))
    assert is_export(tmp_path)


def test_shards_with_and_without_index(tmp_path):
    write(tmp_path, limit=50)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert sorted(set(index["weight_map"].values())) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    check(open_checkpoint(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    check(open_checkpoint(tmp_path))


def test_a_broken_file_is_named(tmp_path):
    write(tmp_path, limit=50)
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for torn in (whole[:-3], whole[:5], b"", b"x" * 300):
        second.write_bytes(torn)
        with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is corrupt or cut short"):
            open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing, which model.safetensors.index.json names"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing, one of 2 shards"):
        open_checkpoint(tmp_path)


def test_an_index_that_lies(tmp_path):
    write(tmp_path, limit=50)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "e.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors lacks e\.weight"):
        open_checkpoint(tmp_path)
    for bad in ("{", "[]", '{"weight_map": {"a": 3}}', '{"weights": {}}'):
        index.write_text(bad)
        with pytest.raises(UserError, match=r"index\.json is no valid index"):
            open_checkpoint(tmp_path)


def test_stale_shards(tmp_path):
    write(tmp_path, limit=50)
    (tmp_path / "model.safetensors.index.json").unlink()
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match="shards of several checkpoints"):
        open_checkpoint(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights: expected model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        open_checkpoint(tmp_path)


FLAX = {
    "model": {
        "embed_tokens": {"embedding": np.arange(6, dtype=np.float32).reshape(3, 2)},
        "layers": {
            "0": {"proj": {"kernel": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3), "bias": np.arange(3.0)}},
            "1": {"input_layernorm": {"weight": np.ones(2, np.float32)}, "norm": {"scale": np.ones(2, np.float32)}},
        },
        "patch": {"kernel": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)},
        "conv1d": {"kernel": np.arange(6, dtype=np.float32).reshape(1, 2, 3)},
        "class_embedding": np.arange(2, dtype=np.float32),
    }
}


def test_old_flax_checkpoint_shows_hugging_face_names_and_layout(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(FLAX))
    checkpoint, model = open_checkpoint(tmp_path), FLAX["model"]
    expected = {
        "model.embed_tokens.weight": model["embed_tokens"]["embedding"],
        "model.layers.0.proj.weight": model["layers"]["0"]["proj"]["kernel"].T,
        "model.layers.0.proj.bias": np.arange(3.0),
        "model.layers.1.input_layernorm.weight": np.ones(2, np.float32),
        "model.layers.1.norm.weight": np.ones(2, np.float32),
        "model.patch.weight": model["patch"]["kernel"].transpose(3, 2, 0, 1),
        "model.conv1d.weight": model["conv1d"]["kernel"].transpose(2, 1, 0),
        "model.class_embedding": model["class_embedding"],
    }
    assert checkpoint.kind == "flax msgpack" and checkpoint.tensors.keys() == expected.keys()
    for name, array in expected.items():
        got = checkpoint.read(name)
        assert got.dtype == array.dtype == checkpoint.tensors[name].dtype
        np.testing.assert_array_equal(got, array)
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.proj.weight", (slice(1, 3), slice(0, 1))), [[1], [2]])
    assert len(fingerprint(checkpoint)) == 64


def test_sharded_and_torn_flax_checkpoint(tmp_path):
    parts = [{"model": {"a": {"kernel": np.ones((2, 3))}}}, {"model": {"b": {"scale": np.ones(2)}}}]
    files = ["flax_model-00001-of-00002.msgpack", "flax_model-00002-of-00002.msgpack"]
    for file, part in zip(files, parts):
        (tmp_path / file).write_bytes(msgpack_serialize(part))
    weight_map = dict(zip(["model/a/kernel", "model/b/scale"], files))
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(tmp_path).tensors.keys() == {"model.a.weight", "model.b.weight"}
    torn = tmp_path / files[1]
    torn.write_bytes(torn.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"flax_model-00002-of-00002\.msgpack is corrupt or cut short"):
        open_checkpoint(tmp_path)


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    big = {**TENSORS, "e.weight": np.arange(90_000, dtype=np.float32).reshape(30, 3000), "f.bias": np.zeros(20_000, np.float32),
           "narrow.weight": np.zeros((9000, 4), np.float32)}  # fmt: skip

    def of(name, tensors):
        return fingerprint(open_checkpoint(write(tmp_path / name, tensors=tensors)))

    first = of("first", big)
    assert first == of("again", big)
    others = {first}
    for name in big:  # every tensor counts, the large ones by their last row
        changed = {key: array.copy() for key, array in big.items()}
        changed[name][-1 if changed[name].ndim else ()] += 1
        others.add(of("changed-" + name, changed))
    others.add(of("renamed", {("z.bias" if name == "c.bias" else name): array for name, array in big.items()}))
    assert len(others) == len(big) + 2


def test_size_in_words(tmp_path):
    with pytest.raises(UserError, match="max_shard_size='much' is no size"):
        write(tmp_path, limit="much")
    write(tmp_path, limit="0.05 kB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_only_our_own_files_are_an_export(tmp_path):
    save_file(load_file(write(tmp_path) / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not is_export(tmp_path)


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and error.value.filename.endswith("model.safetensors")


def later(array, runs, made=None):
    """The array as one that is made in so many runs of rows; `made` gets a word of each."""

    def make(part):
        if made is not None:
            made.append(len(part))
        return np.array(part, order="C")

    return Later(array.shape, array.dtype, lambda: [lambda part=part: make(part) for part in np.array_split(array, runs)])


MIXED = {
    "odd": np.arange(3).astype(ml_dtypes.bfloat16),
    "model.10.weight": np.arange(35, dtype=np.float32).reshape(5, 7),
    "model.9.weight": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "naïve": np.asarray(np.float16(2)),
    "none": np.zeros((0, 3), np.float32),
}


def test_a_file_is_as_its_own_library_writes_it(tmp_path):
    """The same tensors and header, each beginning at a multiple of its dtype's size; those made later as those that are there."""
    metadata = {"format": "pt", "who": "me"}
    disk.save_file(MIXED, tmp_path / "there", metadata)
    disk.save_file({name: later(x, 2) if x.size > 3 else x for name, x in MIXED.items()}, tmp_path / "later", metadata)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "later").read_bytes()
    save_file({name: np.ascontiguousarray(x) if x.ndim else x for name, x in MIXED.items()}, tmp_path / "theirs", metadata)
    headers = {}
    for name in ("there", "theirs"):
        whole = (tmp_path / name).read_bytes()
        size = int.from_bytes(whole[:8], "little")
        assert size % 8 == 0
        headers[name] = json.loads(whole[8 : 8 + size])
        for tensor, array in load_file(tmp_path / name).items():
            assert (array.shape, array.dtype, array.tobytes()) == (MIXED[tensor].shape, MIXED[tensor].dtype, MIXED[tensor].tobytes())
            assert headers[name][tensor]["data_offsets"][0] % array.itemsize == 0
    for header in headers.values():
        assert header.pop("__metadata__") == metadata
        for entry in header.values():
            start, end = entry.pop("data_offsets")
            entry["size"] = end - start
    assert headers["there"] == headers["theirs"]
    assert later(MIXED["model.9.weight"], 3).copy().tobytes() == MIXED["model.9.weight"].tobytes()


def test_parts_are_made_a_few_ahead_of_the_writing(tmp_path, monkeypatch):
    """By several threads, in the file's order, and never more of them than threads wait to be written."""
    made, ahead, workers, as_bytes = [], [], set(), disk._bytes

    def written(array):
        ahead.append(len(made) - len(ahead))
        workers.update(thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPool"))
        return as_bytes(array)

    monkeypatch.setattr(disk, "_THREADS", 3)
    monkeypatch.setattr(disk, "_bytes", written)
    array = np.arange(4000, dtype=np.float32).reshape(200, 20)
    disk.save_file({"a": later(array, 100, made), "b": later(array + 1, 100, made)}, tmp_path / "x", {})
    assert len(made) == len(ahead) == 200 and max(ahead) <= 4 and len(workers) > 1
    np.testing.assert_array_equal(load_file(tmp_path / "x")["b"], array + 1)


def test_a_part_that_fails_ends_the_writing(tmp_path):
    def fails():
        raise UserError("no such values")

    with pytest.raises(UserError, match="no such values"):
        disk.save_file({**TENSORS, "e": Later((2,), np.dtype("float32"), lambda: [fails])}, tmp_path / "x", {})


def test_a_file_cut_short_after_it_was_opened(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, tensors={"a.weight": np.ones((4000, 3), np.float32)}))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"model\.safetensors: a\.weight cannot be read .*fetch the file again"):
        checkpoint.read("a.weight")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: a\.weight cannot be read"):
        checkpoint.read("a.weight")


def test_who_reads_the_folder_reads_the_weights(tmp_path):
    for mode in (0o755, 0o750, 0o700):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        assert (write(folder) / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666
