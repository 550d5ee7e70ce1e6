"""The text decoder: one implementation driven by configuration flags, which families.py reads from Hugging Face configs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from aligner.matmul import Turned, at_least_float32
from aligner.models import cross, moe, rope
from aligner.models.attention import Spec, alibi_slopes, attention, dense, spec_of
from aligner.models.cache import Cache, remember, unroll
from aligner.models.layers import (
    ACTIVATIONS,
    Embed,
    LayerNorm,
    Linear,
    RMSNorm,
    own_rngs,
    pick,
    recomputed,
    rngs,
    scaled,
    stack,
    unrolled,
)
from aligner.sharding import alone, constrain
from aligner.types import Batch, Conversion, Head, Model, Output, Params


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What changes the computation. Names are Hugging Face's where they agree among families; families.py fills this in.

    Norm names say which norms a layer has: before and after attention, before and after the MLP; "" means none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: tuple[Mapping[str, Any] | None, ...]  # the kinds of rotary embedding among the layers; None rotates nothing
    rope_of_layer: tuple[int, ...] = ()  # which kind each layer has; () means all the first
    learned_positions: int = 0  # rows of a table of positions that is added to the embeddings; 0 has none
    position_offset: int = 0  # the row of the first position
    positions_from_mask: bool = False  # padding does not count as a position where a tokenizer's output says none
    alibi: bool = False  # attention falls off linearly with distance (arXiv 2108.12409)
    windows: tuple[int | None, ...] = (None,)  # the kinds of sliding window among the layers
    window_of_layer: tuple[int, ...] = ()
    rotary_fraction: float = 1.0  # of a head's width
    rotary_interleaved: bool = False  # pairs are neighbours instead of halves
    hidden_act: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm: str = "rms"  # rms; rms_wide: scaled before rounding; rms_plus_one: so, by 1 + weight; layer: with mean and bias
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    parallel: bool = False  # attention and MLP read the same input and are added together
    norm_sums: bool = False  # the norms after attention and MLP are of the sum with the residual
    embedding_norm: str = ""
    qk_norm: str = ""  # "head": every head alone, "full": all heads together, both before the rotation
    query_scale: float | None = None  # of the attention logits; None is head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_size: int | None = None  # where not hidden_size: projected to it, and back before the head
    embedding_scale: float = 1.0
    scales_media: bool = False  # what stands for pictures is scaled as the embeddings are
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    tie_word_embeddings: bool = False
    normalized_head: bool = False  # every token's row of the head has length 1
    initializer_range: float = 0.02
    o_name: str = "o_proj"
    experts: moe.ExpertsConfig | None = None  # in place of every layer's MLP
    mlp_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    final_norm: str = "norm"
    both_ways: str = ""  # what is not seen backwards only: "prompt", or "pictures", each within itself
    picture_tokens: int = 1  # of a picture, where those see each other
    split_media: bool = False  # text reads text and pictures by two softmaxes, pictures read pictures alone (MMCA, arXiv 2309.14327)
    cross_layers: tuple[int, ...] = ()  # where, counting all layers, those stand that look at pictures instead of text
    extra_embeddings: int = 0  # rows of the embedding beyond the vocabulary, which the head does not have
    deepstack: int = 0  # so many first layers are each followed by features of their own, which come beside those that are merged in


def make_norm(config: DecoderConfig, name: str) -> nn.Module:
    """The family's norm under a name."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps, name=name)
    return RMSNorm(config.norm_eps, wide=config.norm != "rms", plus_one=config.norm == "rms_plus_one", name=name)


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], spec: Spec, cos: Array | None, sin: Array | None, memory: tuple | None = None,
        read: Int[Array, "B S"] | None = None,
    ):  # fmt: skip
        """The output, of the columns in `read` where it is given, and what is to be remembered of `memory` and this call; None without."""
        c = self.config

        def project(name: str, heads: int, norm: str | None = None) -> Float[Array, "B T N H"]:
            y = constrain(Linear(heads * c.head_dim, c.qkv_bias, c.initializer_range, name=name)(x), "batch", "length", "heads")
            y = make_norm(c, norm)(y) if norm and c.qk_norm == "full" else y
            y = y.reshape(*x.shape[:2], heads, c.head_dim)
            return make_norm(c, norm)(y) if norm and c.qk_norm == "head" else y

        names = c.qk_norm_names if c.qk_norm else (None, None)
        q, k = project("q_proj", c.num_attention_heads, names[0]), project("k_proj", c.num_key_value_heads, names[1])
        v = project("v_proj", c.num_key_value_heads)
        if cos is not None:
            q, k = (rope.rotate(y, cos, sin, c.rotary_interleaved) for y in (q, k))
        if memory is not None:
            (k, v), memory = remember(memory, k, v)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        slopes = alibi_slopes(c.num_attention_heads) if c.alibi else None
        out = attention(q, k, v, spec, scale=scale, softcap=c.attention_softcap, slopes=slopes)
        out = at(read, constrain(out.reshape(*x.shape[:2], -1), "batch", "length", "heads"))
        return Linear(c.hidden_size, c.o_bias, c.initializer_range, name=c.o_name)(out), memory


class MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        *into, out = c.mlp_names
        y = [Linear(c.intermediate_size, c.mlp_bias, c.initializer_range, name=name)(x) for name in into]
        down = Linear(c.hidden_size, c.mlp_bias, c.initializer_range, name=out)
        gated = lambda *y: constrain(functools.reduce(jnp.multiply, y[1:], ACTIVATIONS[c.hidden_act](y[0])), "batch", "length", "mlp")
        if self.is_initializing():
            return down(gated(*y))
        close = lambda params, drawn, *y: down.apply({"params": params}, gated(*y), rngs=drawn)
        return recomputed(close, self.variables["params"][out], own_rngs(self), *y)  # rather than keep what was gated


class SparseMLP(nn.Module):
    """Routed experts, with or without one that sees every token; also how evenly the real tokens were routed."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], real: Array) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        c, e = self.config, self.config.experts
        probabilities, weights, chosen = moe.route(e, Linear(e.num_experts, init_scale=c.initializer_range, name="gate")(x))
        y = moe.Experts(e, c.hidden_act, c.initializer_range, name="experts")(x, weights, chosen)
        if e.shared_intermediate_size:
            shared = MLP(dataclasses.replace(c, intermediate_size=e.shared_intermediate_size), name="shared_expert")(x)
            y = y + jax.nn.sigmoid(Linear(1, init_scale=c.initializer_range, name="shared_expert_gate")(x)) * shared
        return y, moe.load(probabilities, chosen, real)


class Layer(nn.Module):
    """One layer. Beside the states it gives a sparse MLP's load, None without; where it is given a memory, that with its own written in.

    With `read` [B,S] it gives the states of those columns alone: all are attended to, and that is all the others are for in the last layer.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], specs: tuple[Spec, ...], tables: tuple[tuple[Array, Array], ...], deep: tuple[Array, ...] | None,
        here: cross.Seen | None, window: Array, kind: Array, number: Array, crossing: Array, memory: tuple | None = None,
        read: Int[Array, "B S"] | None = None,
    ):  # fmt: skip
        c = self.config
        if here is not None:
            x = cross.before(c, MLP, x, here, crossing, own_rngs(self))

        def normed(name: str, y: Array) -> Array:
            return make_norm(c, name)(y) if name else y

        def add(x: Array, y: Array, norm: str) -> Array:
            return normed(norm, x + y) if c.norm_sums else x + scaled(normed(norm, y), c.residual_scale)

        into = normed(c.attention_norm, x)
        cos, sin = pick(tables, kind) if tables else (None, None)
        y, memory = Attention(c, name="self_attn")(into, pick(specs, window), cos, sin, memory, read)
        x = at(read, x)
        if c.parallel:
            x = x + y + MLP(c, name="mlp")(normed(c.mlp_norm, x) if c.mlp_norm else at(read, into))
            return constrain(x, "batch", "length", None), memory
        x = add(x, y, c.attention_out_norm)
        into, load = normed(c.mlp_norm, x), None
        if c.experts:
            y, load = SparseMLP(c, name="mlp")(into, at(read, specs[0].segment_ids) > 0)
        else:
            y = MLP(c, name="mlp")(into)
        x = add(x, y, c.mlp_out_norm)
        if deep is not None:
            x = x + at(read, pick((*deep, jnp.zeros_like(deep[0])), jnp.minimum(number, len(deep))))
        return constrain(x, "batch", "length", None), load if memory is None else memory


