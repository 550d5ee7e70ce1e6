"""The training step of a config from shapes alone: its arguments, the compiled program, and what that program holds, computes and sends.

Everything is put together as `aligner.run` does it, with `jax.ShapeDtypeStruct` where a run has arrays; the devices need not be here.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aligner import algorithms, convert, lora, optim, quant, sharding, state
from aligner.convert import peft
from aligner.data.kinds import ANSWERS, ENCODERS
from aligner.data.layout import empty_row
from aligner.models import attention
from aligner.train_step import jit_train_step
from aligner.trees import flatten, unflatten
from aligner.types import Algorithm, Model, Params, UserError


class Row(NamedTuple):
    """Sizes of a row, as `aligner.data.loader.Dataset` has them: columns, scored positions, images, examples, answers of an example."""

    tokens: int
    scored: int
    images: int = 0
    examples: int = 1
    answers: int = 2


class Step(NamedTuple):
    """A training step that is not compiled yet: `program.lower(state, fixed, batch)` under `mesh`.

    `beside` is what lies on the devices meanwhile and is no argument of the step: what wrote the answers, and their reference.
    """

    program: Any
    state: Any
    fixed: dict[str, Params]
    batch: dict[str, jax.ShapeDtypeStruct]
    params: Params
    mesh: Mesh
    attention: str
    beside: dict[str, Params]


class TooLarge(Exception):
    """The compiler found the program larger than the chip's memory: (bytes it needs, bytes there are)."""


def row_of(config: Any, model: Model, tokens: int | None, scored: int | None, images: int, examples: int | None) -> Row:
    """The row that a config makes, where nothing more is known of the data: as long as it may be, half of it scored."""
    algorithm = algorithms.make(config, model)
    kind = ENCODERS[algorithm.needs]
    answers = config.algorithm.get("answers", config.algorithm.get("num_generations", _answers(algorithm)))
    tokens = tokens or config.data.get("packed_length") or config.data.max_length
    examples = examples or (max(1, tokens // 256) if config.data.packing else 1)
    everything = algorithm.needs == "text"
    scored = scored or (tokens if everything else answers * examples if kind.last else max(1, tokens // 2))
    if scored > tokens:
        raise UserError(f"a row of {tokens} columns has no {scored} scored positions; --scored is at most --tokens")
    images = images if model.media else 0
    if images and model.media.show is None and (filled := images * model.media.features) > tokens:
        raise UserError(f"a row of {tokens} columns has no room for {filled} tokens of images; give --tokens={2 * filled}")
    return Row(tokens, scored, images, examples, answers)


def _answers(algorithm: Algorithm) -> int:
    return {"supervised": 1, "text": 1, "unpaired_alone": 1, "two_sided": 4, "triple": 3}.get(algorithm.needs, 2)


def abstract_params(config: Any, model: Model, mesh: Mesh) -> tuple[Params, lora.Adapters | None]:
    """(the tree that `aligner.run` loads, with adapters and quantised kernels; what the adapters are)."""
    shapes = convert.abstract_params(model)
    adapters, start = peft.plan(config, model, shapes)
    if adapters:
        make = lambda p: lora.attach(p, adapters, start, key=jax.random.key(0), dtype=config.model.param_dtype, init=config.lora.init)
        shapes = jax.eval_shape(make, shapes)
    names = sharding.tree_paths(lora.split(shapes, config.optim.freeze, adapters)[0]).keys()
    packed = lora.quantised_kernels(model.conversion, convert.abstract_params(model)) - names if config.quant.base else set()
    places = flatten(sharding.param_shardings(shapes, lora.sharding_rules(model.sharding_rules), mesh))

    def one(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        constant = path.rpartition("/")[2] in ("lora_scale", "lora_dropout")
        dtype = leaf.dtype if constant else config.model.param_dtype if path in names else config.model.dtype
        placed = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=places[path])
        return quant.abstract(placed, config.quant.base) if path in packed else placed

    return unflatten({path: one(path, leaf) for path, leaf in flatten(shapes).items()}), adapters


def check_planned(config: Any) -> None:
    """Raises UserError where a config's step can be put together by a run alone."""
    if config.algorithm.name == "ppo":
        raise UserError("config.algorithm.name is 'ppo', whose critic is not planned for; plan for 'grpo' and add the critic's own bytes")


def make_step(config: Any, model: Model, devices: list[Any], row: Row) -> Step:
    """The step that `aligner.run` would jit.

    Args:
        config: resolved.
        model: from a config.json; no parameters.
        devices: that the mesh is made of.
        row: sizes of a row; `config.data.batch_size` says how many there are.

    Raises:
        UserError: the config does not fit the model or the devices, or is one that only a run can put together.
    """
    check_planned(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    algorithm = algorithms.make(config, model)
    params, adapters = abstract_params(config, model, mesh)
    trainable, base = lora.split(params, config.optim.freeze, adapters)
    online = config.algorithm.name in algorithms.ONLINE
    in_compute_dtype = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.model.dtype), sharding=leaf.sharding)
    fixed, beside = {"base": base}, {}
    if config.reference.kind == "copy" and algorithm.sync is None and not online:
        fixed["reference"] = lora.combine(jax.tree.map(in_compute_dtype, trainable), base)
    if config.reference.kind == "base":
        leaves = flatten(trainable)
        fixed["initial"] = unflatten({path: in_compute_dtype(leaves[path]) for path in adapters.saved})
    for name, (other, _) in algorithm.others.items():
        shapes = convert.abstract_params(other)
        places = sharding.param_shardings(shapes, other.sharding_rules, mesh)
        put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.model.dtype), sharding=place)
        fixed[name] = jax.tree.map(put, shapes, places)
    if online:  # as `aligner.online` holds them
        copy = jax.tree.map(in_compute_dtype, trainable)
        refers = config.algorithm.beta > 0 and algorithm.rollout and config.algorithm.name != "on_policy_distillation"
        if refers and config.reference.kind != "base":
            beside["reference"] = copy
        if not config.generation.server:
            beside["writer"] = lora.combine(copy, base)
    schedule = optim.make_schedule(config.optim, 1000)
    optimizer = optim.make_optimizer(config.optim, schedule, model.trained_layers)
    train_state = state.abstract_create(trainable, optimizer, algorithm.carry, mesh, own_reference=algorithm.sync is not None)
    program = jit_train_step(config, algorithm, optimizer, schedule, train_state, mesh)
    backend = attention.chosen(mesh, config.model.attention)
    return Step(program, train_state, fixed, abstract_batch(config, model, algorithm, params, row, mesh), params, mesh, backend, beside)


def abstract_batch(config: Any, model: Model, algorithm: Algorithm, params: Params, row: Row, mesh: Mesh) -> dict:
    """The global batch: what the loader gives and the columns that `prepare` or a rollout adds."""
    rows, place = config.data.batch_size, sharding.batch_sharding(mesh)
    leading = lambda shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)
    made = empty_row(row.tokens, row.scored, row.images, model.media, row.examples)
    batch = {name: leading(array.shape, array.dtype) for name, array in made.items()}
    for name, shape in ENCODERS[algorithm.needs].values.items():
        batch[name] = leading((row.examples, *(row.answers if size == ANSWERS else size for size in shape)), np.float32)
    if config.algorithm.name in algorithms.ONLINE:
        names = ("learn", "advantages", "sampling_logps", "old_logps", "old_entropy", "reference_logps")
        batch |= {name: leading((row.scored,), np.float32) for name in names}
    elif algorithm.prepare:
        with jax.set_mesh(mesh):
            found = jax.eval_shape(algorithm.prepare, params, batch)
        batch |= {name: leading(leaf.shape[1:], leaf.dtype) for name, leaf in found.items()}
    return batch


