"""Small odd Hugging Face checkpoints, every weight perturbed: at initialisation norms are 1 and biases 0, and errors in them unseen."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tests.torch_required import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

PAD, BOS, EOS, UNK, IMAGE = range(5)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
VOCAB = 72  # USER:, ASSISTANT: and the words t7..t70; the last rows of the embedding stand for no token, as in padded vocabularies

TEXT = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)  # fmt: skip

# Every one odd in another way. The rope ones are shorter than the rows that the tests feed, so that scaling shows.
LLAMA = {
    "gqa": {},
    "mha_tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "mqa_head_dim": dict(num_key_value_heads=1, head_dim=10, num_hidden_layers=3),
    "biases": dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "rope_theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 50.0}, head_dim=12),
    "gelu": dict(hidden_act="gelu_pytorch_tanh"),
    "llama3": dict(head_dim=16, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
    "dynamic": dict(max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "yarn": dict(head_dim=16, max_position_embeddings=64,
                 rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}),
    "yarn_mscale": dict(head_dim=16, max_position_embeddings=64,
                        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
                                         "mscale": 0.8, "mscale_all_dim": 0.6, "beta_fast": 16, "beta_slow": 2, "truncate": False}),
}  # fmt: skip

VISION = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3, image_size=12, patch_size=4)
LLAVA = {
    "penultimate": dict(),
    "full": dict(vision_feature_select_strategy="full", vision_feature_layer=-1, layout="fresh"),
    "first_tied": dict(vision_feature_layer=1, text=dict(tie_word_embeddings=True), layout="v4_52"),
    "two_layers": dict(vision_feature_layer=[-2, 1]),
    "no_bias": dict(multimodal_projector_bias=False, projector_hidden_act="relu", vision=dict(hidden_act="gelu"), text=LLAMA["llama3"]),
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def tokenizer():
    """A word-level tokenizer of 70 words: `t7` .. `t69` and the roles of the chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + ["USER:", "ASSISTANT:"] + [f"t{i}" for i in range(7, 70)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<image>"}, model_max_length=1024,
    )  # fmt: skip


def perturb(model, scale: float = 0.3, seed: int = 0):
    """Add seeded noise to every parameter, in place, drawn in the order of the names so that two builds agree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
    return model


def save_llama(folder: Path, *, scale: float = 0.3, seed: int = 0, **overrides) -> Path:
    """Write a Llama with a tokenizer to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = perturb(LlamaForCausalLM(LlamaConfig(**{**TEXT, **overrides})), scale, seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_llava(folder: Path, *, scale: float = 0.3, seed: int = 0, layout: str = "hub", text=None, vision=None, **overrides) -> Path:
    """Write a LLaVA with its processor to `folder`, the weights under the names of one of the three layouts in use.

    Args:
        layout: "hub" (`language_model.model`, `vision_tower.vision_model`), "fresh" (no `vision_model`) or "v4_52" (all under `model`).
        text, vision: overrides of the two inner configs.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    text_config = LlamaConfig(**{**TEXT, **(text or {})})
    vision_config = CLIPVisionConfig(**{**VISION, **(vision or {})})
    strategy = overrides.get("vision_feature_select_strategy", "default")
    features = (vision_config.image_size // vision_config.patch_size) ** 2 + (strategy == "full")
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=IMAGE, image_seq_length=features, pad_token_id=PAD,
        tie_word_embeddings=text_config.tie_word_embeddings, **overrides,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = perturb(LlavaForConditionalGeneration(config), scale, seed)
    model.save_pretrained(folder)
    relayout(folder, layout)
    size = vision_config.image_size
    processor = LlavaProcessor(
        image_processor=image_processor(size), tokenizer=tokenizer(), patch_size=vision_config.patch_size,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def image_processor(size: int):
    """CLIP's preprocessing for a square of `size` pixels, by PIL."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def memory_name(name: str) -> str:
    """The name of a LLaVA tensor in any layout on disk -> its name in memory (`named_parameters`), without `vision_model`."""
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^(?=vision_tower|multi_modal_projector)", "model.", name)
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def hub_name(name: str) -> str:
    """The name of a LLaVA tensor in memory -> its name in the layout of the Hub, which an exporter writes."""
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^model\.(?=vision_tower|multi_modal_projector)", "", name)
    return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)


def relayout(folder: Path, layout: str) -> None:
    """Rename the tensors of a LLaVA folder to `layout`, whatever layout they are in."""
    from safetensors.torch import load_file, save_file

    rename = {
        "hub": hub_name,
        "fresh": lambda name: hub_name(name).replace("vision_tower.vision_model.", "vision_tower."),
        "v4_52": lambda name: memory_name(name).replace("vision_tower.", "vision_tower.vision_model."),
    }[layout]
    file = Path(folder) / "model.safetensors"
    tensors = {rename(memory_name(name)): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def load_hf(folder: Path, dtype=torch.float32):
    """The checkpoint as transformers' model, in plain attention, every tensor accounted for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = json.loads((Path(folder) / "config.json").read_text())
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert AutoConfig.from_pretrained(folder).model_type == config["model_type"]
    return model


def rename_parameters(model) -> dict[str, torch.nn.Parameter]:
    """The parameters of a transformers model by their name on disk (the Hub's layout for LLaVA)."""
    rename = hub_name if hasattr(model.config, "vision_config") else (lambda name: name)
    return {rename(name): parameter for name, parameter in model.named_parameters()}
