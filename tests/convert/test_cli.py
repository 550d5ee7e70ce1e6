"""The command line, in this process."""

import errno
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from aligner import checkpoint, convert, workdir
from aligner.convert import disk
from aligner.convert.__main__ import main
from tests.convert.folders import LLAVA, assert_same, edit, make


@pytest.fixture(autouse=True)
def no_lasting_x64():
    import jax

    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_verify(tmp_path, capsys, dtype):
    make(tmp_path / "a", LLAVA, dtype=dtype)
    assert main(["verify", "--model", str(tmp_path / "a"), "--scratch", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{len(load_file(tmp_path / 'a' / 'model.safetensors'))} tensors" in out and dtype in out
    assert "names: the layout that aligner writes" in out and "all tensors are byte-identical" in out
    assert not list(tmp_path.glob("aligner-verify-*"))
    extra = {"lm_head.weight": 0, "vision_tower.vision_model.embeddings.position_ids": np.arange(5)}
    edit(tmp_path / "a", lambda t: t.update({**extra, "lm_head.weight": t.pop("language_model.lm_head.weight")}))
    assert main(["verify", "--model", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "names: 1 of another layout" in out and "buffers that carry no parameter, not written again: 1" in out


def test_verify_by_headers_reads_no_tensor(tmp_path, capsys, monkeypatch):
    make(tmp_path / "a")
    monkeypatch.setattr(disk.Checkpoint, "read", None)
    assert main(["verify", "--model", str(tmp_path / "a"), "--dry-run"]) == 0
    assert "no tensor was read" in capsys.readouterr().out


def test_verify_sees_a_difference(tmp_path, capsys, monkeypatch):
    make(tmp_path / "a")
    written = disk.save_file

    def flip_one_bit(tensors, path, metadata):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
        tensors["model.norm.weight"].view(np.uint32)[3] ^= 1
        return written(tensors, path, metadata=metadata)

    monkeypatch.setattr(disk, "save_file", flip_one_bit)
    assert main(["verify", "--model", str(tmp_path / "a")]) == 1
    assert "DIFFERENT after reading and writing: 1\n  model.norm.weight" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["verify", "--model", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no folder") and error.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main(["to-hf", "--out", "x"])
    assert caught.value.code == 2 and "--workdir" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    make(tmp_path / "in", LLAVA)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    monkeypatch.setattr(disk, "save_file", full)
    assert main(["verify", "--model", str(tmp_path / "in")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing more can be written to weights: No space left on device; make room")


def test_from_hf_is_read_back_from_orbax(tmp_path, capsys):
    make(tmp_path / "a", LLAVA, dtype="bfloat16")
    assert main(["from-hf", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "orbax")]) == 0
    expected = convert.load(tmp_path / "a", dtype="bfloat16")[1]
    assert_same(checkpoint.load_params(tmp_path / "orbax", expected), expected)
    model = convert.model_from_folder(tmp_path / "orbax" / "assets")
    convert.save(model, expected, tmp_path / "b", dtype="bfloat16")
    assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in "ab"])
    assert main(["from-hf", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
    assert "b exists and is not empty" in capsys.readouterr().err


def test_to_hf(tmp_path, capsys, monkeypatch):
    """With a stand-in for the workdir, whose own tests cover what a run stores."""
    make(tmp_path / "a", dtype="float32")
    model, params = convert.load(tmp_path / "a")
    monkeypatch.setattr(workdir, "restore_params", lambda path, step=None: (model, params, step or 7))
    assert main(["to-hf", "--workdir", "runs/x", "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"step 7 of runs/x written to {tmp_path / 'b'} in float32\n"
    assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in "ab"])
    options = ["--step", "3", "--dtype", "bfloat16", "--max-shard-size", "900B"]
    assert main(["to-hf", "--workdir", "runs/x", "--out", str(tmp_path / "c"), *options]) == 0
    assert "step 3 of runs/x" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) > 1


def test_to_hf_without_a_run(tmp_path, capsys):
    assert main(["to-hf", "--workdir", str(tmp_path / "none"), "--out", str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
