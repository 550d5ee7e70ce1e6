"""Folders that we make ourselves, without PyTorch: reading, writing, and one clear sentence for each kind of bad input."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file

from aligner import convert
from aligner.convert import disk, hf
from aligner.types import UserError
from tests.convert.folders import LLAMA, LLAVA, assert_same, edit, make, random_params

REPOSITORY = Path(__file__).parents[2]


def refused(match, call, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", [LLAMA, LLAVA], ids=["llama", "llava"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path, config, dtype):
    """Through float32 parameters, in one file and in many."""
    make(tmp_path / "a", config, dtype=dtype)
    model, params = convert.load(tmp_path / "a")
    assert model.source_dtype == dtype and model.family == config["model_type"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    convert.save(model, params, tmp_path / "b", max_shard_size=700)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    a, b = load_file(tmp_path / "a" / "model.safetensors"), convert.open_checkpoint(tmp_path / "b")
    assert_same(a, {name: b.read(name) for name in b.tensors})
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    assert_same(params, convert.load(tmp_path / "b")[1])


def test_float64_survives(tmp_path):
    with jax.enable_x64(True):
        model, _ = make(tmp_path / "a")
        params = jax.tree.map(lambda x: x + np.float64(1e-12), random_params(model))
        convert.save(model, params, tmp_path / "b", dtype="float64")
        again, read = convert.load(tmp_path / "b", dtype=None)
        assert again.source_dtype == "float64"
        assert_same(read, params)
    refused("float64 parameters need 64-bit mode: set JAX_ENABLE_X64=1", convert.load, tmp_path / "b", dtype="float64")


def test_tensors_of_another_dtype_than_the_most_keep_it(tmp_path):
    make(tmp_path / "a", dtype="bfloat16")
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 2)]
    edit(tmp_path / "a", lambda t: t.update({name: t[name].astype(np.float32) + np.float32(1e-6) for name in norms}))
    model, params = convert.load(tmp_path / "a", dtype=None)
    assert params["model"]["layers"]["input_layernorm"]["scale"].dtype == np.float32
    assert model.source_dtype == "bfloat16" and set(model.assets.dtypes) == set(norms)
    convert.save(model, params, tmp_path / "b")
    assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in "ab"])
    convert.save(model, params, tmp_path / "c", dtype="bfloat16")
    assert {x.dtype.name for x in load_file(tmp_path / "c" / "model.safetensors").values()} == {"bfloat16"}


def test_dtype_per_leaf(tmp_path):
    make(tmp_path / "a", LLAVA)
    _, params = convert.load(tmp_path / "a", dtype=lambda path: "bfloat16" if path.startswith("vision_tower/") else jnp.float32)
    assert {x.dtype.name for x in jax.tree.leaves(params["vision_tower"])} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(params["language_model"])} == {"float32"}
    refused("cannot be loaded as dtype 'int8'; choose one of float64", convert.load, tmp_path / "a", dtype="int8")


def test_some_leaves_only(tmp_path):
    make(tmp_path / "a", LLAVA)
    model, checkpoint = convert.open_model(tmp_path / "a")
    some = convert.load_params(model, checkpoint, only=lambda path: path.startswith("vision_tower/"))
    assert_same(some, {"vision_tower": convert.load(tmp_path / "a")[1]["vision_tower"]})


def test_three_llava_layouts_are_one_tree(tmp_path):
    make(tmp_path / "a", LLAVA)
    _, expected = convert.load(tmp_path / "a")
    fresh = (r"^vision_tower\.vision_model\.", "vision_tower.")
    nested = (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"), (
        r"^(vision_tower|multi_modal_projector)\.", r"model.\1.",
    )  # fmt: skip
    for layout, rules in {"fresh": [fresh], "nested": nested, "nested and fresh": [fresh, *nested]}.items():
        make(tmp_path / layout, LLAVA)

        def rename(tensors, rules=rules):
            for pattern, replacement in rules:
                tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
            return tensors

        edit(tmp_path / layout, rename)
        assert load_file(tmp_path / layout / "model.safetensors").keys() != load_file(tmp_path / "a" / "model.safetensors").keys()
        model, params = convert.load(tmp_path / layout)
        assert_same(params, expected)
        convert.save(model, params, tmp_path / "out")
        assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in ("a", "out")])


def test_old_flax_checkpoint(tmp_path):
    _, params = make(tmp_path / "a")
    flat = {}
    for path, leaf in hf.flatten(params).items():
        path = path.replace("norm/scale", "norm/weight")  # as FlaxLlama called it
        if "/layers/" in path:
            flat |= {path.replace("/layers/", f"/layers/{i}/"): leaf[i] for i in range(len(leaf))}
        else:
            flat[path] = leaf
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "written.safetensors")
    (tmp_path / "a" / "flax_model.msgpack").write_bytes(msgpack_serialize(hf.unflatten(flat)))
    model, read = convert.load(tmp_path / "a")
    assert_same(read, params)
    convert.save(model, read, tmp_path / "b")
    assert_same(load_file(tmp_path / "b" / "model.safetensors"), load_file(tmp_path / "written.safetensors"))


def test_tied_head(tmp_path):
    make(tmp_path / "a", tie_word_embeddings=True)
    _, params = convert.load(tmp_path / "a")
    assert "lm_head" not in params
    edit(tmp_path / "a", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same(convert.load(tmp_path / "a")[1], params)
    edit(tmp_path / "a", lambda t: {name: t[name] for name in t if name != "model.embed_tokens.weight"})  # only the head was kept
    assert_same(convert.load(tmp_path / "a")[1], params)
    embedding = np.asarray(params["model"]["embed_tokens"]["embedding"])
    edit(tmp_path / "a", lambda t: t.update({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1}))
    refused("stores lm_head.weight with other values than model.embed_tokens.weight, though config.json", convert.load, tmp_path / "a")
    edit(tmp_path / "a", lambda t: t.update({"lm_head.weight": embedding[:, 1:].copy()}))
    refused("1 of another shape than the embedding it is tied to: lm_head.weight", convert.load, tmp_path / "a")


def test_ignored_buffers(tmp_path):
    _, params = make(tmp_path / "a", LLAVA)
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    edit(tmp_path / "a", lambda t: t.update(buffers))
    assert_same(convert.load(tmp_path / "a")[1], params)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    make(tmp_path / "a")

    def change(tensors):
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.norms.weight"] = np.ones(8, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((12, 9), np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((8, 8), np.int8)
        for i in range(3):
            tensors[f"model.layers.{i}.adapter.weight"] = np.ones(1, np.float32)

    edit(tmp_path / "a", change)
    message = refused(r"do not fit its config\.json \(model_type llama\)", convert.open_model, tmp_path / "a")
    for part in (
        "2 missing: lm_head.weight (if it is the embedding, set tie_word_embeddings to true in config.json), model.norm.weight;",
        "4 left over: model.layers.*.adapter.weight (3 times), model.norms.weight (nearest missing: model.norm.weight)",
        "1 of another shape than config.json says: model.layers.1.mlp.up_proj.weight ([12, 9] stored, [12, 8] needed)",
        "1 of no floating dtype: model.layers.0.self_attn.q_proj.weight (int8)",
    ):
        assert part in message
    edit(tmp_path / "a", lambda t: {f"x{i}.w": np.ones(1, np.float32) for i in range(300)})
    assert len(refused("300 left over", convert.open_model, tmp_path / "a")) < 3000


def test_one_tensor_under_two_names(tmp_path):
    make(tmp_path / "a", LLAVA)
    edit(tmp_path / "a", lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"]}))
    refused(r"1 stored twice: lm_head.weight \(also as language_model.lm_head.weight\)", convert.open_model, tmp_path / "a")


def test_folders_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tiny-llama"
    make(folder)
    refused(f"there is no folder {tmp_path}/tiny-lama .did you mean {folder}", convert.load, tmp_path / "tiny-lama")
    refused("is a file; give the checkpoint folder", convert.load, folder / "config.json")
    refused("there is no folder nobody/nothing, and the Hub did not give it", convert.load, "nobody/nothing")
    (tmp_path / "empty").mkdir()
    refused("empty has no config.json, so it is no Hugging Face checkpoint folder", convert.load, tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused("empty is a PEFT adapter; give its base here, and the folder as config.lora.adapter", convert.load, tmp_path / "empty")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"algorithm": {}, "checkpoint": {}, "model": {}}')
    refused("run is the workdir of a run; write its model with .*to-hf --workdir .*run --out DIR", convert.load, tmp_path / "run")
    (tmp_path / "run" / "export").mkdir()
    refused("run is the workdir of a run; give .*run/export", convert.load, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    refused("tiny-llama holds no weights", convert.load, folder)
    (folder / "config.json").write_text("{")
    refused("config.json is no valid JSON", convert.load, folder)
    (folder / "config.json").write_text("[1]")
    refused("config.json holds a list where a JSON object is needed", convert.load, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="llava_llama"), r"model_type 'llava_llama', which is not supported; supported, nearest first: llava, llama,"),
        (dict(model_type="lama"), r"supported, nearest first: llama, mllama,"),
        (dict(model_type=None), "model_type None"),
        (dict(quantization_config={"quant_method": "awq"}), "weights quantised by awq; use the unquantised checkpoint"),
        (dict(num_attention_heads="many"), "config.json cannot be read by transformers"),
    ],
)
def test_configs_that_are_not_supported(tmp_path, change, message):
    make(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps({**LLAMA, **change}))
    refused(message, convert.load, tmp_path / "a")


def test_saving_in_another_dtype_changes_only_that_in_the_config(tmp_path):
    nested = {**LLAVA, "text_config": {**LLAMA, "dtype": "float32"}}
    make(tmp_path / "a", nested)
    model, params = convert.load(tmp_path / "a")
    convert.save(model, params, tmp_path / "b", dtype=jnp.bfloat16)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config == {**nested, "torch_dtype": "bfloat16", "text_config": {**LLAMA, "dtype": "bfloat16"}}
    for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
        original = load_file(tmp_path / "a" / "model.safetensors")[name]
        assert tensor.dtype == ml_dtypes.bfloat16 and tensor.tobytes() == original.astype(ml_dtypes.bfloat16).tobytes()
    make(tmp_path / "c")  # a config that says nothing of the dtype
    model, params = convert.load(tmp_path / "c")
    convert.save(model, params, tmp_path / "d", dtype="float16")
    assert json.loads((tmp_path / "d" / "config.json").read_text())["torch_dtype"] == "float16"
    refused("in dtype 'int4'; choose one of", convert.save, model, params, tmp_path / "e", dtype="int4")
    params["model"]["norm"]["scale"] = params["model"]["norm"]["scale"].at[0].set(1e6)
    refused(r"model.norm.weight holds values beyond float16's range", convert.save, model, params, tmp_path / "e", dtype="float16")
    assert not (tmp_path / "e").exists() and not (tmp_path / ".e.partial").exists()


def test_companion_files_travel_unchanged(tmp_path):
    make(tmp_path / "a")
    files = {"tokenizer_config.json": b'{"x":  1}', "spiece.model": b"\0\1", "additional_chat_templates/tool.jinja": b"{{ x }}\r\n",
             "chat_template.jinja": b"", "merges.txt": b"a b", "special_tokens_map.json": b"{}"}  # fmt: skip
    for name, content in {**files, "README.md": b"no", "pytorch_model.bin": b"no", "modeling.py": b"no"}.items():
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(content)
    model, params = convert.load(tmp_path / "a")
    convert.save(model, params, tmp_path / "b")
    written = {str(path.relative_to(tmp_path / "b")): path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert written.pop("model.safetensors")
    kept = {name: (tmp_path / "a" / name).read_bytes() for name in ("config.json", "generation_config.json")}
    assert written == {**files, **kept}
    assert model.assets.processor is None
    refused("has no tokenizer that transformers can load", lambda: model.assets.tokenizer)


def test_only_a_former_export_is_replaced(tmp_path):
    model, params = make(tmp_path / "a")
    other = jax.tree.map(lambda x: x + 1, params)
    convert.save(model, params, tmp_path / "out", max_shard_size=500)
    convert.save(model, other, tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*")) and not list(tmp_path.glob(".out*"))
    assert_same(convert.load(tmp_path / "out")[1], other)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused("holds notes.txt besides a former export and would lose it", convert.save, model, params, tmp_path / "out")
    edit(tmp_path / "a", lambda t: None)
    refused("a exists and is no former export; choose another folder", convert.save, model, params, tmp_path / "a")
    refused("is no former export", convert.save, model, params, tmp_path / "a" / "config.json")
    (tmp_path / "blank").mkdir()
    convert.save(model, params, tmp_path / "blank")


def test_an_interrupted_save_leaves_the_former_export(tmp_path, monkeypatch):
    model, params = make(tmp_path / "a")
    convert.save(model, params, tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()  # what a kill leaves
    (tmp_path / ".out.partial" / "model-00001-of-00009.safetensors").write_bytes(b"torn")
    written = []

    def interrupted(*args, **kwargs):
        written.append(args)
        if len(written) == 3:
            raise KeyboardInterrupt
        return save_file(*args, **kwargs)

    save_file = disk.save_file
    monkeypatch.setattr(disk, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.save(model, jax.tree.map(np.zeros_like, params), tmp_path / "out", max_shard_size=500)
    assert not (tmp_path / ".out.partial").exists()
    assert_same(convert.load(tmp_path / "out")[1], params)


def test_parameters_of_another_model(tmp_path):
    model, params = make(tmp_path / "a")
    bare = dataclasses.replace(model, assets=None)
    refused("made from a bare config, so there is no config.json", convert.save, bare, params, tmp_path / "b")
    extra = {**params, "lora": {"a": np.ones(3)}}
    refused(r"lora/a is \(3,\), the model has no such leaf; merge adapters first", convert.save, model, extra, tmp_path / "b")
    refused("lm_head/kernel is absent", convert.save, model, {"model": params["model"]}, tmp_path / "b")


def run(code, *args, **env):
    """Run Python in a process of its own, which prints one JSON line."""
    import os

    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "JAX_PLATFORMS": "cpu", **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SHARDED = """
