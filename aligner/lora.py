"""Which leaves train: how the trainable tree and the fixed base split, combine and merge; low-rank adapters as leaves of the tree.

An adapter stands beside the kernel it adapts: `lora_a` [in, r], `lora_b` [r, out] and, for DoRA, `magnitude` [out] train; the constants
`lora_scale` and, with dropout, `lora_dropout` are the base's. Where layers are stacked, so are they. `Linear` reads what it finds, so
that the base alone is the model with its adapters off.

LoRA arXiv 2106.09685, rsLoRA arXiv 2312.03732, DoRA arXiv 2402.09353; the mathematics and the initialisation are PEFT's.
"""

import dataclasses
import difflib
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from aligner.matmul import at_least_float32, matmul, wide
from aligner.quant import dequantise
from aligner.sharding import param_shardings
from aligner.trees import flatten, unflatten
from aligner.types import Conversion, Model, Params, UserError

TRAINED = ("lora_a", "lora_b", "magnitude")
VARIANTS = ("lora", "rslora", "dora")
INITS = ("kaiming", "gaussian")
ALL = "all-linear"
DECODER = r"(.*language_model/)?(model/)?layers/"  # where the text decoder's layers stand in the tree
HEADS = r"(.*/)?(lm_head|score)$"
NO_ROUTER = r"(?!.*/mlp/gate$)"  # `transformers` has no linear map there: PEFT passes it over, or cannot adapt it


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What adapters a model carries: all that must be known of them besides their weights.

    Attributes:
        rank: tree path of a Linear -> r.
        scale: tree path of a Linear -> what its product is multiplied by, a tuple over the layers where they are stacked; a layer of
            scale 0 has no adapter.
        variant: one of VARIANTS.
        dropout: probability that an input of an adapter is dropped in training.
        saved: tree paths of the other leaves that train, whole.
    """

    rank: Mapping[str, int]
    scale: Mapping[str, float | tuple[float, ...]]
    variant: str
    dropout: float = 0.0
    saved: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Adapters":
        scale = {path: tuple(s) if isinstance(s, list) else s for path, s in values["scale"].items()}
        return cls(**{**values, "scale": scale, "saved": tuple(values["saved"])})


# ---- which leaves train -----------------------------------------------------------------------------------------------------------


def linears(conversion: Conversion, params: Params) -> dict[str, tuple[int, ...]]:
    """Tree path -> kernel shape of every linear map that may carry an adapter; heads and convolutions are none."""
    found = {}
    for path, leaf in flatten(params).items():
        module, _, name = path.rpartition("/")
        stack = max((prefix for prefix in conversion.stacks if path.startswith(prefix + "/")), key=len, default="")
        stacked = conversion.stacks[stack].count("{") if stack else 0
        if name == "kernel" and stacked <= 1 and len(leaf.shape) == stacked + 2 and not re.match(HEADS, module):
            found[module] = tuple(leaf.shape)
    return found


def quantised_kernels(conversion: Conversion, params: Params) -> set[str]:
    """Tree paths of the kernels that `config.quant.base` means: every Linear of the decoder's layers."""
    return {f"{module}/kernel" for module in linears(conversion, params) if re.match(DECODER, module)}


