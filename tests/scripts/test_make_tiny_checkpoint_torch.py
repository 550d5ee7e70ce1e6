"""PyTorch's classes load the checkpoints with nothing missing, left over or of another shape."""

import json

import pytest
from PIL import Image

from scripts.make_tiny_checkpoint import make_llama, make_llava, make_pictures
from tests.torch_required import torch


def assert_complete(info):
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info


def test_llava_loads_whole_and_sees(tmp_path):
    from safetensors import safe_open
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    make_llava(tmp_path / "model")
    make_pictures(tmp_path / "data", n_train=2, n_heldout=2)
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert_complete(info)
    with safe_open(tmp_path / "model/model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        prefixes = {name.rsplit(".layers.")[0].split(".")[0] for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert prefixes == {"language_model", "vision_tower", "multi_modal_projector"}
        assert "language_model.model.embed_tokens.weight" in file.keys() and "language_model.lm_head.weight" in file.keys()  # noqa: SIM118
        assert "vision_tower.vision_model.embeddings.class_embedding" in file.keys()  # noqa: SIM118

    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    images = [Image.open(tmp_path / "data" / row["image"]) for row in rows]
    text = [f"USER: <image>\n{rows[0]['question']} ASSISTANT: {rows[0]['chosen']}</s>"] * 2
    inputs = processor(images=images, text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all() and logits.abs().max() < 30
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-3  # the same words, another picture


@pytest.mark.parametrize("tied", [False, True])
def test_llama_loads_whole(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_llama(tmp_path / "model", hidden_size=24, intermediate_size=40, heads=4, kv_heads=1, layers=3, tie_word_embeddings=tied)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert_complete(info)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.num_hidden_layers == 3
    inputs = AutoTokenizer.from_pretrained(tmp_path / "model")("Which of these is better?", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