import json, sys, dataclasses, jax, numpy as np
from aligner import convert
from aligner.sharding import make_mesh
from tests.convert.folders import assert_same, leaves
folder, out = sys.argv[1:]
read = []
plain = convert.Checkpoint.read
def counted(self, name, index=()):
    array = plain(self, name, index)
    read.append(array.nbytes)
    return array
convert.Checkpoint.read = counted
model, whole = convert.load(folder)
first, once = sum(read), read.clear()
model, params = convert.load(folder, mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
assert_same(params, whole)
parts = {path: len({str(s.index) for s in leaf.addressable_shards}) for path, leaf in
         zip(leaves(whole), jax.tree.leaves(params))}
convert.save(model, params, out)
print(json.dumps({"devices": len(jax.devices()), "whole": first, "sharded": sum(read), "parts": parts}))
"""


@pytest.mark.slow
def test_loading_onto_eight_devices(tmp_path):
    """Equal values, laid out by the rules, every byte of the checkpoint read once although devices share slices; saves the same bytes."""
    make(tmp_path / "a", LLAVA, dtype="bfloat16")
    result = run(SHARDED, tmp_path / "a", tmp_path / "b", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert result["devices"] == 8
    assert result["sharded"] == result["whole"] == sum(x.nbytes for x in load_file(tmp_path / "a" / "model.safetensors").values())
    assert result["parts"]["['language_model']['model']['layers']['mlp']['up_proj']['kernel']"] == 4
    assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in "ab"])


MEMORY = """
import json, sys, threading, jax, numpy as np
from pathlib import Path
from aligner import convert
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
model, checkpoint = convert.open_model(sys.argv[1])
jax.block_until_ready(jax.device_put(np.ones(8)))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
params = convert.load_params(model, checkpoint)
jax.block_until_ready(params)
leaves = jax.tree.leaves(params)
print(json.dumps({"beyond": status("VmHWM") - before - sum(x.nbytes for x in leaves), "largest": max(x.nbytes for x in leaves),
                  "total": sum(x.nbytes for x in leaves)}))
"""


SAVED = """
params = jax.tree.map(lambda leaf: leaf + 1, params)
jax.block_until_ready(params)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert.save(model, params, sys.argv[1] + "/out", dtype="bfloat16")
print(json.dumps({"beyond": status("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.slow
def test_peak_memory_is_two_leaves_beyond_the_device_arrays(tmp_path):
    """And of saving a few parts of tensors."""
    config = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 4096, "head_dim": 64,
              "num_attention_heads": 16}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = convert.model_from_folder(tmp_path)
    tensors = hf.by_tensor(hf.table(model.conversion, convert.abstract_params(model)))
    shapes = {name: parts[0][0].full for name, parts in tensors.items()}
    arrays = ((name, np.full(shape, 0.5, ml_dtypes.bfloat16)) for name, shape in shapes.items())
    disk.write_shards(tmp_path, arrays, {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}, "100MB")
    found = run(MEMORY, tmp_path)
    assert found["total"] > 3.5e8
    assert found["beyond"] <= 2 * found["largest"], found
    found = run(MEMORY + SAVED, tmp_path)
    assert found["beyond"] < 6e7, found