class Unrolled(nn.Module):
    """The layers one after the other, each with its part of a cache."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], specs: tuple[Spec, ...], tables: tuple, deep: tuple[Array, ...] | None, here: cross.Seen | None,
        cache: Cache, read: Int[Array, "B S"] | None,
    ) -> tuple[Array, Cache]:  # fmt: skip
        c, kept, looked, column = self.config, [], [], cache.column + x.shape[1]
        numbers = [of or (0,) * c.num_hidden_layers for of in (c.window_of_layer, c.rope_of_layer)]
        for i, (window, kind, crossing) in enumerate(zip(*numbers, crossings(c))):
            if here is not None and crossing >= 0:
                x, made = cross.look(c, MLP, x, here, crossing)
                looked.append(made)
            memory = (cache.keys[i], cache.values[i], cache.column) if cache.keys else ()
            kinds, asked = (specs[window : window + 1], tables[kind : kind + 1]), read if i == c.num_hidden_layers - 1 else None
            x, memory = Layer(c, name=str(i))(x, *kinds, deep, None, 0, 0, i, -1, memory, asked)
            kept.append(memory)
        keys, values = zip(*kept)
        seen = None if here is None else cross.last(here, tuple(looked))
        return x, cache.replace(keys=keys, values=values, column=column, seen=seen)


class DecoderModel(nn.Module):
    """Hidden states after the final norm; with a cache, that with this pass in it."""

    config: DecoderConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, batch: Batch, features: Float[Array, "B F D"] | None, cache: Cache | None = None):
        c, deep, here = self.config, None, None
        x = self.embedded(batch)
        if c.cross_layers:
            here = self.crossed(x, features, batch, cache)
        elif features is not None:
            features, *deep = jnp.split(features, 1 + c.deepstack, axis=-1)
            features = scaled(features, c.embedding_scale if c.scales_media else 1.0)
            x = merge(x, features, batch["media_index"])
            deep = tuple(merge(jnp.zeros_like(x), more, batch["media_index"]) for more in deep) or None
        x = self.placed(x, batch["positions"])
        width, turning = int(c.head_dim * c.rotary_fraction), batch.get("rope_positions", batch["positions"])
        tables = tuple(rope.tables(kind, width, c.max_position_embeddings, turning, batch["segment_ids"], x.dtype) for kind in c.rope)
        cache, spec = stand(c, batch, cache)
        specs = tuple(dense(spec, window) for window in c.windows)
        if cache is None:
            x = self.scanned(x, specs, tables, deep, here, batch.get("read"))
        else:
            x, cache = Unrolled(c, name="layers")(x, specs, tables, deep, here, cache, batch.get("read"))
        x = make_norm(c, c.final_norm)(x) if c.final_norm else x
        return (Linear(c.embedding_size, init_scale=c.initializer_range, name="project_out")(x) if c.embedding_size else x), cache

    def embedded(self, batch: Batch) -> Float[Array, "B T E"]:
        """The tokens' rows of the table."""
        c = self.config
        rows, size = c.vocab_size + c.extra_embeddings, c.embedding_size or c.hidden_size
        x = Embed(rows, size, c.initializer_range, name="embed_tokens")(batch["tokens"])
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if "embedding_noise" in batch:  # [B,T,D], from an algorithm that trains with it
            x = x + batch["embedding_noise"].astype(x.dtype)
        return x

    def placed(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings in the width of the layers, with what is learned of each position."""
        c = self.config
        if c.embedding_size:
            x = Linear(c.hidden_size, init_scale=c.initializer_range, name="project_in")(x)
        if c.learned_positions:
            table = Embed(c.learned_positions, c.hidden_size, c.initializer_range, name="embed_positions")
            x = x + table(positions + c.position_offset)  # beyond the table lies NaN, which no one overlooks
        if c.embedding_norm:
            x = make_norm(c, c.embedding_norm)(x)
        return constrain(x, "batch", "length", None)

    def crossed(
        self, x: Float[Array, "B T D"], states: Float[Array, "B S D"] | None, batch: Batch, cache: Cache | None
    ) -> cross.Seen | None:
        """What the cross layers look at; None, and they are passed over, where there are no pictures."""
        c = self.config
        if self.is_initializing():
            one = jnp.ones((1, 1, 1))
            nothing = cross.Seen(None, jnp.zeros((1, 1, c.hidden_size)), jnp.ones((1, 1, 1, 1), bool), one, one)
            stack(cross.CrossLayer, len(c.cross_layers), "none", in_axes=(nn.broadcast,))(c, MLP, name="cross_layers")(x, nothing)
            return None
        params = self.variables["params"]["cross_layers"]
        if states is not None:
            return cross.seen(params, states.astype(x.dtype), batch)
        return cache.seen.replace(params=params) if cache is not None and cache.seen is not None else None

    def scanned(
        self, x: Float[Array, "B T D"], specs: tuple[Spec, ...], tables: tuple, deep: tuple[Array, ...] | None, here: cross.Seen | None,
        read: Int[Array, "B S"] | None,
    ) -> Float[Array, "B S D"]:  # fmt: skip
        """The layers as one program in a loop; how they differ is data. The states of the columns in `read`, or of all."""
        c, alike = self.config, (specs, tables, deep, here)
        numbers = [jnp.asarray(of or (0,) * c.num_hidden_layers, jnp.int32) for of in (c.window_of_layer, c.rope_of_layer)]
        numbers += [jnp.arange(c.num_hidden_layers), jnp.asarray(crossings(c), jnp.int32)]
        layers = lambda count, **name: stack(Layer, count, self.remat, in_axes=(nn.broadcast,) * 4 + (0,) * 4)(c, **name)
        # the last layer may be apart where none is in a loop, which would have copies of the stacks; a router's load is that of all tokens
        if read is not None and read.shape[1] < x.shape[1] and alone() and unrolled(self.remat) and not c.experts:
            (params, numbers), (last, numbers_of_last) = split_last((self.variables["params"]["layers"], numbers))
            if c.num_hidden_layers > 1:
                x, _ = layers(c.num_hidden_layers - 1).apply({"params": params}, x, *alike, *numbers, rngs=own_rngs(self))
            return Layer(c).apply({"params": last}, x, *alike, *numbers_of_last, read=read, rngs=own_rngs(self))[0]
        x, load = layers(c.num_hidden_layers, name="layers")(x, *alike, *numbers)
        if load is not None:
            for name, value in zip(("router_count", "router_probability"), load):
                self.sow("aux", name, jnp.sum(value, axis=0))
        return at(read, x)


def at(columns: Int[Array, "B S"] | None, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B S ..."]:
    """What stands at some columns; None takes all."""
    return x if columns is None else jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)


def split_last(stacked: Any) -> tuple[Any, Any]:
    """A stacked tree without the last of the stack, and that one. Gradients are put together again, where slices would have them padded."""
    leaves, structure = jax.tree.flatten(stacked)
    before, last = zip(*(jax.lax.split(leaf, (len(leaf) - 1, 1)) for leaf in leaves))
    return structure.unflatten(before), structure.unflatten(leaf.squeeze(0) for leaf in last)


def stand(config: DecoderConfig, batch: Batch, cache: Cache | None) -> tuple[Cache | None, Spec]:
    """The cache with the batch's columns marked in it, and who sees whom."""
    media = None
    if config.split_media and ("media_index" in batch or cache is not None):
        media = batch["media_index"] >= 0 if "media_index" in batch else jnp.zeros_like(batch["tokens"], bool)
    spec = spec_of(batch).replace(blocks=both_ways(config, batch), media=media, unlimited=config.both_ways == "prompt")
    spec = spec.replace(alone=spec.alone and not any(config.windows))
    if cache is None:
        return None, spec
    standing = jnp.where(batch["segment_ids"] > 0, batch["positions"], -1)
    if not cache.keys:  # the prompts' own pass
        return cache.replace(positions=standing, media=media), spec
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, cache.column))
    cache = cache.replace(positions=write(cache.positions, standing), media=None if media is None else write(cache.media, media))
    return cache, spec_of(batch).replace(media=media, key_positions=cache.positions, key_media=cache.media)