def plan(config: ConfigDict, model: Model, params: Params) -> Adapters:
    """The adapters that `config.lora` asks for; `config.lora.adapter` is not looked at.

    Args:
        config: the whole config; a module that `optim.freeze` matches gets no adapter.
        model: whose `conversion` says what is stacked.
        params: the model's tree; only shapes are read.

    Raises:
        UserError: a setting that makes no sense, or a regex that matches nothing.
    """
    c = config.lora
    known = linears(model.conversion, params)
    targets = [NO_ROUTER + DECODER] if not c.targets else [NO_ROUTER + ".*"] if tuple(c.targets) == (ALL,) else list(c.targets)
    for pattern in targets:
        if not any(re.match(pattern, module) for module in known):
            near = [m for m in known if m.rpartition("/")[2] in pattern] or difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise UserError(
                f"config.lora.targets has {pattern!r}, which matches the beginning of no linear map's path; there is, for example, "
                f"{near[0]!r} ('.*{near[0].rpartition('/')[2]}' matches all of that name), besides {_names(known)}; "
                "heads train whole, by config.lora.modules_to_save"
            )
    heads = (r"(.*/)?score/",) if model.has_score_head else ()  # as PEFT: a score head always trains, it may be fresh
    saved = _saved((*c.modules_to_save, *heads), params)
    frozen = _matched(params, config.optim.freeze, "config.optim.freeze")
    chosen = [m for m in known if any(re.match(p, m) for p in targets) and not {f"{m}/kernel"} & (frozen | set(saved))]
    if not chosen:
        raise UserError("config.optim.freeze or config.lora.modules_to_save covers every module that config.lora.targets means")
    value = c.alpha / (math.sqrt(c.rank) if c.variant == "rslora" else c.rank)
    layers = set(c.layers_to_transform)
    if min(layers, default=0) < 0:
        raise UserError(f"config.lora.layers_to_transform is {tuple(c.layers_to_transform)}; layers are counted from 0, none from the end")
    scale = {}
    for module in chosen:
        shape = known[module]
        if len(shape) == 2 and not layers:
            scale[module] = value
        elif len(shape) == 3 and max(layers, default=-1) < shape[0]:
            scale[module] = tuple(value if not layers or i in layers else 0.0 for i in range(shape[0]))
        else:
            what = f"has {shape[0]} layers" if len(shape) == 3 else "is not a layer's"
            asked = tuple(c.layers_to_transform)
            raise UserError(f"config.lora.layers_to_transform is {asked}, but {module} {what}; narrow config.lora.targets")
    return Adapters({m: c.rank for m in chosen}, scale, c.variant, c.dropout, saved)


