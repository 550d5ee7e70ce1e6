"""A model put together from a decoder and a tower: a LLaVA where that can hold it, otherwise a family of our own; both train."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aligner
from aligner.convert import __main__ as command
from aligner.convert import model_from_folder
from aligner.models import llava
from aligner.models.attention import Spec, attention
from aligner.trees import flatten
from scripts import make_tiny_checkpoint
from tests.models import tiny
from tests.torch_required import torch


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Llama with its tokenizer, and a CLIP with its text tower and image processor."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("parts")
    make_tiny_checkpoint.make_llama(folder / "text", vocab_size=300, hidden_size=16, heads=2, kv_heads=2)
    torch.manual_seed(0)
    vision = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, max_position_embeddings=8)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "vision")
    return folder


def build(parts, out, *more):
    arguments = ["build", "--text", str(parts / "text"), "--vision", str(parts / "vision"), "--out", str(out), *more]
    assert command.main(arguments) == 0
    return out


@pytest.mark.slow
def test_with_two_layers_it_is_a_llava(parts, tmp_path, capsys):
    from transformers import CLIPModel, LlavaForConditionalGeneration

    out = build(parts, tmp_path / "out")
    assert "as llava" in capsys.readouterr().out
    theirs, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tower = CLIPModel.from_pretrained(parts / "vision").vision_model
    assert all(torch.equal(ours, was) for ours, was in zip(theirs.model.vision_tower.state_dict().values(), tower.state_dict().values()))
    model, params = aligner.load(out)
    image, rng = model.media.placeholder, np.random.default_rng(0)
    ids = np.concatenate([[5, 6], [image] * model.media.features, rng.integers(5, 290, 6)])[None]
    pixels = rng.standard_normal((1, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    found = np.asarray(model.logits(params, {"input_ids": ids, "pixel_values": pixels}))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("projector", ("linear", "transformer", "perceiver"))
def test_other_projectors_are_saved_and_loaded_and_get_gradients(parts, tmp_path, projector):
    out = build(parts, tmp_path / "out", "--projector", projector, "--latents", "3", *(["--mmca"] if projector == "linear" else []))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "vision_llm" and config["projector"] == projector
    model, params = aligner.load(out)
    assert model.media.features == (3 if projector == "perceiver" else 4)
    aligner.save(model, params, tmp_path / "copy")
    again = flatten(aligner.load(tmp_path / "copy")[1])
    assert all(np.array_equal(leaf, again[path]) for path, leaf in flatten(params).items())
    batch = tiny.as_arrays(image_batch(model))
    run = lambda params: jnp.sum(jnp.sin(model.apply(params, batch, features=model.encode(params, batch)).hidden))
    grads = flatten(tiny.quick(jax.grad(run))(params))
    assert all(np.abs(grad).max() > 0 for path, grad in grads.items() if path.startswith("multi_modal_projector") and "k_proj/bias" not in path)


def image_batch(model):
    image, size = model.media.placeholder, model.media.height
    ids = np.array([[5, 6, *[image] * model.media.features, 7, 8, 9]])
    return model.inputs({"input_ids": ids, "pixel_values": np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)})


@pytest.mark.slow
def test_a_linear_projector_is_one_matrix(parts, tmp_path):
    model = model_from_folder(build(parts, tmp_path / "out", "--projector", "linear"))
    params = tiny.as_arrays(tiny.perturbed(model))
    batch = image_batch(model)
    mlp = dataclasses.replace(model.config, projector="mlp")
    selected = llava.select(mlp, params, batch["pixel_values"][0], "vision_tower/vision_model", {}, "none")
    matrix = params["multi_modal_projector"]["linear"]
    np.testing.assert_allclose(model.encode(params, batch)[0], (selected @ matrix["kernel"] + matrix["bias"])[0], atol=1e-4)


@pytest.mark.slow
def test_a_tower_whose_names_have_no_prefix(parts, tmp_path):
    """DINOv2's start with `embeddings` and `encoder`; the processor writes as many image tokens as it has features, registers too."""
    from PIL import Image
    from transformers import AutoProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, num_register_tokens=3)
    tower = Dinov2WithRegistersModel(config)
    tower.save_pretrained(tmp_path / "vision")
    shutil.copy(parts / "vision" / "preprocessor_config.json", tmp_path / "vision")
    out = build(parts, tmp_path / "out", "--vision", str(tmp_path / "vision"))
    theirs = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    made = theirs.model.vision_tower.state_dict()
    assert all(torch.equal(made[name], was) for name, was in tower.state_dict().items())
    model, params = aligner.load(out)
    inputs = AutoProcessor.from_pretrained(out)(text="<image> What is it?", images=Image.new("RGB", (20, 30)), return_tensors="pt")
    assert (inputs["input_ids"] == model.media.placeholder).sum() == model.media.features == 4 + 3
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    found = np.asarray(model.logits(params, {name: value.numpy() for name, value in inputs.items()}))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


# ---- MMCA


def test_text_reads_text_and_images_by_two_softmaxes():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 6, 2, 4)), jnp.float32) for _ in range(3))
    media = np.array([False, True, True, False, True, False])
    ones = jnp.ones((1, 6), jnp.int32)
    spec = Spec(ones, 0 * ones, jnp.arange(6)[None], media=jnp.asarray(media)[None])
    found = attention(q, k, v, spec, scale=0.5)[0]
    expected = np.zeros((6, 2, 4))
    for head in range(2):
        logits = 0.5 * np.asarray(q)[0, :, head] @ np.asarray(k)[0, :, head].T
        for t in range(6):
            for kind in ([True] if media[t] else [False, True]):
                seen = np.flatnonzero((media == kind) & (np.arange(6) <= t))
                if len(seen):  # the first token sees no image: nothing is added, not an even share of what it may not see
                    weight = np.exp(logits[t, seen] - logits[t, seen].max())
                    expected[t, head] += weight / weight.sum() @ np.asarray(v)[0, seen, head]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_images_it_is_plain_attention():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 5, 2, 4)), jnp.float32) for _ in range(3))
    ones = jnp.ones((1, 5), jnp.int32)
    spec = Spec(ones, 0 * ones, jnp.arange(5)[None])
    split = spec.replace(media=jnp.zeros((1, 5), bool))
    np.testing.assert_allclose(attention(q, k, v, split, scale=0.5), attention(q, k, v, spec, scale=0.5), atol=1e-6)
