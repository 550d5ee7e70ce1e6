"""Odd tiny configs of every text family, three or more each; the first is the oddest."""

from __future__ import annotations

import dataclasses

# Sizes that no two families or axes share by accident: 3 * 10 heads wide is not the hidden size, the vocabulary is no multiple.
T = dict(vocab_size=61, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
         max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
LENGTH = 12  # of a row; windows and original rope lengths are shorter

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def longrope(width: int, **more) -> dict:
    """LongRoPE for `width` rotated dimensions that changes over at 8 tokens."""
    factors = dict(short_factor=[1 + 0.1 * i for i in range(width // 2)], long_factor=[2 + 0.7 * i for i in range(width // 2)])
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors, **more}


MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CASES: dict[str, list[dict]] = {
    "llama": [
        dict(head_dim=6, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
        dict(tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=YARN),
        dict(max_position_embeddings=8, rope_parameters=DYNAMIC, hidden_act="gelu_pytorch_tanh"),
    ],
    "mistral": [
        dict(sliding_window=3, head_dim=6),
        dict(sliding_window=None, rope_parameters=YARN),
        dict(num_key_value_heads=4, sliding_window=5),
    ],
    "qwen2": [
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=1, num_hidden_layers=3),
        dict(tie_word_embeddings=True, rope_parameters={**YARN, "attention_factor": 1.3}),
        dict(sliding_window=3, num_attention_heads=2, num_key_value_heads=1),
    ],
    "qwen3": [
        dict(head_dim=6, tie_word_embeddings=True),
        dict(head_dim=8, attention_bias=True, rope_parameters=LINEAR),
        dict(head_dim=6, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    "gemma": [dict(head_dim=6), dict(head_dim=8, num_key_value_heads=1, hidden_size=20), dict(head_dim=4, attention_bias=True)],
    "gemma2": [
        dict(head_dim=6, query_pre_attn_scalar=10, sliding_window=3, num_hidden_layers=3),
        dict(head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=None, final_logit_softcapping=None),
        dict(head_dim=4, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, sliding_window=4),
    ],
    "gemma3_text": [
        dict(head_dim=6, query_pre_attn_scalar=10, sliding_window=3, num_hidden_layers=3, layer_types=MIXED),
        dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, layer_types=["full_attention"] * 2),
        dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
             rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                              "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}),
    ],
    "phi": [
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, qk_layernorm=True),
        dict(hidden_size=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        dict(num_key_value_heads=4, hidden_act="gelu"),
    ],
    "phi3": [
        dict(max_position_embeddings=32, original_max_position_embeddings=8, rope_parameters=longrope(4)),
        dict(sliding_window=3, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        # as Phi-4-mini: a part of the head rotates, and the head is tied
        dict(hidden_size=32, max_position_embeddings=32, original_max_position_embeddings=8, tie_word_embeddings=True,
             rope_parameters=longrope(6, partial_rotary_factor=0.75)),
        dict(num_key_value_heads=4, intermediate_size=20),  # as Phi-4
    ],
    "glm": [dict(head_dim=8), dict(head_dim=6, attention_bias=False, tie_word_embeddings=True), dict(head_dim=4, num_key_value_heads=1)],
    "glm4": [dict(head_dim=8), dict(head_dim=6, attention_bias=True), dict(head_dim=4, num_key_value_heads=1, num_hidden_layers=3)],
    "olmo2": [dict(), dict(attention_bias=True, rope_parameters=YARN), dict(num_key_value_heads=4, tie_word_embeddings=True)],
    "gpt2": [
        dict(n_inner=None, n_positions=16),
        dict(n_inner=20, scale_attn_weights=False, activation_function="relu", tie_word_embeddings=False),
        dict(n_layer=3, n_head=2, layer_norm_epsilon=1e-2),
    ],
    "opt": [
        dict(word_embed_proj_dim=10, do_layer_norm_before=False, max_position_embeddings=14),  # as the 350m
        dict(num_hidden_layers=3, tie_word_embeddings=False, activation_function="gelu"),
        dict(enable_bias=False, _remove_final_layer_norm=True),
    ],
    "gpt_neox": [
        dict(hidden_size=32),
        dict(use_parallel_residual=False, attention_bias=False, hidden_size=24,
             rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0, "partial_rotary_factor": 0.67}),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}, tie_word_embeddings=True),
    ],
    "bloom": [
        dict(n_head=6, hidden_size=24),
        dict(n_layer=3, layer_norm_epsilon=1e-2),
        dict(n_head=3, hidden_size=18, tie_word_embeddings=False),
    ],
    "mixtral": [
        dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=3),
        dict(num_local_experts=3, num_experts_per_tok=1, head_dim=6, hidden_act="gelu"),
        dict(num_local_experts=4, num_experts_per_tok=4, tie_word_embeddings=True, num_hidden_layers=3),
    ],
    "qwen2_moe": [
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, shared_expert_intermediate_size=10),
        dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=6, shared_expert_intermediate_size=10, norm_topk_prob=True,
             qkv_bias=False),
        dict(num_experts=3, num_experts_per_tok=1, moe_intermediate_size=6, shared_expert_intermediate_size=4, num_hidden_layers=3,
             use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ],
    "qwen3_moe": [
        dict(head_dim=6, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, norm_topk_prob=True),
        dict(head_dim=8, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=10, norm_topk_prob=False, attention_bias=True),
        dict(head_dim=6, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=6, num_hidden_layers=3, tie_word_embeddings=True),
    ],
    "smollm3": [
        dict(num_hidden_layers=3, no_rope_layers=[1, 0, 1]),
        dict(num_hidden_layers=4, no_rope_layer_interval=2, attention_bias=True, tie_word_embeddings=False),
        dict(num_hidden_layers=3, no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=3, layer_types=MIXED),
    ],
    "granite": [
        dict(attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.6, logits_scaling=2.0),
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        dict(rope_parameters=LINEAR, logits_scaling=0.5),
    ],
}  # fmt: skip
FIRST = {family: configs[0] for family, configs in CASES.items()}


def hf_config(family: str, **overrides):
    """The family's config of the sizes T, of which it takes what it knows."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(cls)} | {"num_attention_heads", "hidden_size", "num_hidden_layers"}
    sizes = {name: value for name, value in T.items() if name in fields and cls.attribute_map.get(name, name) not in overrides}
    if "ffn_dim" in fields:
        sizes |= dict(ffn_dim=T["intermediate_size"], pad_token_id=1)
    return cls(**sizes | overrides)
