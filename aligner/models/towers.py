"""Vision towers: how each Hugging Face config sets the vision transformer's flags, and what its checkpoint calls the parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from aligner.models import families
from aligner.models.layers import ACTIVATIONS
from aligner.models.vision import VisionConfig
from aligner.types import UserError


def common(hf: Any, **flags: Any) -> VisionConfig:
    """What nearly all configs say alike; `flags` is what the tower says."""
    said = {field.name: getattr(hf, field.name) for field in dataclasses.fields(VisionConfig)[:10] if hasattr(hf, field.name)}
    said |= {name: value[0] for name in ("image_size", "patch_size") if len(set(value := _pair(said.get(name)))) == 1}
    config = VisionConfig(**said | flags)
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act {config.hidden_act!r} of the vision config is not supported; known: {', '.join(ACTIVATIONS)}")
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise UserError(f"image_size {config.image_size} and patch_size {config.patch_size} of the vision config must be square")
    return config


def _pair(size: Any) -> tuple:
    return tuple(size) if isinstance(size, (list, tuple)) else (size,)


def clip(hf: Any) -> VisionConfig:
    return common(hf)


def siglip(hf: Any) -> VisionConfig:
    return common(hf, class_token="", patch_bias=True, pre_norm=False, pooling_head=getattr(hf, "vision_use_head", True))


def dinov2(hf: Any) -> VisionConfig:
    width = int(hf.hidden_size * hf.mlp_ratio)
    gated = dict(gated_mlp=True, hidden_act="silu", intermediate_size=(int(width * 2 / 3) + 7) // 8 * 8)
    return common(
        hf,
        **dict(intermediate_size=width) | (gated if hf.use_swiglu_ffn else {}),
        class_token="cls_token",
        registers=getattr(hf, "num_register_tokens", 0),
        positions="position_embeddings",
        patch_bias=True,
        pre_norm=False,
        qkv_bias=hf.qkv_bias,
        layer_scale=True,
        mask_token=getattr(hf, "use_mask_token", True),
    )


def pixtral(hf: Any) -> VisionConfig:
    none = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "post_norm"), False)
    return common(
        hf, class_token="", positions="", rope="interleaved", rope_theta=hf.rope_parameters["rope_theta"], norm="rms", layer_norm_eps=1e-5,
        gated_mlp=True, **none,
    )  # fmt: skip


def internvl(hf: Any) -> VisionConfig:
    if not hf.use_absolute_position_embeddings or hf.use_mask_token:
        raise UserError("an internvl vision config without absolute positions, or with a mask token, is not implemented")
    return common(
        hf,
        class_token="cls_token",
        positions="position_embeddings",
        patch_bias=True,
        norm=hf.norm_type.removesuffix("_norm"),
        pre_norm=False,
        post_norm=not hf.use_mean_pooling,
        qkv_bias=hf.attention_bias,
        qk_norm=hf.use_qk_norm,
        layer_scale=True,
    )


def idefics(hf: Any) -> VisionConfig:
    return common(hf, class_token="", patch_bias=True, pre_norm=False, places_by_fraction=True)


def qwen(hf: Any, **flags: Any) -> VisionConfig:
    """What the Qwen-VL towers share: patches that span two frames, turned by row and column."""
    said = dict(
        num_hidden_layers=hf.depth, num_attention_heads=hf.num_heads, num_channels=hf.in_channels, image_size=hf.patch_size,
        layer_norm_eps=1e-6, frames=hf.temporal_patch_size, class_token="", positions="", rope="halves",
        rope_theta=hf.rope_parameters["rope_theta"], pre_norm=False, post_norm=False,
    )  # fmt: skip
    return common(hf, **said | flags)


def qwen2(hf: Any) -> VisionConfig:
    return qwen(hf, hidden_size=hf.embed_dim, intermediate_size=int(hf.embed_dim * hf.mlp_ratio))


def qwen2_5(hf: Any) -> VisionConfig:
    return qwen(hf, norm="rms", gated_mlp=True, groups_of_layer=tuple(int(i not in hf.fullatt_block_indexes) for i in range(hf.depth)))


def qwen3(hf: Any) -> VisionConfig:
    return qwen(hf, patch_bias=True, positions="position_embedding", num_positions=hf.num_position_embeddings)


READERS: dict[str, Callable[[Any], VisionConfig]] = {
    "clip_vision_model": clip,
    "siglip_vision_model": siglip,
    "dinov2": dinov2,
    "dinov2_with_registers": dinov2,
    "pixtral": pixtral,
    "idefics2_vision": idefics,
    "idefics3_vision": idefics,
    "smolvlm_vision": idefics,
    "internvl_vision": internvl,
    "qwen2_vl_vision": qwen2,
    "qwen2_5_vl_vision": qwen2_5,
    "qwen3_vl_vision": qwen3,
}

_LAYERS = {"encoder/layers": "encoder.layers.{i}"}
_DINO = {
    "embeddings/patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder/layers": "encoder.layer.{i}",
    "encoder/layers/layer_norm1": "encoder.layer.{i}.norm1",
    "encoder/layers/layer_norm2": "encoder.layer.{i}.norm2",
    "encoder/layers/self_attn/q_proj": "encoder.layer.{i}.attention.attention.query",
    "encoder/layers/self_attn/k_proj": "encoder.layer.{i}.attention.attention.key",
    "encoder/layers/self_attn/v_proj": "encoder.layer.{i}.attention.attention.value",
    "encoder/layers/self_attn/out_proj": "encoder.layer.{i}.attention.output.dense",
    "encoder/layers/mlp/down_proj": "encoder.layer.{i}.mlp.weights_out",
    "post_layernorm": "layernorm",
}
_QWEN = {
    "embeddings/patch_embedding": "patch_embed.proj",
    "encoder/layers": "blocks.{i}",
    "encoder/layers/layer_norm1": "blocks.{i}.norm1",
    "encoder/layers/layer_norm2": "blocks.{i}.norm2",
    "encoder/layers/self_attn/out_proj": "blocks.{i}.attn.proj",
}
# Where our tree's names are not the checkpoint's: tree prefix -> prefix on disk.
NAMES: dict[str, Mapping[str, str]] = {
    "clip_vision_model": _LAYERS,
    "siglip_vision_model": _LAYERS,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "idefics2_vision": _LAYERS,
    "idefics3_vision": _LAYERS,
    "smolvlm_vision": _LAYERS,
    "internvl_vision": {
        "embeddings/patch_embedding": "embeddings.patch_embeddings.projection",
        "encoder/layers": "encoder.layer.{i}",
        "encoder/layers/layer_norm1": "encoder.layer.{i}.layernorm_before",
        "encoder/layers/layer_norm2": "encoder.layer.{i}.layernorm_after",
        "encoder/layers/self_attn": "encoder.layer.{i}.attention",
        "encoder/layers/self_attn/out_proj": "encoder.layer.{i}.attention.projection_layer",
        "post_layernorm": "layernorm",
    },
    "qwen2_vl_vision": _QWEN,
    "qwen2_5_vl_vision": _QWEN,
    "qwen3_vl_vision": {
        **_QWEN,
        "embeddings/position_embedding": "pos_embed",
        "encoder/layers/mlp/fc1": "blocks.{i}.mlp.linear_fc1",
        "encoder/layers/mlp/fc2": "blocks.{i}.mlp.linear_fc2",
    },
    "pixtral": {
        "embeddings/patch_embedding": "patch_conv",
        "pre_layrnorm": "ln_pre",
        "encoder/layers": "transformer.layers.{i}",
        "encoder/layers/layer_norm1": "transformer.layers.{i}.attention_norm",
        "encoder/layers/layer_norm2": "transformer.layers.{i}.ffn_norm",
        "encoder/layers/self_attn": "transformer.layers.{i}.attention",
        "encoder/layers/self_attn/out_proj": "transformer.layers.{i}.attention.o_proj",
        "encoder/layers/mlp": "transformer.layers.{i}.feed_forward",
    },
}
_QKV = tuple(f"encoder/layers/self_attn/{name}_proj" for name in "qkv")
_GATED = ("encoder/layers/mlp/gate_proj", "encoder/layers/mlp/up_proj")
_ROWS = ("split", "copy", 0)
_COLUMNS = ("split", "transpose", 0)
_DINO_FUSED = (
    ("encoder.layer.{i}.mlp.weights_in", "weight", _GATED, _COLUMNS),
    ("encoder.layer.{i}.mlp.weights_in", "bias", _GATED, _ROWS),
)
_QWEN_FUSED = (("blocks.{i}.attn.qkv", "weight", _QKV, _COLUMNS), ("blocks.{i}.attn.qkv", "bias", _QKV, _ROWS))
# Projections that the checkpoint holds as one tensor, and leaves under other names: (name, what of it, our modules, operation).
FUSED: dict[str, tuple] = {
    "dinov2": _DINO_FUSED,
    "dinov2_with_registers": _DINO_FUSED,
    "qwen2_vl_vision": _QWEN_FUSED,
    "qwen2_5_vl_vision": _QWEN_FUSED,
    "qwen3_vl_vision": _QWEN_FUSED,
    "internvl_vision": (
        ("encoder.layer.{i}", "lambda_1", ("encoder/layers/layer_scale1/lambda1",), "copy"),
        ("encoder.layer.{i}", "lambda_2", ("encoder/layers/layer_scale2/lambda1",), "copy"),
    ),
}
IGNORED = (r"embeddings\.position_ids$", r"^(.*\.)?vision_(tower|model)\.(vision_model\.)?head\.")  # SigLIP's pooling head is not used


# Fields of a tower's config that need not be read here: they are the business of what uses its features, of pre-training, or of dropout.
UNREAD = families.UNREAD | {
    *("projection_dim", "initializer_factor", "layerscale_value", "layer_scale_init_value", "vocab_size"),
    *("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"),
    *("head_dim", "drop_path_rate", "attention_probs_dropout_prob", "hidden_dropout_prob", "projection_dropout"),
    *("hidden_size", "out_hidden_size", "spatial_merge_size", "window_size", "tokens_per_second", "deepstack_visual_indexes"),
}


def read(hf: Any) -> VisionConfig:
    """A tower's flags from its Hugging Face config; what it does not implement is refused by name."""
    return families.read(READERS[hf.model_type], hf, UNREAD)


def names(tower: str, tree: str, disk: str) -> tuple[dict[str, str], tuple]:
    """(stacks, exceptions) of a Conversion for a tower that stands at `tree` (such as "vision_tower/") and at `disk` in names."""
    stacks = {tree.rstrip("/"): disk.rstrip("."), **{tree + ours: disk + theirs for ours, theirs in NAMES[tower].items()}}
    leaf_of = lambda module, what: module if what.startswith("lambda") else f"{module}/{'kernel' if what == 'weight' else what}"
    exceptions = tuple(
        (f"{disk}{name}.{what}", tuple(tree + leaf_of(module, what) for module in modules), operation)
        for name, what, modules, operation in FUSED.get(tower, ())
    )
    return stacks, exceptions
