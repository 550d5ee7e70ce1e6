"""Logits and gradients against transformers, through saved folders, on odd configs with every weight perturbed."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import aligner
from tests.everyday import everyday
from tests.golden.checkpoints import BOS, LLAMA, LLAVA, PAD, VOCAB, load_hf, rename_parameters, save_llama, save_llava
from tests.golden.compare import by_name, relative
from tests.models import tiny
from tests.torch_required import torch

BARS = {"float32": 1e-4, "float64": 1e-5}  # of logits, times max(1, max|logit|); and of gradients, relative


def precision(dtype: str):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def text_rows(padding: str) -> dict[str, np.ndarray]:
    """Rows of 24, 17 and 5 tokens, longer than the `original_max_position_embeddings` of the rope configs."""
    rng = np.random.default_rng(0)
    rows = [[BOS, *rng.integers(7, VOCAB, length - 1)] for length in (24, 17, 5)]
    fill = [[0] * (24 - len(row)) for row in rows]
    left = padding == "left"
    ids = [f + row if left else row + f for row, f in zip(rows, fill)]
    mask = [f + [1] * len(row) if left else [1] * len(row) + f for row, f in zip(rows, fill)]
    assert PAD == 0
    return {"input_ids": np.array(ids), "attention_mask": np.array(mask)}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (15, 19, 3), dtype=np.uint8))


def vision_rows(folder, padding: str) -> dict[str, np.ndarray]:
    """One image, none, and two with words between them, as the folder's own processor gives them."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    texts = ["<s>USER: <image> t8 t9 ASSISTANT: t20 </s>", "<s>USER: t8 t30 t31 ASSISTANT: t12", "<s>USER: t9 <image> t10 <image> t11"]
    images = [[picture(0)], [], [picture(1), picture(2)]]
    rows = processor(images=images, text=texts, padding=True, padding_side=padding, return_tensors="np", add_special_tokens=False)
    return dict(rows)


def torch_logits(model, rows, dtype: str) -> torch.Tensor:
    inputs = {name: torch.as_tensor(value) for name, value in rows.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
    if dtype == "float64":
        # transformers masks with the least float64 and takes softmax in float32, where that is -inf: a fully masked row, as left
        # padding has them, becomes NaN. The same mask, already made, with a number that float32 holds.
        length = inputs["input_ids"].shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal & inputs["attention_mask"][:, None, None].bool()
        inputs["attention_mask"] = torch.where(allowed, 0.0, -1e30).to(torch.float64)
    return model(**inputs, use_cache=False).logits


def check(folder, rows, dtype: str, gradients_of=()) -> None:
    """Logits at real positions, and gradients of `sum(logits * fixed weights)` over them, by our load and by transformers'."""
    real = rows["attention_mask"].astype(bool)
    theirs = load_hf(folder, getattr(torch, dtype))
    expected = torch_logits(theirs, rows, dtype)
    weights = np.random.default_rng(1).standard_normal(expected.shape) * real[..., None] / real.sum()
    with precision(dtype):
        model, params = aligner.load(folder, dtype=dtype)
        batch = model.inputs(rows)  # NumPy work, so outside what is compiled
        traced = dataclasses.replace(model, inputs=lambda _: batch)

        def scalar(params):
            logits = traced.logits(params, rows)
            return jnp.sum(logits * jnp.asarray(weights, logits.dtype)), logits

        run = jax.value_and_grad(scalar, has_aux=True) if gradients_of else lambda params: (scalar(params), None)
        (_, logits), gradients = tiny.quick(run)(params)
        assert logits.dtype == dtype and logits.shape == expected.shape
        logits = np.asarray(logits)
    compared = expected.detach().numpy()[real]
    error = np.abs(logits[real] - compared).max() / max(1.0, np.abs(compared).max())
    assert error <= BARS[dtype], f"logits: {error:.1e}"
    if gradients_of:
        (expected * torch.as_tensor(weights, dtype=expected.dtype)).sum().backward()
        ours, tensors = by_name(model, gradients), rename_parameters(theirs)
        assert set(ours) == set(tensors)
        for name in gradients_of:
            error = relative(ours[name], tensors[name].grad.numpy())
            assert error <= BARS[dtype], f"gradient of {name}: {error:.1e}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a config -> its folder, made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: save_llama(root / name, **config) for name, config in LLAMA.items()}
    return made | {f"llava_{name}": save_llava(root / f"llava_{name}", **config) for name, config in LLAVA.items()}


TEXT_GRADIENTS = ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.0.post_attention_layernorm.weight")
VISION_GRADIENTS = (
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.linear_1.weight",
    "language_model.model.layers.1.mlp.down_proj.weight",
)


@pytest.mark.parametrize("name", everyday(LLAMA, "gqa", "llama3", "mqa_head_dim"))
def test_llama(folders, name):
    for rows in unpadded(text_rows("right")) if name == "dynamic" else [text_rows("right")]:
        check(folders[name], rows, "float32")
        check(folders[name], rows, "float64", TEXT_GRADIENTS)


def unpadded(rows):
    """Each row alone: transformers' dynamic rope goes by the padded length of a batch, ours by the text's own."""
    for row, mask in enumerate(rows["attention_mask"]):
        yield {name: array[row : row + 1, : mask.sum()] for name, array in rows.items()}


@pytest.mark.parametrize("name", everyday(["gqa", "llama3"], "gqa"))
def test_llama_left_padding(folders, name):
    check(folders[name], text_rows("left"), "float32", TEXT_GRADIENTS)
    check(folders[name], text_rows("left"), "float64")


def test_llama_left_padding_with_position_ids(folders):
    rows = text_rows("left")
    rows["position_ids"] = np.maximum(np.cumsum(rows["attention_mask"], axis=1) - 1, 0)
    check(folders["gqa"], rows, "float32")


@pytest.mark.parametrize("name", everyday(LLAVA, "penultimate"))
def test_llava(folders, name):
    folder = folders[f"llava_{name}"]
    check(folder, vision_rows(folder, "right"), "float32")
    check(folder, vision_rows(folder, "right"), "float64", VISION_GRADIENTS)


@pytest.mark.slow
def test_llava_left_padding(folders):
    folder = folders["llava_penultimate"]
    check(folder, vision_rows(folder, "left"), "float32", VISION_GRADIENTS)
    check(folder, vision_rows(folder, "left"), "float64")


def test_llava_without_images(folders):
    check(folders["llava_penultimate"], text_rows("right"), "float32", ["language_model.model.layers.1.mlp.down_proj.weight"])


def test_a_wrong_norm_would_be_seen(folders):
    """The perturbation does its work: leaving one norm's weight at 1 moves the logits far past the bar."""
    model, params = aligner.load(folders["gqa"])
    logits = model.logits(params, text_rows("right"))
    params["model"]["norm"]["scale"] = jnp.ones_like(params["model"]["norm"]["scale"])
    assert np.abs(model.logits(params, text_rows("right")) - logits).max() > 0.1
