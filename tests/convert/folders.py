"""Small checkpoint folders made without PyTorch: a config, and weights from a seeded random tree."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from aligner import convert

LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, rms_norm_eps=1e-5,
)  # fmt: skip
VISION = dict(
    model_type="clip_vision_model", hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=4,
    patch_size=2,
)  # fmt: skip
LLAVA = dict(
    model_type="llava", architectures=["LlavaForConditionalGeneration"], text_config=LLAMA, vision_config=VISION, image_token_index=20,
    image_seq_length=4, tie_word_embeddings=False, torch_dtype="float32",
)  # fmt: skip


def make(folder: Path, config=LLAMA, dtype="float32", seed=0, max_shard_size="5GB", **overrides):
    """Write a folder; returns (model, params)."""
    blank = folder.with_name(folder.name + "-config")
    blank.mkdir(parents=True)
    (blank / "config.json").write_text(json.dumps({**config, **overrides}))
    (blank / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    model = convert.model_from_folder(blank)
    params = random_params(model, seed)
    convert.save(model, params, folder, dtype=dtype, max_shard_size=max_shard_size)
    return model, params


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), convert.abstract_params(model))


def edit(folder: Path, change):
    """Rewrite model.safetensors with `change(tensors)` applied, without our mark."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def assert_same(a, b):
    """Trees with the same paths, shapes, dtypes and bits."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape, path
        assert a[path].tobytes() == b[path].tobytes(), path
