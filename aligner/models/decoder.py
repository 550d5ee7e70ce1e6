"""The text decoder: one implementation driven by configuration flags. Families so far: Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from aligner.models import rope
from aligner.models.attention import Spec, attention, dense, spec_of
from aligner.models.layers import ACTIVATIONS, Embed, Linear, RMSNorm, stack
from aligner.sharding import constrain
from aligner.types import Batch, Conversion, Head, Model, Output, Params, UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What changes the computation; names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02


def config_from_hf(hf: Any) -> DecoderConfig:
    """Read a `LlamaConfig`. A setting that would change the numbers and is not implemented is refused."""
    if hf.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act {hf.hidden_act!r} of the {hf.model_type} config is not supported; known: {', '.join(ACTIVATIONS)}")
    rope.check(hf.rope_parameters)
    return DecoderConfig(**{field.name: getattr(hf, field.name) for field in dataclasses.fields(DecoderConfig)})


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], spec: Spec, cos: Array, sin: Array) -> Float[Array, "B T D"]:
        c = self.config

        def project(name: str, heads: int) -> Float[Array, "B T N H"]:
            y = Linear(heads * c.head_dim, c.attention_bias, c.initializer_range, name=name)(x)
            return constrain(y, "batch", None, "heads").reshape(*x.shape[:2], heads, c.head_dim)

        q, k = project("q_proj", c.num_attention_heads), project("k_proj", c.num_key_value_heads)
        v = project("v_proj", c.num_key_value_heads)
        out = attention(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, spec, scale=c.head_dim**-0.5)
        out = checkpoint_name(out.reshape(*x.shape[:2], -1), "context")
        return Linear(c.hidden_size, c.attention_bias, c.initializer_range, name="o_proj")(out)


class MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate = Linear(c.intermediate_size, c.mlp_bias, c.initializer_range, name="gate_proj")(x)
        up = Linear(c.intermediate_size, c.mlp_bias, c.initializer_range, name="up_proj")(x)
        y = constrain(ACTIVATIONS[c.hidden_act](gate) * up, "batch", None, "mlp")
        return Linear(c.hidden_size, c.mlp_bias, c.initializer_range, name="down_proj")(y)


class Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], spec: Spec, cos: Array, sin: Array):
        c = self.config
        x = x + Attention(c, name="self_attn")(RMSNorm(c.rms_norm_eps, name="input_layernorm")(x), spec, cos, sin)
        x = x + MLP(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))
        return constrain(x, "batch", None, None), None


class DecoderModel(nn.Module):
    config: DecoderConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, batch: Batch, features: Float[Array, "B F D"] | None) -> Float[Array, "B T D"]:
        c = self.config
        x = Embed(c.vocab_size, c.hidden_size, c.initializer_range, name="embed_tokens")(batch["tokens"])
        if features is not None:
            x = merge(x, features, batch["media_index"])
        x = constrain(x, "batch", None, None)
        inverse, scale = rope.frequencies(c.rope_parameters, c.head_dim, c.max_position_embeddings, batch["positions"])
        cos, sin = rope.table(inverse, scale, batch["positions"], x.dtype)
        layers = stack(Layer, c.num_hidden_layers, self.remat, broadcast_arguments=3)
        x, _ = layers(c, name="layers")(x, dense(spec_of(batch)), cos, sin)
        return RMSNorm(c.rms_norm_eps, name="norm")(x)


class CausalLM(nn.Module):
    """Hugging Face's module tree of a causal language model; the head is a leaf that only `init` touches."""

    config: DecoderConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, batch: Batch, features: Float[Array, "B F D"] | None = None) -> Float[Array, "B T D"]:
        x = DecoderModel(self.config, self.remat, name="model")(batch, features)
        if self.is_initializing() and not self.config.tie_word_embeddings:
            Linear(self.config.vocab_size, False, self.config.initializer_range, name="lm_head")(x)
        return x


def merge(x: Float[Array, "B T D"], features: Float[Array, "B F D"], media_index) -> Float[Array, "B T D"]:
    """Put media features where `media_index` says (>= 0) instead of the placeholder's embedding."""
    chosen = jnp.take_along_axis(features.astype(x.dtype), jnp.maximum(media_index, 0)[..., None], axis=1)
    return jnp.where(media_index[..., None] >= 0, chosen, x)


def head(config: DecoderConfig, params: Params) -> Head:
    """The language-model head of a decoder's tree; tied heads read the embedding."""
    if config.tie_word_embeddings:
        return Head(params["model"]["embed_tokens"]["embedding"], transposed=True)
    return Head(params["lm_head"]["kernel"])


def text_batch(inputs: Mapping[str, Any]) -> dict[str, Array]:
    """`input_ids`, `attention_mask`, `position_ids` of a Hugging Face tokenizer -> the text part of a batch.

    Without `position_ids`, positions count columns, padding included, as `transformers` does in a plain forward pass.
    """
    tokens = np.asarray(inputs["input_ids"]).astype(np.int32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(tokens))).astype(np.int32)
    positions = inputs.get("position_ids")
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else np.asarray(positions)
    arrays = dict(tokens=tokens, positions=positions.astype(np.int32), segment_ids=mask, role=np.zeros_like(tokens))
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def dummy_batch() -> Batch:
    """The smallest batch, for `init`."""
    return text_batch({"input_ids": np.zeros((1, 1), np.int32)})


SHARDING_RULES = (
    (r"(q_proj|k_proj|v_proj)/kernel$", ("embed", "heads")),
    (r"(q_proj|k_proj|v_proj)/bias$", ("heads",)),
    (r"(o_proj|out_proj)/kernel$", ("heads", "embed")),
    (r"(gate_proj|up_proj|fc1)/kernel$", ("embed", "mlp")),
    (r"(gate_proj|up_proj|fc1)/bias$", ("mlp",)),
    (r"(down_proj|fc2)/kernel$", ("mlp", "embed")),
    (r"embed_tokens/embedding$", ("vocab", "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
)

IGNORED = (r"rotary_emb\.inv_freq$",)


def make(hf: Any) -> Model:
    """A Llama model from its Hugging Face config."""
    config = config_from_hf(hf)

    def apply(params, batch, *, features=None, cache=None, key=None, remat="none") -> Output:
        return Output(CausalLM(config, remat).apply({"params": params}, batch, features), {}, cache)

    return Model(
        family=hf.model_type,
        config=config,
        init=lambda key: CausalLM(config).init(key, dummy_batch())["params"],
        encode=lambda params, batch, remat="none": None,
        apply=apply,
        head=lambda params: head(config, params),
        inputs=text_batch,
        conversion=Conversion(
            stacks={"model/layers": "model.layers.{i}"},
            ignored=IGNORED,
            tied=(("lm_head.weight", "model.embed_tokens.weight"),) if config.tie_word_embeddings else (),
        ),
        sharding_rules=SHARDING_RULES,
    )


__all__ = ["SHARDING_RULES", "CausalLM", "DecoderConfig", "config_from_hf", "dummy_batch", "head", "make", "merge", "text_batch"]