def crossings(config: DecoderConfig) -> list[int]:
    """For every layer of the decoder's own, the number of the cross layer right before it, or -1."""
    own = [i for i in range(config.num_hidden_layers + len(config.cross_layers)) if i not in config.cross_layers]
    return [config.cross_layers.index(i - 1) if i - 1 in config.cross_layers else -1 for i in own]


class CausalLM(nn.Module):
    """Hugging Face's module tree of a causal language model; the head is a leaf that only `init` touches."""

    config: DecoderConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, batch: Batch, features: Float[Array, "B F D"] | None = None, cache: Cache | None = None):
        c = self.config
        x, cache = DecoderModel(c, self.remat, name="model")(batch, features, cache)
        if self.is_initializing() and not c.tie_word_embeddings:
            Linear(c.vocab_size, c.head_bias, c.initializer_range, name="lm_head")(x)
        return x, cache


def run(config: DecoderConfig, params: Params, batch: Batch, features=None, cache: Cache | None = None, key=None, remat="none") -> Output:
    """A pass of the decoder; with a cache, of the tokens that come next, and the cache with them in it."""
    params = params if cache is None else unroll(params)
    (hidden, cache), variables = CausalLM(config, remat).apply({"params": params}, batch, features, cache, rngs=rngs(key), mutable=["aux"])
    return Output(hidden, {name: value for name, (value,) in variables.get("aux", {}).get("model", {}).items()}, cache)


def text_config(model: Model) -> DecoderConfig:
    """The config of the model's decoder."""
    return getattr(model.config, "text_config", model.config)


