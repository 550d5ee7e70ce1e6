"""Attention, one entry: `attention(q, k, v, spec)`.

A spec says who sees whom by a few small arrays; only the reference backend turns it into a dense mask. Which backend there is, is said
where a program is built, `with BACKEND("pallas"):`. It is for a decoder's attention among its own columns; all other is the reference's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from aligner.models import products
from aligner.models.layers import scaled
from aligner.sharding import constrain, per_device
from aligner.types import Batch, UserError

PLATFORMS = {"pallas": "tpu", "cudnn": "gpu"}  # what the kernels are for
BACKENDS = ("auto", "reference", *PLATFORMS)
# reference; pallas: the kernels of `aligner.models.flash`; cudnn: cuDNN's flash attention, under the dense mask where rows hold more than a
# text; the latter two are an error where they cannot do a spec; auto: pallas where it can
BACKEND = jax.make_user_context("reference")
BLOCK, MAX_BLOCKS = 128, 8  # queries that are multiplied with their keys at once, and how many such products there are at most


@struct.dataclass
class Spec:
    """A key is visible to a query if it is in the same segment, not later in the row, and its role is 0 (the prompt) or the query's.

    Attributes:
        segment_ids, role, positions: [B, T] as in a batch.
        mask: the same thing dense, [B, 1, T, T]; made once per forward pass by `dense` for the reference backend.
        blocks: [B, T]; tokens of a segment with the same number above 0 see each other both ways; a window limits how far back, unless
            `unlimited`.
        media: [B, T] bool; keys that are media and keys that are text are read by a softmax each, the two results added, and media reads
            media alone; None reads all by one.
        key_positions: [B, C] of the columns of a cache, -1 where nothing stands; the keys are then those, one text a row, of which a
            query sees all that are not later. None: the keys are the batch's own columns.
        key_media: [B, C], `media` of a cache's columns.
        window: what `mask` was made with.
        causal: False lets everything in a segment see everything; there are no roles then.
        alone: whether every row is one text with its padding behind it, and no window limits it: each token then sees all before it.
    """

    segment_ids: Int[Array, "B T"]
    role: Int[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None
    mask: Bool[Array, "B 1 T S"] | None = None
    blocks: Int[Array, "B T"] | None = None
    media: Bool[Array, "B T"] | None = None
    key_positions: Int[Array, "B C"] | None = None
    key_media: Bool[Array, "B C"] | None = None
    window: Int[Array, ""] | None = None
    causal: bool = struct.field(pytree_node=False, default=True)
    unlimited: bool = struct.field(pytree_node=False, default=False)
    alone: bool = struct.field(pytree_node=False, default=False)

    @property
    def backwards(self) -> bool:
        """Whether the keys are the queries' own columns and no query sees a later one."""
        return self.causal and self.blocks is None and self.key_positions is None


def spec_of(batch: Batch) -> Spec:
    return Spec(batch["segment_ids"], batch["role"], batch["positions"], alone="alone" in batch)


def chosen(mesh: Mesh, wanted: str = "auto") -> str:
    """What BACKEND is to be for programs on a mesh: with "auto" the kernels where there are TPUs; cuDNN's are to be asked for.

    Raises:
        UserError: no such backend, or not on these devices.
    """
    platform = mesh.devices.flat[0].platform
    if wanted not in BACKENDS:
        raise UserError(f"config.model.attention is {wanted!r}; it must be one of {', '.join(BACKENDS)}")
    if PLATFORMS.get(wanted, platform) != platform:
        kind = PLATFORMS[wanted].upper()
        raise UserError(f"config.model.attention is {wanted!r}, whose kernels are for {kind}s; on this {platform} set 'auto'")
    return "reference" if wanted == "auto" and platform != "tpu" else wanted


def dense(spec: Spec, window: int | None = None) -> Spec:
    """Fill in the dense mask and the window. Padding (segment 0) sees padding, so that no row of the mask is empty.

    Args:
        window: a key further back than this many positions (not columns) is not visible; None has no limit.
    """
    spec = spec.replace(window=jnp.asarray(jnp.iinfo(jnp.int32).max if window is None else window, jnp.int32))
    if spec.key_positions is not None:
        distance = spec.positions[:, :, None] - spec.key_positions[:, None, :]
        visible = (spec.key_positions[:, None, :] >= 0) & (distance >= 0)
        return spec.replace(mask=(visible if window is None else visible & (distance < window))[:, None])
    segment, role = spec.segment_ids, spec.role
    column = jnp.arange(segment.shape[1])
    visible = segment[:, :, None] == segment[:, None, :]
    if not spec.causal:
        return spec.replace(mask=visible[:, None])
    backwards = column[:, None] >= column[None, :]
    if spec.blocks is not None:
        together = (spec.blocks[:, :, None] == spec.blocks[:, None, :]) & (spec.blocks > 0)[:, None, :]
        backwards |= together
        together &= visible
    visible &= backwards
    visible &= (role[:, None, :] == 0) | (role[:, :, None] == role[:, None, :])
    if window is not None:
        visible &= spec.positions[:, :, None] - spec.positions[:, None, :] < window
        visible |= jnp.eye(segment.shape[1], dtype=bool)  # padding's positions do not count up
    if spec.unlimited:
        visible |= together
    return spec.replace(mask=visible[:, None])


