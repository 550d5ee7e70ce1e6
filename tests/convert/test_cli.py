"""The command line, in this process."""

import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from aligner import convert
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


def test_from_hf_and_to_hf_call_the_checkpoint_room(tmp_path, capsys, monkeypatch):
    """With a stand-in for `aligner.checkpoint`, whose own tests cover what is stored."""
    make(tmp_path / "a", dtype="bfloat16")
    saved = {}

    def save_params(path, params):
        path.mkdir(parents=True)
        saved["params"] = params

    def restore_params(workdir, step):
        return convert.model_from_folder(f"{workdir}/assets"), saved["params"], step or 7

    stand_in = types.SimpleNamespace(save_params=save_params, restore_params=restore_params)
    monkeypatch.setitem(sys.modules, "aligner.checkpoint", stand_in)
    assert main(["from-hf", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "run")]) == 0
    assert_same(saved["params"], convert.load(tmp_path / "a", dtype="bfloat16")[1])
    assert main(["to-hf", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    assert "step 7" in capsys.readouterr().out
    assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in "ab"])
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(["from-hf", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
    assert "b exists and is not empty" in capsys.readouterr().err