def outgrown(model: Model, start: np.ndarray, end: np.ndarray) -> int | None:
    """The length beyond which all of a text is turned otherwise, its first tokens too, where one grows past it from `start` tokens to `end`
    (both [N], of N texts); None where none does. What was made of such a text before does not hold any more."""
    config = text_config(model)
    for kind in config.rope:
        limit = rope.length_limit(kind, config.max_position_embeddings)
        if limit is None:
            continue
        settled = start > limit if kind["rope_type"] == "longrope" else np.zeros(len(start), bool)
        if np.any((end > limit) & (end > start) & ~settled):
            return limit
    return None


def both_ways(config: DecoderConfig, batch: Batch) -> Array | None:
    """Which tokens see each other both ways, by a number above 0 [B,T]; None where all see backwards only."""
    if config.both_ways == "prompt":
        return (batch["role"] == 0).astype(jnp.int32)
    if config.both_ways and "media_index" in batch:
        return batch["media_index"] // config.picture_tokens + 1
    return None


def merge(x: Float[Array, "B T D"], features: Float[Array, "B F D"], media_index) -> Float[Array, "B T D"]:
    """Put media features where `media_index` says (>= 0) instead of the placeholder's embedding."""
    chosen = jnp.take_along_axis(features.astype(x.dtype), jnp.maximum(media_index, 0)[..., None], axis=1)
    return jnp.where(media_index[..., None] >= 0, chosen, x)


def head(config: DecoderConfig, params: Params) -> Head:
    """The language-model head of a decoder's tree; tied heads read the embedding."""
    rest = dict(scale=config.logits_scale, softcap=config.final_softcap)
    if config.tie_word_embeddings:
        return Head(params["model"]["embed_tokens"]["embedding"], transposed=True, **rest)
    kernel = params["lm_head"]["kernel"]
    turned = isinstance(kernel, Turned)
    kernel = kernel.weight if turned else kernel
    if config.normalized_head:
        length = jnp.sqrt(jnp.sum(jnp.square(at_least_float32(kernel)), axis=int(turned), keepdims=True))
        kernel = (kernel / jnp.maximum(length, 1e-12)).astype(kernel.dtype)
    return Head(kernel, bias=params["lm_head"].get("bias"), transposed=turned, **rest)


def text_batch(inputs: Mapping[str, Any], positions_from_mask: bool = False) -> dict[str, Array]:
    """`input_ids`, `attention_mask`, `position_ids` of a Hugging Face tokenizer -> the text part of a batch.

    Without `position_ids`, positions count columns, padding included, as `transformers` does in a plain forward pass of most families;
    `positions_from_mask` counts real tokens only.
    """
    tokens = np.asarray(inputs["input_ids"]).astype(np.int32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(tokens))).astype(np.int32)
    positions = inputs.get("position_ids")
    if positions is None:
        counted = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        positions = counted if positions_from_mask else np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    arrays = dict(tokens=tokens, positions=np.asarray(positions).astype(np.int32), segment_ids=mask, role=np.zeros_like(tokens))
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def dummy_batch() -> Batch:
    """The smallest batch, for `init`."""
    return text_batch({"input_ids": np.zeros((1, 1), np.int32)})


SHARDING_RULES = (
    (r"(q_proj|k_proj|v_proj)/kernel$", ("embed", "heads")),
    (r"(q_proj|k_proj|v_proj)/bias$", ("heads",)),
    (r"(o_proj|out_proj|dense)/kernel$", ("heads", "embed")),
    (r"experts/(gate_proj|up_proj)/kernel$", ("expert", "embed", "mlp")),
    (r"experts/down_proj/kernel$", ("expert", "mlp", "embed")),
    (r"(gate_proj|up_proj|fc1)/kernel$", ("embed", "mlp")),
    (r"(gate_proj|up_proj|fc1)/bias$", ("mlp",)),
    (r"(down_proj|fc2)/kernel$", ("mlp", "embed")),
    (r"embed_tokens/embedding$", ("rows", "embed")),
    (r"project_(in|out)/kernel$", (None, "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
)


def make(config: DecoderConfig, family: str, conversion: Conversion) -> Model:
    """A text model: what families.py read from a Hugging Face config, as functions."""

    def apply(params, batch, *, features=None, cache=None, key=None, remat="none") -> Output:
        return run(config, params, batch, features, cache, key, remat)

    return Model(
        family=family,
        config=config,
        init=lambda key: CausalLM(config).init(key, dummy_batch())["params"],
        encode=lambda params, batch, key=None, remat="none": None,
        apply=apply,
        head=lambda params: head(config, params),
        inputs=lambda processed: text_batch(processed, config.positions_from_mask),
        conversion=conversion,
        sharding_rules=SHARDING_RULES,
    )