def apart(mask: Bool[Array, "B 1 t s"], query: Bool[Array, "B t"], key: Bool[Array, "B s"]) -> tuple[Bool[Array, "B 1 t s"], ...]:
    """Of what a mask shows, the keys that are text and those that are media. Media does not read text (MMCA)."""
    query, key = query[:, None, :, None], key[:, None, None, :]
    return mask & ~key & ~query, mask & key


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slope of every head (arXiv 2108.12409): a geometric sequence, filled up from the next one where `heads` is no power of 2."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return tuple(slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)])


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: Spec | None,
    scale: float,
    softcap: float | None = None,
    slopes: Sequence[float] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads (N a multiple of K), softmax in float32; `spec=None` lets everything see everything.

    `softcap` c bends the logits to c * tanh(logits / c) before the mask (Gemma 2). `slopes` of the heads, times the distance in
    positions, are taken off them (ALiBi).
    """
    with jax.named_scope("attention"):
        batch, length, heads, width = q.shape
        groups = heads // k.shape[2]
        # the scale goes into q: [B,T,N,H] is smaller than [B,N,T,T]
        q = scaled(q, scale).reshape(batch, length, k.shape[2], groups, width)
        q = q.transpose(0, 2, 3, 1, 4)  # [B,K,G,T,H]: with heads leading the products need no copies of their own
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        if spec is not None and spec.causal and spec.key_positions is None:
            q, k, v = _whole_rows(q, k, v)
        kernel = by_kernel(spec, q.dtype, width, softcap, slopes)
        out = _by_kernel(q, k, v, spec, softcap) if kernel else _reference(q, k, v, spec, softcap, slopes)
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def check_heads(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, heads: int, key_heads: int) -> None:
    """Refuse a mesh that cuts rows over devices and cannot cut a row's heads over them instead; raises UserError."""
    if not mesh.empty and mesh.shape["sequence"] > 1 and _copies(mesh, heads, key_heads) is None:
        parts = mesh.shape["sequence"] * mesh.shape["tensor"]
        raise UserError(
            f"config.mesh has tensor x sequence = {parts} devices for the heads of a row, and the model has {heads}, and {key_heads} heads "
            f"of keys; make the product a divisor of {heads} that {key_heads} is a divisor or a multiple of"
        )


def _copies(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, heads: int, key_heads: int) -> int | None:
    """How often each head of keys must be there for every device to have its own, where there are more devices than such heads; None where
    a row's heads cannot be cut over them."""
    parts = 1 if mesh.empty else mesh.shape["sequence"] * mesh.shape["tensor"]
    all_keys = math.lcm(key_heads, parts)
    return None if heads % all_keys else all_keys // key_heads


def _whole_rows(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]) -> tuple[Array, Array, Array]:
    """Rows that are cut over devices become whole, and their heads are cut instead (DeepSpeed-Ulysses, arXiv 2309.14509).

    Where more devices share a head of keys, each of them has it, for its own part of the queries' heads: K times as many, G so much less.
    """
    batch, K, G, length, width = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    check_heads(mesh, K * G, K)
    copies = _copies(mesh, K * G, K) or 1
    q = q.reshape(batch, K * copies, G // copies, length, width)
    if copies > 1 and mesh.shape["sequence"] > 1:  # whole first: the compiler finds no way from parts of columns to copies of heads
        k, v = (constrain(x, "batch", "heads", None, None) for x in (k, v))
    k, v = (x if copies == 1 else jnp.repeat(x, copies, axis=1) for x in (k, v))
    heads = ("batch", "attended", None, None)
    return constrain(q, *heads, None), constrain(k, *heads), constrain(v, *heads)


def by_kernel(spec: Spec | None, dtype: jnp.dtype, width: int, softcap: float | None, slopes: Sequence[float] | None) -> bool:
    """Whether the kernels do it; they are refused what they cannot do."""
    backend = BACKEND.value
    if backend == "reference" or spec is None or spec.window is None or not spec.causal or spec.key_positions is not None:
        return False
    cannot = {"text and media read apart": spec.media is not None, "ALiBi": slopes is not None}
    if backend == "cudnn":
        cannot |= {"capped logits": softcap is not None, f"{dtype} (but bfloat16)": dtype.itemsize > 2}
        cannot |= {"rows of an odd length": spec.segment_ids.shape[1] % 2 > 0}
        cannot |= {f"heads {width} wide (but multiples of 8 up to 256)": width % 8 > 0 or width > 256}
    else:
        cannot |= {"tokens that see each other both ways": spec.blocks is not None}
    lacking = ", ".join(name for name, needed in cannot.items() if needed)
    if lacking and backend != "auto":
        raise UserError(f"config.model.attention is {backend!r}, whose kernels cannot do {lacking}, as is needed here; set 'auto'")
    return not lacking


def _by_kernel(q: Array, k: Array, v: Array, spec: Spec, softcap: float | None) -> Float[Array, "B K G T H"]:
    heads, tokens = ("batch", "attended", None, None), ("batch", None)
    if BACKEND.value == "cudnn":
        masks = () if spec.alone and spec.backwards else (spec.mask,)
        run = per_device(fused, ((*heads, None), heads, heads, *[("batch", None, None, None)] * len(masks)), (*heads, None))
        return run(q, k, v, *masks)  # `aligner.models.layers.keep` knows it by the kernel's own name
    from aligner.models.flash import flash  # here alone: TPUs' kernels take a tenth of a second to import

    run = per_device(
        lambda q, k, v, segment, role, positions, window: flash(q, k, v, segment, role, positions, window, softcap),
        ((*heads, None), heads, heads, tokens, tokens, tokens, ()),
        (*heads, None),
    )
    return run(q, k, v, spec.segment_ids, spec.role, spec.positions, spec.window)


def fused(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "B 1 T T"] | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B K G T H"]:
    """By `jax.nn.dot_product_attention`, which has cuDNN's forward and backward kernels; q is already scaled.

    Without a mask a query sees what is not later, and the kernels pass over the rest. A mask they are given as a bias, of which they
    compute all pairs, and a gradient that nobody reads.
    """
    heads_last = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:]).transpose(0, 2, 1, 3)
    seen = dict(is_causal=True) if mask is None else dict(mask=mask)
    out = jax.nn.dot_product_attention(*map(heads_last, (q, k, v)), **seen, scale=1.0, implementation=implementation)
    return out.transpose(0, 2, 1, 3).reshape(q.shape)


