"""Folders that `transformers` wrote and reads: the oracle of names, layouts and bytes."""

import filecmp
import json
import os
import re
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aligner import convert
from aligner.convert.verify import verify
from scripts.make_tiny_checkpoint import make_llava
from tests.convert.folders import assert_same
from tests.resume.runs import ROOT
from tests.torch_required import torch

TEXT = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
VISION = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def perturbed(model, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.to(DTYPES[dtype])


def llama(dtype="float32", **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    return perturbed(LlamaForCausalLM(LlamaConfig(**{**TEXT, **overrides})), dtype)


def llava(dtype="float32", **text):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**{**TEXT, **text}), image_token_index=40, image_seq_length=4,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )  # fmt: skip
    return perturbed(LlavaForConditionalGeneration(config), dtype)


def in_our_layout(folder):
    """Rename a fresh save's vision tower to what the Hub's checkpoints call it."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


CASES = {
    "untied": (llama, {}),
    "tied": (llama, dict(tie_word_embeddings=True)),
    "bias": (llama, dict(attention_bias=True, mlp_bias=True, head_dim=6)),
    "llava": (llava, {}),
    "llava-tied": (llava, dict(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path, case, dtype):
    make, overrides = CASES[case]
    original = make(dtype, **overrides)
    original.save_pretrained(tmp_path / "a")
    if make is llava:
        in_our_layout(tmp_path / "a")
    model, params = convert.load(tmp_path / "a")
    assert model.source_dtype == dtype
    convert.save(model, params, tmp_path / "b")
    assert_same(*[load_file(tmp_path / x / "model.safetensors") for x in "ab"])
    for file in ("config.json", "generation_config.json"):
        assert filecmp.cmp(tmp_path / "a" / file, tmp_path / "b" / file, shallow=False)
    again, info = type(original).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same_state(original, again)
    assert not verify(tmp_path / "a", dry_run=True).renamed


def test_fresh_save_in_shards(tmp_path):
    """The layout that transformers 5 writes by itself, in several files; and our shards, read by it."""
    original = llava("bfloat16")
    original.save_pretrained(tmp_path / "a", max_shard_size="8KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    report = verify(tmp_path / "a", scratch=tmp_path)
    assert not report.different and report.renamed > 0 and report.tensors == len(original.state_dict())
    model, params = convert.load(tmp_path / "a")
    convert.save(model, params, tmp_path / "b", max_shard_size="8KB")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 2 for p in original.parameters())
    same_state(original, type(original).from_pretrained(tmp_path / "b"))


def test_a_second_cast_of_dtype_is_torchs(tmp_path):
    original = llama()
    original.save_pretrained(tmp_path / "a")
    model, params = convert.load(tmp_path / "a")
    convert.save(model, params, tmp_path / "b", dtype="bfloat16")
    again = type(original).from_pretrained(tmp_path / "b", dtype="auto")
    same_state(original.to(torch.bfloat16), again)
    assert again.config.dtype == torch.bfloat16


def test_special_values_keep_their_bits(tmp_path):
    """Signed zero, infinities, subnormals and every NaN that a cast there and back keeps."""
    llama("bfloat16").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    bits = np.array([0x8000, 0x7F80, 0xFF80, 0x0001, 0x8001, 0x7FC0, 0xFFC0, 0x7F7F], np.uint16)
    tensors["model.norm.weight"].view(np.uint16)[:8] = bits
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    assert not verify(tmp_path / "a", scratch=tmp_path).different
    model, params = convert.load(tmp_path / "a", dtype="float32")
    convert.save(model, params, tmp_path / "b")
    assert_same(tensors, load_file(tmp_path / "b" / "model.safetensors"))


WITHOUT = """
import sys
from aligner.convert import load, model_from_folder
from aligner.convert.assets import leave_pytorch_out
folder, settings, left_out = sys.argv[1:]
leave_pytorch_out('{"reward_funcs": ["my_rewards:short"]}')
assert "transformers" not in sys.modules, "nothing happens where a function may want it"
leave_pytorch_out(settings)
model, params = load(folder)
assert model.assets.tokenizer("a").input_ids
assert model.assets.processor.image_processor
assert ("torch" not in sys.modules) == (left_out == "yes")
import torch
assert torch.ones(2).sum() == 2
"""


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ('{"path": "gs://bucket/rows", "groups": [["(?:model|head)/.*", {"learning_rate": 2.0}]]}', "yes"),
        pytest.param('{"reward_funcs": ["my_rewards:short"]}', "no", marks=pytest.mark.slow),
    ],
)
def test_programs_leave_pytorch_out_unless_a_function_may_want_it(tmp_path, settings, left_out):
    make_llava(tmp_path, hidden_size=32, layers=1, heads=2, kv_heads=2, vision_hidden_size=16, vision_layers=2, vision_heads=2)
    command = [sys.executable, "-c", WITHOUT, tmp_path, settings, left_out]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
