"""Text families: how each Hugging Face config sets the decoder's flags, and where its checkpoint differs from the generic rule."""

import dataclasses
from collections.abc import Callable
from typing import Any

from aligner.models import rope
from aligner.models.decoder import DecoderConfig
from aligner.models.layers import ACTIVATIONS
from aligner.types import Conversion, UserError

IGNORED = (r"rotary_emb\.inv_freq$", r"\.attention\.(bias|masked_bias)$")


def common(hf: Any, **flags: Any) -> DecoderConfig:
    """What nearly all configs say alike; `flags` is what the family says."""
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    said = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        max_position_embeddings=hf.max_position_embeddings,
        norm_eps=getattr(hf, "rms_norm_eps", None) or getattr(hf, "layer_norm_eps", None),
        hidden_act=getattr(hf, "hidden_act", None) or getattr(hf, "hidden_activation", None),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        initializer_range=hf.initializer_range,
        qkv_bias=bool(getattr(hf, "attention_bias", False)),
        o_bias=bool(getattr(hf, "attention_bias", False)),
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        **windows(hf),
    )
    if "rope" not in flags:
        said |= dict(rope=(hf.rope_parameters,), rotary_fraction=hf.rope_parameters.get("partial_rotary_factor", 1.0))
    config = DecoderConfig(**said | flags)
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act {config.hidden_act!r} of the {hf.model_type} config is not supported; known: {', '.join(ACTIVATIONS)}")
    for parameters in filter(None, config.rope):
        rope.check(parameters)
    if getattr(hf, "use_bidirectional_attention", False):
        raise UserError(f"use_bidirectional_attention of the {hf.model_type} config is not supported; a causal model is needed")
    return config


def windows(hf: Any) -> dict[str, Any]:
    """Which layers slide a window over their keys."""
    size = getattr(hf, "sliding_window", None) if getattr(hf, "use_sliding_window", None) is not False else None
    kinds = getattr(hf, "layer_types", None)
    if size is None or (kinds and "sliding_attention" not in kinds):
        return {}
    if not kinds or "full_attention" not in kinds:
        return dict(windows=(size,))
    return dict(windows=(None, size), window_of_layer=tuple(int(kind == "sliding_attention") for kind in kinds))


def llama(hf: Any) -> DecoderConfig:
    return common(hf, rotary_fraction=1.0)


def qwen2(hf: Any) -> DecoderConfig:
    return common(hf, qkv_bias=True, o_bias=False)


def qwen3(hf: Any) -> DecoderConfig:
    return common(hf, qk_norm="head")


def gemma(hf: Any) -> DecoderConfig:
    return common(hf, norm="rms_plus_one", embedding_scale=hf.hidden_size**0.5)


def sandwich(hf: Any, **flags: Any) -> DecoderConfig:
    """Gemma 2 and later: norms before and after, a query scale of its own, soft caps where the config has them."""
    return common(
        hf,
        norm="rms_plus_one",
        embedding_scale=hf.hidden_size**0.5,
        attention_out_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out_norm="post_feedforward_layernorm",
        query_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=hf.attn_logit_softcapping,
        final_softcap=hf.final_logit_softcapping,
        **flags,
    )


def gemma3(hf: Any) -> DecoderConfig:
    names = [name for name in ("full_attention", "sliding_attention") if name in hf.layer_types]
    ropes = tuple(hf.rope_parameters[name] for name in names)  # each kind of layer has its own
    return sandwich(hf, qk_norm="head", rope=ropes, rope_of_layer=tuple(names.index(kind) for kind in hf.layer_types))


def phi3(hf: Any) -> DecoderConfig:
    return common(hf, qkv_bias=False, o_bias=False)


def phi(hf: Any) -> DecoderConfig:
    return common(
        hf,
        norm="layer",
        parallel=True,
        mlp_norm="",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm="head" if hf.qk_layernorm else "",
        qk_norm_names=("q_layernorm", "k_layernorm"),
        o_name="dense",
        mlp_names=("fc1", "fc2"),
        final_norm="final_layernorm",
    )


def glm(hf: Any) -> DecoderConfig:
    return common(hf, rotary_interleaved=True, o_bias=False)


def glm4(hf: Any) -> DecoderConfig:
    return dataclasses.replace(glm(hf), attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm")


def olmo2(hf: Any) -> DecoderConfig:
    return common(
        hf,
        norm="rms_wide",
        qk_norm="full",
        attention_norm="",
        attention_out_norm="post_attention_layernorm",
        mlp_norm="",
        mlp_out_norm="post_feedforward_layernorm",
    )


def smollm3(hf: Any) -> DecoderConfig:
    used = hf.no_rope_layers  # 1 where a layer rotates, in spite of the name
    return common(hf, rope=(hf.rope_parameters, None), rope_of_layer=tuple(int(not rotates) for rotates in used))


def granite(hf: Any) -> DecoderConfig:
    return common(
        hf,
        query_scale=hf.attention_multiplier,
        embedding_scale=hf.embedding_multiplier,
        residual_scale=hf.residual_multiplier,
        logits_scale=1 / hf.logits_scaling,
    )


FAMILIES: dict[str, Callable[[Any], DecoderConfig]] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": sandwich,
    "gemma3_text": gemma3,
    "phi": phi,
    "phi3": phi3,
    "glm": glm,
    "glm4": glm4,
    "olmo2": olmo2,
    "smollm3": smollm3,
    "granite": granite,
}

# Fused projections stand apart in our tree; the checkpoint holds them as one tensor.
_QKV = ("self_attn.qkv_proj.weight", ("self_attn/q_proj/kernel", "self_attn/k_proj/kernel", "self_attn/v_proj/kernel"))
_GATE_UP = ("mlp.gate_up_proj.weight", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"))
_FUSED = {"phi3": (_QKV, _GATE_UP), "glm": (_GATE_UP,), "glm4": (_GATE_UP,)}


def conversion(family: str, config: DecoderConfig, tree: str = "", names: str = "") -> Conversion:
    """How the decoder's tree maps to Hugging Face names.

    Args:
        family: `model_type`.
        config: what `FAMILIES[family]` read.
        tree: prefix of the decoder in a larger tree, such as "language_model/".
        names: the same of its tensors' names, such as "language_model.".
    """
    layers, stored = f"{tree}model/layers", f"{names}model.layers.{{i}}"
    fused = [(f"{stored}.{name}", tuple(f"{layers}/{path}" for path in paths)) for name, paths in _FUSED.get(family, ())]
    return Conversion(
        stacks={layers: stored},
        exceptions=tuple((name, paths, ("split", "transpose", 0)) for name, paths in fused),
        ignored=IGNORED,
        tied=((f"{names}lm_head.weight", f"{names}model.embed_tokens.weight"),) if config.tie_word_embeddings else (),
    )