def _reference(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    spec: Spec | None,
    softcap: float | None,
    slopes: Sequence[float] | None,
) -> Float[Array, "B K G T H"]:
    """By a dense mask, a block of queries after the other."""
    if spec is None:
        return checkpoint_name(_attend(q, k, v, (), None, softcap), "context")
    mask = (spec if spec.mask is not None else dense(spec)).mask
    keys = spec.positions if spec.key_positions is None else spec.key_positions
    media = spec.media if spec.key_media is None else spec.key_media
    slopes = None if slopes is None else jnp.asarray(slopes, jnp.float32).reshape(*q.shape[1:3], 1, 1)
    # where no query sees a later column, each block of queries is multiplied by the columns up to its end alone
    length = q.shape[3]
    size = max(BLOCK, -(-length // MAX_BLOCKS)) if spec.backwards else length
    sizes = [min(size, length - start) for start in range(0, length, size)]
    queries, parts = lax.split(q, sizes, axis=3), [lax.split(x, sizes, axis=2) if spec.backwards else (x,) for x in (k, v)]
    blocks = []
    for i, end in enumerate(itertools.accumulate(sizes)):
        here, upto = slice(end - sizes[i], end), slice(0, end if spec.backwards else k.shape[2])
        part = mask[..., here, upto]
        seen = (part,) if spec.media is None else apart(part, spec.media[:, here], media[:, upto])
        bias = None if slopes is None else bend(slopes, spec.positions[:, here], keys[:, upto])
        # of parts put together the gradients are parts added; of slices they would be as many arrays of the whole length
        keys_and_values = (jnp.concatenate(x[: i + 1], axis=2) for x in parts)
        blocks.append(_attend(queries[i], *keys_and_values, seen, bias, softcap))
    return checkpoint_name(jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0], "context")


def bend(slopes: Float[Array, "K G 1 1"], queries: Int[Array, "B t"], keys: Int[Array, "B s"]) -> Float[Array, "B K G t s"]:
    """ALiBi's part of the logits, from the positions of queries and keys."""
    return -slopes * (queries[:, :, None] - keys[:, None, :])[:, None, None].astype(slopes.dtype)


def _attend(
    q: Float[Array, "B K G t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s H"],
    masks: tuple[Bool[Array, "B 1 t s"], ...],
    bias: Float[Array, "B K G t s"] | None,
    softcap: float | None,
) -> Float[Array, "B K G t H"]:
    """Softmax of all logits of these queries and keys at once; q is already scaled. With several masks, the sum of a softmax under each."""
    # the heads that share a key are one matrix, from here to the end: the backward pass keeps the weights in one shape
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    repeat = lambda x: jnp.broadcast_to(x, (*x.shape[:2], *q.shape[2:4], x.shape[-1])).reshape(*x.shape[:2], -1, x.shape[-1])
    logits = products.logits(flat, k)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + repeat(bias.astype(logits.dtype))
    masks = [repeat(mask[:, :, None]) for mask in masks]
    under = lambda mask: products.mix(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), v)
    if len(masks) > 1:
        # a query that sees nothing under a mask takes nothing from it; the softmax of nothing but masked logits would be even over all
        out = sum(jnp.where(jnp.any(mask, axis=-1, keepdims=True), under(mask), 0) for mask in masks)
    else:
        out = under(*masks) if masks else products.mix(logits, v)
    return out.reshape(q.shape)
