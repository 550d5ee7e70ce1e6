"""Text families: how each Hugging Face config sets the decoder's flags, and where its checkpoint differs from the generic rule."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from aligner.models import rope
from aligner.models.decoder import DecoderConfig
from aligner.models.layers import ACTIVATIONS
from aligner.models.moe import ExpertsConfig
from aligner.types import Conversion, UserError

IGNORED = (r"rotary_emb\.inv_freq$", r"\.(attention|attn)\.(bias|masked_bias)$")


def common(hf: Any, **flags: Any) -> DecoderConfig:
    """What nearly all configs say alike; `flags` is what the family says."""
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    said = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "intermediate_size", None),
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        max_position_embeddings=getattr(hf, "max_position_embeddings", None),
        norm_eps=getattr(hf, "rms_norm_eps", None) or getattr(hf, "layer_norm_eps", None),
        hidden_act=getattr(hf, "hidden_act", None) or getattr(hf, "hidden_activation", None),
        tie_word_embeddings=bool(getattr(hf, "tie_word_embeddings", False)),
        initializer_range=getattr(hf, "initializer_range", None),
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


def refuse(hf: Any, *fields: str, **values: Any) -> None:
    """Refuse a config in which one of `fields` is set, or has the value that is given for it."""
    for field, wrong in [(field, True) for field in fields] + [*values.items()]:
        if getattr(hf, field) == wrong:
            raise UserError(f"{field}={wrong} of the {hf.model_type} config is not implemented; choose a checkpoint without it")


def windows(hf: Any) -> dict[str, Any]:
    """Which layers slide a window over their keys."""
    size = getattr(hf, "sliding_window", None) if getattr(hf, "use_sliding_window", None) is not False else None
    kinds = getattr(hf, "layer_types", None)
    if unknown := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types of the {hf.model_type} config has {sorted(unknown)[0]!r}, which is not implemented")
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
    if hf.attn_logit_softcapping is not None:  # Hugging Face's model does not read it
        raise UserError(f"attn_logit_softcapping of the {hf.model_type} config is {hf.attn_logit_softcapping}; set it to null")
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
        scales_media=True,
        residual_scale=hf.residual_multiplier,
        logits_scale=1 / hf.logits_scaling,
    )


def old(hf: Any, **flags: Any) -> DecoderConfig:
    """What the families before Llama share: layer norms and biases everywhere, an MLP without a gate."""
    biases = dict(qkv_bias=True, o_bias=True, mlp_bias=True) | {name: flags.pop(name) for name in [*flags] if name.endswith("_bias")}
    return common(hf, norm="layer", gated_mlp=False, mlp_names=("fc1", "fc2"), **biases, **flags)


def gpt2(hf: Any) -> DecoderConfig:
    refuse(hf, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    return old(
        hf,
        rope=(),
        learned_positions=hf.n_positions,
        intermediate_size=hf.n_inner or 4 * hf.n_embd,
        hidden_act=hf.activation_function,
        norm_eps=hf.layer_norm_epsilon,
        query_scale=None if hf.scale_attn_weights else 1.0,
    )


def opt(hf: Any) -> DecoderConfig:
    refuse(hf, layer_norm_elementwise_affine=False)
    first, second, last = "self_attn_layer_norm", "final_layer_norm", "" if hf._remove_final_layer_norm else "norm"
    if hf.do_layer_norm_before:
        norms = dict(attention_norm=first, mlp_norm=second, final_norm=last)
    else:  # the 350m
        norms = dict(attention_norm="", mlp_norm="", attention_out_norm=first, mlp_out_norm=second, norm_sums=True, final_norm="")
    return old(
        hf,
        rope=(),
        learned_positions=hf.max_position_embeddings + 2,
        position_offset=2,
        positions_from_mask=True,
        intermediate_size=hf.ffn_dim,
        hidden_act=hf.activation_function,
        norm_eps=1e-5,
        initializer_range=hf.init_std,
        embedding_size=hf.word_embed_proj_dim if hf.word_embed_proj_dim != hf.hidden_size else None,
        qkv_bias=hf.enable_bias,
        o_bias=hf.enable_bias,
        mlp_bias=hf.enable_bias,
        **norms,
    )


def gpt_neox(hf: Any) -> DecoderConfig:
    return old(hf, parallel=hf.use_parallel_residual, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias)


def bloom(hf: Any) -> DecoderConfig:
    refuse(hf, "apply_residual_connection_post_layernorm")
    return old(
        hf,
        rope=(),
        alibi=True,
        embedding_norm="embed_layernorm",
        intermediate_size=4 * hf.hidden_size,
        max_position_embeddings=0,  # distances have no end
        hidden_act="gelu_pytorch_tanh",
        norm_eps=hf.layer_norm_epsilon,
    )


def baichuan(hf: Any) -> DecoderConfig:
    """Llama with one fused projection; the 13B, which says no number of positions, has ALiBi, the second generation a normalised head."""
    second = hf.vocab_size == 125696 or getattr(hf, "z_loss_weight", None) is not None
    config = common(hf, rotary_fraction=1.0, normalized_head=second)
    return config if hf.max_position_embeddings else dataclasses.replace(config, rope=(), alibi=True)


def register_configs() -> None:
    """Teach `AutoConfig` the families that `transformers` itself reads by code from the Hub only, and ours."""
    from transformers import AutoConfig, LlamaConfig, LlavaConfig

    class BaichuanConfig(LlamaConfig):
        model_type = "baichuan"
        max_position_embeddings: int = 0

    class VisionLLMConfig(LlavaConfig):
        model_type = "vision_llm"
        projector: str = "mlp"
        projector_latents: int = 64
        mmca: bool = False

    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    AutoConfig.register("vision_llm", VisionLLMConfig, exist_ok=True)


def mixtral(hf: Any) -> DecoderConfig:
    if hf.router_jitter_noise:
        raise UserError(f"router_jitter_noise={hf.router_jitter_noise} of the mixtral config is not implemented; set it to 0")
    return common(hf, rotary_fraction=1.0, experts=ExpertsConfig(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size, True,
                                                                 aux_coef=aux_coef(hf)))  # fmt: skip


def qwen_moe(hf: Any, **flags: Any) -> DecoderConfig:
    if hf.mlp_only_layers or hf.decoder_sparse_step != 1:
        raise UserError(
            f"the {hf.model_type} config has layers without experts (mlp_only_layers={hf.mlp_only_layers}, decoder_sparse_step="
            f"{hf.decoder_sparse_step}), which is not implemented; every layer must have them"
        )
    shared = getattr(hf, "shared_expert_intermediate_size", None)
    experts = ExpertsConfig(hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size, hf.norm_topk_prob, shared, aux_coef(hf))
    return common(hf, experts=experts, **flags)


def qwen2_moe(hf: Any) -> DecoderConfig:
    return qwen_moe(hf, qkv_bias=hf.qkv_bias, o_bias=False)


def qwen3_moe(hf: Any) -> DecoderConfig:
    return qwen_moe(hf, qk_norm="head")


def aux_coef(hf: Any) -> float:
    """The load-balance loss is on where the config asks for router logits, as in `transformers` and TRL."""
    return hf.router_aux_loss_coef if hf.output_router_logits else 0.0


# Fields that need not be read: they say what the weights are for, change nothing in training as TRL does it (which turns dropout off), or
# have gone into another field when the config was made.
UNREAD = frozenset(
    (
        *("architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("output_hidden_states", "return_dict", "use_cache", "is_decoder"),
        *("attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "hidden_dropout", "layerdrop", "resid_pdrop"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("chunk_size_feed_forward", "pretraining_tp", "slow_but_exact", "reorder_and_upcast_attn"),  # the same numbers in another order
        *("max_window_layers", "no_rope_layer_interval", "original_max_position_embeddings"),  # now in another field
        *("sliding_window", "router_aux_loss_coef"),  # read where use_sliding_window and output_router_logits say so
    )
)


class Recorded:
    """A config that knows which of its fields were read."""

    def __init__(self, hf: Any):
        self.hf, self.read = hf, set()

    def __getattr__(self, name: str) -> Any:
        self.read |= {name, self.hf.attribute_map.get(name, name)}
        return getattr(self.hf, name)


def read(family: Callable[[Any], Any], hf: Any, unread: frozenset[str] = UNREAD) -> Any:
    """What `family` makes of a Hugging Face config, such as the decoder's flags.

    Args:
        family: reads the config.
        hf: the config.
        unread: fields that need not be read.

    Raises:
        UserError: a field that the family does not read has another value than its default, or one that it reads has a value that is not
            implemented.
    """
    recorded = Recorded(hf)
    config = family(recorded)
    for field in dataclasses.fields(hf):
        value = getattr(hf, field.name)
        if field.name not in recorded.read | unread and value not in (field.default, None):
            raise UserError(f"{field.name}={value!r} of the {hf.model_type} config is not implemented; choose a checkpoint without it")
    return config


_READERS: dict[str, Callable[[Any], DecoderConfig]] = {
    "baichuan": baichuan,
    "bloom": bloom,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": llama,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gemma": gemma,
    "gemma2": sandwich,
    "gemma3_text": gemma3,
    "phi": phi,
    "phi3": phi3,
    "glm": glm,
    "glm4": glm4,
    "olmo2": olmo2,
    "opt": opt,
    "smollm3": smollm3,
    "granite": granite,
}
FAMILIES: dict[str, Callable[[Any], DecoderConfig]] = {name: functools.partial(read, reader) for name, reader in _READERS.items()}

# ---- where a checkpoint differs from the generic rule

# Where our tree's names are not the checkpoint's: tree prefix -> prefix on disk.
_NAMES = {
    "gpt2": {
        "model/embed_tokens": "transformer.wte",
        "model/embed_positions": "transformer.wpe",
        "model/norm": "transformer.ln_f",
        "model/layers": "transformer.h.{i}",
        "model/layers/input_layernorm": "transformer.h.{i}.ln_1",
        "model/layers/post_attention_layernorm": "transformer.h.{i}.ln_2",
        "model/layers/self_attn/o_proj": "transformer.h.{i}.attn.c_proj",
        "model/layers/mlp/fc1": "transformer.h.{i}.mlp.c_fc",
        "model/layers/mlp/fc2": "transformer.h.{i}.mlp.c_proj",
    },
    "gpt_neox": {
        "model/embed_tokens": "gpt_neox.embed_in",
        "model/norm": "gpt_neox.final_layer_norm",
        "model/layers": "gpt_neox.layers.{i}",
        "model/layers/self_attn/o_proj": "gpt_neox.layers.{i}.attention.dense",
        "model/layers/mlp/fc1": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "model/layers/mlp/fc2": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        "lm_head": "embed_out",
    },
    "bloom": {
        "model/embed_tokens": "transformer.word_embeddings",
        "model/embed_layernorm": "transformer.word_embeddings_layernorm",
        "model/norm": "transformer.ln_f",
        "model/layers": "transformer.h.{i}",
        "model/layers/self_attn/o_proj": "transformer.h.{i}.self_attention.dense",
        "model/layers/mlp/fc1": "transformer.h.{i}.mlp.dense_h_to_4h",
        "model/layers/mlp/fc2": "transformer.h.{i}.mlp.dense_4h_to_h",
    },
    "mixtral": {
        "model/layers/mlp": "model.layers.{i}.block_sparse_moe",
        "model/layers/mlp/experts/gate_proj": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "model/layers/mlp/experts/up_proj": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
        "model/layers/mlp/experts/down_proj": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
    },
    "qwen2_moe": {"model/layers/mlp/experts": "model.layers.{i}.mlp.experts.{e}"},
    "qwen3_moe": {"model/layers/mlp/experts": "model.layers.{i}.mlp.experts.{e}"},
    "opt": {
        "model": "model.decoder",
        "model/norm": "model.decoder.final_layer_norm",
        "model/layers": "model.decoder.layers.{i}",
        "model/layers/self_attn/o_proj": "model.decoder.layers.{i}.self_attn.out_proj",
        "model/layers/mlp": "model.decoder.layers.{i}",
    },
}

# Fused projections stand apart in our tree; the checkpoint holds them as one tensor: (name, what of it, leaves, operation).
_QKV = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
_GATE_UP = ("mlp.gate_up_proj", "weight", ("mlp/gate_proj", "mlp/up_proj"), ("split", "transpose", 0))


def _fused(family: str, heads: int) -> tuple:
    split = ("split", "transpose", 0)
    return {
        "phi3": (("self_attn.qkv_proj", "weight", _QKV, split), _GATE_UP),
        "glm": (_GATE_UP,),
        "glm4": (_GATE_UP,),
        "baichuan": (("self_attn.W_pack", "weight", _QKV, split),),
        # Conv1D stores its kernels as we do
        "gpt2": (
            ("attn.c_attn", "weight", _QKV, ("split", "copy", 1)),
            ("attn.c_attn", "bias", _QKV, ("split", "copy", 0)),
            ("attn.c_proj", "weight", "self_attn/o_proj", "copy"),
            ("mlp.c_fc", "weight", "mlp/fc1", "copy"),
            ("mlp.c_proj", "weight", "mlp/fc2", "copy"),
        ),
        # head by head, each with its query, key and value
        "gpt_neox": (
            ("attention.query_key_value", "weight", _QKV, (*split, heads)),
            ("attention.query_key_value", "bias", _QKV, ("split", "copy", 0, heads)),
        ),
        "bloom": (
            ("self_attention.query_key_value", "weight", _QKV, (*split, heads)),
            ("self_attention.query_key_value", "bias", _QKV, ("split", "copy", 0, heads)),
        ),
    }.get(family, ())


# The names of old checkpoints, which lack the outermost module.
_RENAMES = {
    "gpt2": ((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
    "bloom": ((r"^(word_embeddings|word_embeddings_layernorm|h|ln_f)\.", r"transformer.\1."),),
    "opt": ((r"^decoder\.", "model.decoder."),),
}


def conversion(family: str, config: DecoderConfig, tree: str = "", names: Callable[[str], str] = str) -> Conversion:
    """How the decoder's tree maps to Hugging Face names.

    Args:
        family: `model_type`.
        config: what `FAMILIES[family]` read.
        tree: prefix of the decoder in a larger tree, such as "language_model/".
        names: what a tensor's name in a model of text alone is in the larger one.
    """
    stacks = {"model": "model", "model/layers": "model.layers.{i}", "lm_head": "lm_head", **_NAMES.get(family, {})}
    exceptions = []
    for name, what, modules, operation in _fused(family, config.num_attention_heads):
        leaf = "kernel" if what == "weight" else what
        paths = [f"{tree}model/layers/{module}/{leaf}" for module in ((modules,) if isinstance(modules, str) else modules)]
        exceptions.append((names(f"{stacks['model/layers']}.{name}.{what}"), tuple(paths), operation))
    embedding = names(stacks.get("model/embed_tokens", stacks["model"] + ".embed_tokens") + ".weight")
    head = names(stacks["lm_head"] + ".weight")
    return Conversion(
        stacks={tree + prefix: names(stored) for prefix, stored in stacks.items()},
        exceptions=tuple(exceptions),
        renames=_RENAMES.get(family, ()),
        ignored=IGNORED,
        tied=((head, embedding),) if config.tie_word_embeddings else (),
    )