def check(config: ConfigDict) -> None:
    """What is wrong with `config.lora` by itself."""
    c = config.lora
    if not isinstance(c.rank, int) or c.rank < 0:
        raise UserError(f"config.lora.rank is {c.rank}; it must be positive, or 0 to train without adapters")
    off = "but config.lora.rank is 0, which means no adapters; set a rank, for example 16"
    if not c.rank:
        for key in ("targets", "adapter", "modules_to_save", "layers_to_transform", "dropout"):
            if c[key]:
                raise UserError(f"config.lora.{key} is {c[key]!r}, {off}")
        if c.variant == "lora":
            return
    for key, known in (("variant", VARIANTS), ("init", INITS)):
        if c[key] not in known:
            near = difflib.get_close_matches(str(c[key]), known, n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise UserError(f"config.lora.{key} is {c[key]!r}; it must be one of {', '.join(known)}{hint}")
    if not c.rank:
        raise UserError(f"config.lora.variant is {c.variant!r}, {off}")
    if not c.alpha > 0:
        raise UserError(f"config.lora.alpha is {c.alpha}; it must be positive")
    if not 0 <= c.dropout < 1:
        raise UserError(f"config.lora.dropout is {c.dropout}; it must be in [0, 1)")
    for key in ("targets", "modules_to_save"):
        for pattern in c[key]:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(f"config.lora.{key} has {pattern!r}, which is no regular expression: {error}") from None


def _names(modules: Sequence[str]) -> str:
    return ", ".join(sorted({module.rpartition("/")[2] for module in modules}))


def _matched(params: Params, patterns: Sequence[str], key: str) -> set[str]:
    """The leaves whose path one of the regexes matches from its start.

    Raises:
        UserError: one matches nothing.
    """
    paths = flatten(params)
    found = {pattern: {path for path in paths if re.match(pattern, path)} for pattern in patterns}
    for pattern in sorted(found):
        if not found[pattern]:
            top = ", ".join(f"{name}/..." for name in params)
            raise UserError(f"{key} has {pattern!r}, which matches no parameter; the tree begins with {top}")
    return set().union(*found.values())


def _saved(patterns: Sequence[str], params: Params) -> tuple[str, ...]:
    """A module is saved whole, as PEFT does: every leaf beside one that a regex matches."""
    modules = {path.rpartition("/")[0] for path in _matched(params, patterns, "config.lora.modules_to_save")}
    return tuple(path for path in flatten(params) if path.rpartition("/")[0] in modules)


def split(params: Params, freeze: Sequence[str] = (), adapters: Adapters | None = None) -> tuple[dict, dict]:
    """(trainable, base). With adapters, they and `adapters.saved` train; without, all that no regex of `freeze` matches from its start.

    Branches without a leaf are left out.

    Raises:
        UserError: a regex matches nothing, or everything is frozen.
    """
    leaves = flatten(params)
    if adapters:
        trains = {path for path in leaves if path.rpartition("/")[2] in TRAINED} | set(adapters.saved)
    else:
        trains = leaves.keys() - _matched(params, freeze, "config.optim.freeze")
    if not trains:
        raise UserError("config.optim.freeze matches every parameter, so nothing would train")
    trainable = {path: leaf for path, leaf in leaves.items() if path in trains}
    return unflatten(trainable), unflatten({path: leaf for path, leaf in leaves.items() if path not in trains})


def combine(trainable: Params, base: Params) -> dict:
    """The whole tree again: the two trees share branches, never leaves."""
    merged = dict(base)
    for name, child in trainable.items():
        merged[name] = combine(child, base[name]) if isinstance(child, dict) and name in base else child
    return merged


def without_adapters(fixed: Mapping[str, Params]) -> dict:
    """The model before training, adapters off: the base, and the leaves that train whole as they were, `fixed["initial"]`."""
    return combine(fixed["initial"], fixed["base"]) if fixed.get("initial") else fixed["base"]


# ---- making adapters --------------------------------------------------------------------------------------------------------------


def new_leaves(adapters: Adapters, kernels: Mapping[str, Any], key: Array, dtype: Any, init: str = "kaiming") -> dict[str, Array]:
    """Leaves of new adapters, {tree path: array}: the product starts at zero.

    Args:
        adapters: which.
        kernels: tree path of a Linear -> its kernel, quantised or not; read only by DoRA, but for shapes.
        key: PRNG key; each module's is derived from its path.
        dtype: of what trains.
        init: "kaiming" (uniform within 1/sqrt(in), as PEFT) or "gaussian" (of deviation 1/r) for `lora_a`.
    """
    leaves = {}
    for module, r in adapters.rank.items():
        kernel = kernels[module]
        *stacked, rows, columns = kernel.shape
        own, shape = jax.random.fold_in(key, zlib.crc32(module.encode())), (*stacked, rows, r)
        if init == "gaussian":
            a = jax.random.normal(own, shape, dtype) / r
        else:
            a = jax.random.uniform(own, shape, dtype, -1, 1) / math.sqrt(rows)
        leaves[f"{module}/lora_a"] = a
        leaves[f"{module}/lora_b"] = jnp.zeros((*stacked, r, columns), dtype)
        if adapters.variant == "dora":
            norm = lambda k: column_norm(dequantise(k, k.dtype)).astype(dtype)
            leaves[f"{module}/magnitude"] = jax.lax.map(norm, kernel) if stacked else norm(kernel)
    return leaves


def constants(adapters: Adapters) -> dict[str, Array]:
    """The leaves of adapters that do not train, {tree path: float32 array}."""
    leaves = {f"{module}/lora_scale": jnp.asarray(scale, jnp.float32) for module, scale in adapters.scale.items()}
    if adapters.dropout:
        leaves |= {f"{m}/lora_dropout": jnp.full(jnp.shape(scale), adapters.dropout, jnp.float32) for m, scale in adapters.scale.items()}
    return leaves


def attach(
    params: Params,
    adapters: Adapters,
    start: Mapping[str, Any],
    *,
    key: Array,
    dtype: Any,
    init: str = "kaiming",
    rules: Sequence[tuple] = (),
    mesh: Any = None,
) -> dict:
    """The tree with adapters in it, laid out over the mesh like the kernels that they adapt.

    Args:
        params: the model's.
        adapters: which; `start` holds weights of them to begin with, {tree path: array}, also of `adapters.saved`.
        key, dtype, init: as `new_leaves`.
        rules: the model's sharding rules.
        mesh: None leaves it to the default device.
    """
    leaves = flatten(params)
    kernels = {module: leaves[f"{module}/kernel"] for module in adapters.rank}
    make = lambda kernels: new_leaves(adapters, kernels, key, dtype, init) | constants(adapters)
    abstract = jax.eval_shape(make, kernels)
    layout = None if mesh is None else flatten(param_shardings(unflatten(abstract), sharding_rules(rules), mesh))
    made = jax.jit(make, out_shardings=layout)(kernels)
    for path, value in start.items():
        old = made[path] if path in made else leaves[path]
        made[path] = jax.device_put(jnp.asarray(value, old.dtype), None if mesh is None else old.sharding)
    return unflatten(leaves | made)


def sharding_rules(rules: Sequence[tuple[str, tuple]]) -> tuple:
    """The rules with those of adapters before them: a low-rank factor shares one axis with its kernel."""
    made = []
    for pattern, axes in rules:
        if pattern.endswith("/kernel$") and len(axes) == 2:
            module = pattern.removesuffix("kernel$")
            made += [(module + "lora_a$", (axes[0], None)), (module + "lora_b$", (None, axes[1])), (module + "magnitude$", (axes[1],))]
    return (*made, *rules)


# ---- using them -------------------------------------------------------------------------------------------------------------------


def column_norm(kernel: Float[Array, "... K N"]) -> Float[Array, "... N"]:
    """Length of the weights of each output, in float32 or wider."""
    return jnp.sqrt(jnp.sum(jnp.square(at_least_float32(kernel)), axis=-2))


def adapt(
    y: Float[Array, "... N"], x: Float[Array, "... K"], kernel: Any, read: Callable[[str], Any], make_key: Callable[[], Array] | None
) -> Float[Array, "... N"]:
    """`x @ kernel` with the adapter of that kernel.

    Args:
        y: `x @ kernel`, before the bias.
        x: the input.
        kernel: an array or quantised; read by DoRA alone.
        read: name -> leaf of the module, None where there is none.
        make_key: gives a key for dropout; None where nothing is dropped.
    """
    scale, rate = read("lora_scale"), read("lora_dropout")
    a, b = (read(name).astype(x.dtype) for name in ("lora_a", "lora_b"))
    if make_key is not None and rate is not None:
        x = jnp.where(jax.random.bernoulli(make_key(), 1 - rate, x.shape), x / (1 - rate).astype(x.dtype), 0)
    delta = matmul(matmul(x, a), b)
    y = y + (at_least_float32(delta) * scale).astype(y.dtype)
    magnitude = read("magnitude")
    if magnitude is not None:
        # the length is a constant of the gradient, section 4.3 of the paper
        whole = jax.lax.stop_gradient(_sum(dequantise(kernel, x.dtype), a, b, scale))
        y = y * jnp.where(scale != 0, magnitude.astype(y.dtype) / column_norm(whole).astype(y.dtype), 1)
    return y


def _sum(kernel, a, b, scale):
    dtype = wide(jnp.result_type(kernel, a))
    product = jnp.matmul(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(dtype) + scale * product


def merge(params: Params) -> dict:
    """The tree without adapters, each kernel replaced by what it and its adapter amount to, in at least float32.

    Layers of a stack are merged one after the other.
    """
    leaves = flatten(params)
    for path in [path for path in leaves if path.endswith("/lora_a")]:
        module = path.removesuffix("/lora_a")
        own = {name: leaves.pop(f"{module}/{name}", None) for name in (*TRAINED, "lora_scale", "lora_dropout")}
        leaves[f"{module}/kernel"] = _merge(leaves[f"{module}/kernel"], own["lora_a"], own["lora_b"], own["lora_scale"], own["magnitude"])
    return unflatten(leaves)


def merge_into(adapters: Adapters | None, trainable: Params) -> Callable[[str, Array], Array]:
    """(tree path, leaf of the base) -> the leaf with its adapter merged: `merge` leaf by leaf, as the base is read."""
    own = flatten(trainable) | (constants(adapters) if adapters else {})

    def one(path: str, leaf: Array) -> Array:
        module = path.removesuffix("/kernel")
        if module == path or f"{module}/lora_a" not in own:
            return leaf
        return _merge(leaf, *(own.get(f"{module}/{name}") for name in ("lora_a", "lora_b", "lora_scale", "magnitude")))

    return one


@jax.jit
def _merge(kernel, a, b, scale, magnitude):
    def one(leaves):
        kernel, a, b, scale, magnitude = leaves
        whole = _sum(dequantise(kernel, kernel.dtype), a, b, scale)
        return whole if magnitude is None else whole * jnp.where(scale != 0, magnitude / column_norm(whole), 1)

    return jax.lax.map(one, (kernel, a, b, scale, magnitude)) if kernel.ndim > 2 else one((kernel, a, b, scale, magnitude))