def compile_step(step: Step) -> Any:
    """The compiled program.

    Raises:
        TooLarge: the compiler says that it needs more than the chip has.
    """
    try:
        with jax.set_mesh(step.mesh), attention.BACKEND(step.attention):
            return step.program.lower(step.state, step.fixed, step.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if sizes := re.search(r"Used ([\d.]+)([KMGT])[^ ]* of ([\d.]+)([KMGT])", str(error)):
            unit = {letter: 1024**power for power, letter in enumerate("KMGT", start=1)}
            raise TooLarge(float(sizes[1]) * unit[sizes[2]], float(sizes[3]) * unit[sizes[4]]) from None
        raise


def local_bytes(tree: Any) -> int:
    """What one device holds of abstract arrays."""
    size = lambda dtype: 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else 0.5 if "int4" in dtype.name else dtype.itemsize
    return int(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * size(leaf.dtype) for leaf in jax.tree.leaves(tree)))


def once(tree: Any) -> list[Any]:
    """Leaves, those that stand in several places counted once: a reference shares with the policy what does not train."""
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def figures(step: Step) -> dict[str, Any]:
    """What the step holds on each device, before and after it is compiled.

    Returns:
        Numbers of parameters, bytes on one device, floating-point operations of one step on one device, collectives, shardings; where
        the program is larger than the chip, `too_large` is true and what only the compiler knows is missing.
    """
    started = time.monotonic()
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    kernels = lambda tree: jax.tree.map(lambda leaf: leaf.qvalue if quant.is_quantised(leaf) else leaf, tree, is_leaf=quant.is_quantised)
    trains = step.state.trainable
    found = dict(
        devices=step.mesh.size,
        mesh=dict(step.mesh.shape),
        parameters=count(kernels(step.params)),
        trainable=count(trains),
        trainable_bytes=local_bytes(trains),
        frozen_bytes=local_bytes(once(step.fixed)),
        optimizer_bytes=local_bytes(step.state.opt_state),
        reference_bytes=local_bytes(step.state.reference),
        beside_bytes=local_bytes([once(tree) for tree in step.beside.values()]),
        batch_bytes=local_bytes(step.batch),
        gradient_bytes=local_bytes(trains),
        flops=flops(step) / step.mesh.size,
        shardings={path: str(leaf.sharding.spec) for path, leaf in sharding.tree_paths(kernels(step.params)).items()},
    )
    shared = local_bytes(step.fixed) - found["frozen_bytes"]
    found["resident_bytes"] = local_bytes((step.state, step.fixed, step.batch)) - shared + found["beside_bytes"]
    try:
        compiled = compile_step(step)
    except TooLarge as error:
        needed, there = error.args
        needed += found["beside_bytes"] - shared
        return found | dict(too_large=True, total_bytes=int(needed), chip_bytes=int(there), compile_seconds=time.monotonic() - started)
    memory = compiled.memory_analysis()
    # an argument that the step does not read is none of the program's, and lies there all the same
    arguments = max(memory.argument_size_in_bytes - shared, found["resident_bytes"] - found["beside_bytes"])
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return found | dict(
        too_large=False,
        temporary_bytes=memory.temp_size_in_bytes,
        activation_bytes=max(0, memory.temp_size_in_bytes - found["gradient_bytes"]),
        total_bytes=arguments + results + memory.temp_size_in_bytes + found["beside_bytes"],
        collectives=collectives(compiled.as_text()),
        compile_seconds=time.monotonic() - started,
    )


