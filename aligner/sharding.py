"""Meshes and where arrays live on them: the only file that knows mesh axis names.

Models and rules speak of logical axes ("embed", "heads", ...); LOGICAL says which mesh axis each one is laid over.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aligner.types import Params, UserError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "layers": None,
    "length": "sequence",  # columns of a row, but within attention
    "parts": (*BATCH_AXES, "sequence"),  # of a batch, its rows and their columns
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "attended": ("tensor", "sequence"),  # heads within attention, which needs whole rows
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": ("fsdp", "sequence"),
    "rows": ("tensor", "fsdp", "sequence"),  # of a table that is looked up, before its width
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes `data, fsdp, sequence, tensor`; one size may be -1, "what is left".

    Raises:
        UserError: the sizes do not make up the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"config.mesh has sizes {dict(zip(AXES, shape))}: each must be positive, and at most one may be -1")
    known = int(np.prod([size for size in shape if size > 0]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(f"config.mesh {dict(zip(AXES, shape))} does not divide {len(devices)} devices: their product must be that number")
    between = between_slices(shape, devices)
    within = [size // parts for size, parts in zip(shape, between)]
    # an axis may wind through a part of a TPU's torus: 64 of 4x4x8
    if max(between) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def between_slices(shape: Sequence[int], devices: Sequence[jax.Device]) -> list[int]:
    """Into how many parts each axis of a mesh is cut over the slices of TPUs, or the nodes of GPUs, that the devices are of.

    The network between them is the slow one: the outermost axes, which send the least, go over it as far as their sizes allow.
    """
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    left, parts = len(slices) if len(set(slices.values())) == 1 else 1, []  # of nodes that are unlike no mesh is made of meshes
    for size in shape:
        parts.append(math.gcd(size, left))
        left //= parts[-1]
    return parts


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes; everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec_for(logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The mesh axes for a leaf with these logical axes; a dimension is laid over as many of its axes as divide it, else it stays whole.

    An axis that several dimensions have is the first one's that it divides.
    """
    axes, taken = [], set()
    for name, size in zip(logical, shape):
        axis = LOGICAL[name] if name else None
        over = [a for a in (axis if isinstance(axis, tuple) else (axis,)) if a and mesh.shape[a] > 1 and a not in taken]
        while over and size % int(np.prod([mesh.shape[a] for a in over])):
            over.pop()
        taken.update(over)
        axes.append(tuple(over) if len(over) > 1 else over[0] if over else None)
    return PartitionSpec(*axes)


def tree_paths(tree: Params) -> dict[str, jax.Array]:
    """A nested dict as {"a/b/c": leaf}."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in flat}


def param_shardings(abstract: Params, rules: Sequence[tuple[str, tuple[str | None, ...]]], mesh: Mesh) -> Params:
    """A sharding for every leaf: the first rule whose regex is found in its path says its logical axes; without one it is replicated.

    Rules name the trailing axes, so that one rule serves a stacked leaf ([layers, in, out]) and a single one.
    """

    def one(path, leaf):
        name = "/".join(str(k.key) for k in path)
        logical = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        logical = (None,) * (len(leaf.shape) - len(logical)) + tuple(logical)
        return NamedSharding(mesh, spec_for(logical, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, abstract)


def alone() -> bool:
    """Whether the program that is being built is for one device, with a mesh or without."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def parts_of(logical: str) -> int:
    """Into how many parts an axis is cut, where it can be, in the program that is being built."""
    mesh, axes = jax.sharding.get_abstract_mesh(), LOGICAL[logical]
    return math.prod(mesh.shape.get(axis, 1) for axis in (axes if isinstance(axes, tuple) else (axes,)))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Ask the compiler to lay an activation out by logical axes; nothing happens without a mesh of more than one device."""
    if alone():
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(logical, x.shape, jax.sharding.get_abstract_mesh()))


def per_device(
    function: Callable[..., jax.Array], into: Sequence[Sequence[str | None]], out: Sequence[str | None], summed: str | None = None
) -> Callable[..., jax.Array]:
    """`function` on every device by itself: on its part of the arguments along their logical axes, gathered along all others.

    For what the compiler cannot split well itself, such as sorting rows. Where an argument is split along the axis `summed`, the results
    are added up over it. Without a mesh of more than one device this is the function.

    Args:
        function: of arrays, to one array.
        into: logical axes of every argument.
        out: of the result.
        summed: a logical axis that the function contracts; None where it contracts none.
    """

    def run(*arguments: jax.Array) -> jax.Array:
        if alone():
            return function(*arguments)
        mesh = jax.sharding.get_abstract_mesh()
        specs = tuple(spec_for(logical, x.shape, mesh) for logical, x in zip(into, arguments, strict=True))
        shape = jax.eval_shape(function, *arguments).shape
        parts = [part for logical, spec in zip(into, specs) for axis, part in zip(logical, spec) if summed and axis == summed]
        local = (lambda *parts: jax.lax.psum(function(*parts), LOGICAL[summed])) if any(parts) else function
        # Pallas' kernels do not say along which axes their results differ, so that it cannot be checked where nothing is summed
        return jax.shard_map(local, in_specs=specs, out_specs=spec_for(out, shape, mesh), check_vma=summed is not None)(*arguments)

    return run


ROW = ("batch", "length")


def largest(x: jax.Array, k: int, along: str | None = None) -> jax.Array:
    """Where along the last axis of [B, T, N], which lies along a logical axis, the k largest are: [B, T, k], of equal ones the first first.

    The compiler would gather all rows on every device to see, and all of a row. Here each device looks at what it has, and at the k largest
    of the others' parts.
    """
    total = x.shape[-1]

    def find(x: jax.Array, names: jax.Array) -> jax.Array:
        values, at = jax.lax.top_k(x, min(k, x.shape[-1]))
        if x.shape[-1] == total:
            return at
        values, at = (jax.lax.all_gather(each, LOGICAL[along], axis=2, tiled=True) for each in (values, names[at]))
        return jnp.take_along_axis(at, jax.lax.top_k(values, k)[1], axis=-1)

    return per_device(find, ((*ROW, along), (along,)), (*ROW, None))(jax.lax.stop_gradient(x), jnp.arange(total))


def taken(x: jax.Array, at: jax.Array, along: str) -> jax.Array:
    """`jnp.take_along_axis` of [B, T, N], which lies along a logical axis, at [B, T, k]: [B, T, k]. Each device takes what it has."""

    def take(x: jax.Array, names: jax.Array, at: jax.Array) -> jax.Array:
        here = at - names[0]
        found = jnp.take_along_axis(x, jnp.clip(here, 0, x.shape[-1] - 1), axis=-1)
        return jnp.where((here >= 0) & (here < x.shape[-1]), found, 0)

    return per_device(take, ((*ROW, along), (along,), (*ROW, None)), (*ROW, None), summed=along)(x, jnp.arange(x.shape[-1]), at)


def like_params(tree: Params, params: Params, shardings: Params, mesh: Mesh) -> Params:
    """Shardings for a tree made from the parameters (optimizer state): a leaf whose path ends like a parameter's is laid out like it."""
    by_path = dict(zip(tree_paths(params), jax.tree.leaves(shardings, is_leaf=lambda s: isinstance(s, NamedSharding))))
    shapes = {path: leaf.shape for path, leaf in tree_paths(params).items()}

    def one(path, leaf):
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
        for start in range(len(keys)):
            name = "/".join(keys[start:])
            if name in by_path and shapes[name] == leaf.shape:
                return by_path[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)