# ---- operations


def flops(step: Step) -> float:
    """Operations of all matrix products and convolutions of a step, on all devices together, loops counted as often as they run."""
    with jax.set_mesh(step.mesh):
        return _flops(step.program.trace(step.state, step.fixed, step.batch).jaxpr.jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = parameters["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
        inner = [_flops(body) for body in _bodies(parameters)]
        if name == "cond":
            total += max(inner)
        elif name == "scan":
            total += sum(inner) * parameters["length"]
        else:  # what a shard_map holds is one device's part
            total += sum(inner) * (parameters["mesh"].size if name == "shard_map" else 1)
    return total


def _bodies(parameters: Mapping[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    flat = [item for value in parameters.values() for item in (value if isinstance(value, (tuple, list)) else (value,))]
    opened = [getattr(item, "jaxpr", item) for item in flat]
    return [item for item in opened if hasattr(item, "eqns")]


# ---- collectives

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)')
_BETWEEN = r"send(?=\(.*_xla_megascale)"  # what a TPU's program gives its host for the other slices
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)}|{_BETWEEN})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(pred|[suf]\d+|bf16)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program: kind, dtype and shape of its largest result on a device, bytes of all results, how often it runs.

    The kind `between-slices` is what a device sends to other slices of TPUs, as a part of a collective that spans them.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int


def find_collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program's text, with the number of times that the loops around each one run."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if opened := _COMPUTATION.match(line):
            name = opened[2]
            entry = name if opened[1] else entry
            lines[name] = []
        elif name and line.startswith(" "):
            lines[name].append(line)
    found: dict[Any, Collective] = {}

    def walk(name: str, times: int, caller: str = "") -> None:
        for line in lines.get(name, ()):
            if here := _COLLECTIVE.search(line):
                kind, results = here[2], here[1]
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # how a TPU scatters: the fusion keeps its part
                    kind, results = "reduce-scatter", caller.partition(" fusion(")[0]
                one = _collective(kind, results, bool(here[3]), times)
                # what runs beside several other operations stands in a TPU's program once for each: the same channel
                channel = _CHANNEL.search(line)
                key = (kind, channel[1]) if channel else len(found)
                if key not in found or times < found[key].times:
                    found[key] = one
            elif "while(" in line or "calls=" in line or "conditional(" in line or " call(" in line:
                inner = times * _trips(line, lines) if " while(" in line else times
                for called, several in _CALLED.findall(line):
                    for inside in [called] if called else [part.strip().lstrip("%") for part in several.split(",")]:
                        walk(inside, inner, line)

    walk(entry, 1)
    return list(found.values())


def _trips(loop: str, lines: Mapping[str, list[str]]) -> int:
    """How often a loop runs: what the compiler notes, else the bound that its condition compares with (scans count from 0); else once."""
    if noted := _TRIPS.search(loop):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)[1]
    text = "\n".join(lines.get(condition, ()))
    for called in re.findall(r"calls=%?([\w.\-]+)", text):
        text += "\n".join(lines.get(called, ()))
    return max(map(int, re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)), default=1)


def _collective(kind: str, results: str, starts: bool, times: int) -> Collective:
    arrays = [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(results)]
    size = lambda array: int(BYTES[array[0]] * math.prod(array[1]))
    largest = max(arrays, key=size)
    # what starts a collective returns its operands beside its results, what sends between slices a mark
    total = size(largest) if (starts and kind != "all-reduce") or kind == "send" else sum(map(size, arrays))
    return Collective("between-slices" if kind == "send" else kind, *largest, total, times)


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Kind -> number in the program, how often they run in a step, and the bytes of their results on one device in a step."""
    found: dict[str, dict[str, int]] = {}
    for one in find_collectives(program):
        entry = found.setdefault(one.kind, {"count": 0, "times": 0, "bytes": 0})
        entry["count"] += 1
        entry["times"] += one.times
        entry["bytes"] += one.times * one.bytes
    return found
