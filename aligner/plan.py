"""What a config needs, before any machine is rented: the real training step, compiled ahead of time for a topology that need not be here.

    python -m aligner.plan --config configs/dpo_llava.py --topology v5e:4x8 --config.mesh.fsdp=32
    python -m aligner.plan --config configs/dpo_llava.py:tiny --topology cpu:8

TPU topologies need `pip install 'aligner[tpu]'` and no TPU. `cuda:h200:8` is compiled for as many CPU devices and says that it is an
estimate. Only the checkpoint's config.json is read, never its weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from aligner.types import UserError

TOPOLOGY = flags.DEFINE_string("topology", "cpu:1", "v5e:4x8, v5p:4x4x4, v6e:4x4, cpu:8, cuda:h200:8 ...")
JSON = flags.DEFINE_string("json", None, "Write the figures to this file as well.")
TOKENS = flags.DEFINE_integer("tokens", None, "Columns of a row; default: data.max_length, for prompt and both answers.")
SCORED = flags.DEFINE_integer("scored", None, "Scored positions of a row; default: half of its columns.")
IMAGES = flags.DEFINE_integer("images", 1, "Images of a row, for models that see.")

GIB = 2**30
MEMORY = {  # GiB of one chip
    **{"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32},
    **{"a100": 80, "h100": 80, "h200": 141, "b200": 180},
}
COLLECTIVE = re.compile(r"= (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"(pred|[suf]\d+|bf16)\[([\d,]*)\]")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def devices_of(topology: str) -> tuple[list[Any], str, bool]:
    """(devices, chip, whether the figures are an estimate) of a topology's name. Nothing else may have started JAX before."""
    kind, _, rest = topology.partition(":")
    if kind in ("cpu", "cuda"):
        chip, _, count = rest.rpartition(":")
        if not count.isdigit():
            raise UserError(f"--topology {topology}: a number of devices must stand at the end, such as cpu:8 or cuda:h200:8")
        if kind == "cuda" and chip not in MEMORY:
            raise UserError(f"--topology {topology}: chip {chip!r} is not known; known are {', '.join(MEMORY)}")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        return jax.devices("cpu")[: int(count)], chip or "cpu", kind == "cuda"
    if kind not in MEMORY:
        raise UserError(f"--topology {topology}: {kind!r} is not known; known are cpu, cuda and the TPUs v4, v5e, v5p, v6e")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), kind, False
    except Exception as error:
        raise UserError(f"--topology {topology} cannot be described: {str(error).splitlines()[0]}; is 'aligner[tpu]' installed?") from None


def compile_step(config: Any, model: Any, devices: list[Any], tokens: int, scored: int, images: int) -> dict[str, Any]:
    """Compile the training step of a config for some devices, from shapes alone.

    Args:
        config: resolved.
        model: from a config.json.
        devices: of the topology.
        tokens, scored, images: T, S and I of a row.

    Returns:
        Figures for one device, in bytes and floating-point operations; the shardings; what the compiled program communicates.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from aligner import algorithms, convert, lora, optim, sharding, state
    from aligner.data.layout import empty_row
    from aligner.train_step import jit, make_train_step

    mesh = sharding.make_mesh(config.mesh, devices)
    algorithm = algorithms.make(config, model)
    abstract = convert.abstract_params(model)
    trained = sharding.tree_paths(lora.split(abstract, config.optim.freeze)[0]).keys()
    shardings = sharding.param_shardings(abstract, model.sharding_rules, mesh)

    def placed(path, leaf, place):
        dtype = config.model.param_dtype if "/".join(k.key for k in path) in trained else config.model.dtype
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place)

    params = jax.tree_util.tree_map_with_path(placed, abstract, shardings)
    trainable, base = lora.split(params, config.optim.freeze)
    fixed = {"base": base}
    if config.reference.kind == "copy":
        low = jnp.dtype(config.model.dtype)
        fixed["reference"] = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, low, sharding=p.sharding), params)
    schedule = optim.make_schedule(config.optim, 1000)
    optimizer = optim.make_optimizer(config.optim, schedule, model.trained_layers)
    train_state = state.abstract_create(trainable, optimizer, algorithm.carry, mesh, own_reference=algorithm.sync is not None)
    rows = config.data.batch_size
    row = empty_row(tokens, scored, images if model.media else 0, model.media)
    if "reference_logps" in algorithm.columns:
        row["reference_logps"] = np.zeros((1, 2), np.float32)
    place = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((rows, *array.shape), array.dtype, sharding=place) for name, array in row.items()}
    step = make_train_step(
        algorithm,
        optimizer,
        dtype=config.model.dtype,
        schedule=schedule,
        accumulate=config.train.accumulate,
        max_grad_norm=config.optim.max_grad_norm,
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, train_state)
    started = time.monotonic()
    with jax.set_mesh(mesh):
        program = jit(step, donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh)))
        compiled = program.lower(train_state, fixed, batch).compile()
    memory = compiled.memory_analysis()

    def local(tree) -> int:
        shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * (8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize) for shape, dtype in shapes)

    return dict(
        devices=len(devices),
        mesh=dict(mesh.shape),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)),
        trainable=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable)),
        trainable_bytes=local(trainable),
        frozen_bytes=local(fixed),
        optimizer_bytes=local(train_state.opt_state),
        batch_bytes=local(batch),
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        collectives=collectives(compiled.as_text()),
        shardings={path: str(leaf.sharding.spec) for path, leaf in sharding.tree_paths(params).items()},
        compile_seconds=time.monotonic() - started,
    )


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Kind -> number and result bytes of a compiled program's collectives, each counted once however often its loop runs."""
    found: dict[str, dict[str, int]] = {}
    for shapes, kind in COLLECTIVE.findall(program):
        size = sum(BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in SHAPE.findall(shapes))
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def describe(figures: dict[str, Any], topology: str, chip: str, estimate: bool) -> str:
    """The figures as a table for people."""
    gib = lambda name: f"{figures[name] / GIB:10.2f} GiB"
    lines = [
        f"{topology}: {figures['devices']} devices, mesh {figures['mesh']}" + ("  (ESTIMATE: compiled for CPU)" if estimate else ""),
        f"parameters      {figures['parameters'] / 1e6:10,.1f} M, of which {figures['trainable'] / 1e6:,.1f} M train",
        "on each device",
        f"  trainable     {gib('trainable_bytes')}",
        f"  frozen        {gib('frozen_bytes')}",
        f"  optimizer     {gib('optimizer_bytes')}",
        f"  batch         {gib('batch_bytes')}",
        f"  temporaries   {gib('temporary_bytes')}   (activations, gradients)",
        f"  in all        {gib('total_bytes')}" + (f"   of {MEMORY[chip]} GiB" if chip in MEMORY else ""),
        f"  operations    {figures['flops'] / 1e12:10.2f} TFLOP a step, as the compiler counts (a loop's body once)",
    ]
    for kind, entry in sorted(figures["collectives"].items()):
        lines.append(f"  {kind:<18} {entry['count']:4d} in the program, {entry['bytes'] / 2**20:,.1f} MiB")
    lines.append(f"compiled in {figures['compile_seconds']:.0f} s")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    from aligner.main import CONFIG, WORKDIR

    if CONFIG.value is None:
        raise UserError("--config is missing; for example: python -m aligner.plan --config configs/dpo_llava.py --topology v5e:4x8")
    devices, chip, estimate = devices_of(TOPOLOGY.value)
    from aligner import convert, workdir
    from aligner.run import call_setup, check_config
    from aligner.sharding import make_mesh

    config = workdir.resolve(CONFIG.value, WORKDIR.value or "runs/plan")
    check_config(config, make_mesh(config.mesh, devices))
    if config.setup:
        call_setup(config)
    model = convert.model_from_folder(convert.find_folder(config.model.path, config.model.revision, weights=False))
    tokens = TOKENS.value or config.data.max_length
    figures = compile_step(config, model, devices, tokens, SCORED.value or tokens // 2, IMAGES.value)
    print(describe(figures, TOPOLOGY.value, chip, estimate))
    limit = MEMORY.get(chip)
    if limit and figures["total_bytes"] > limit * GIB:
        print(f"DOES NOT FIT: {figures['total_bytes'] / GIB:.1f} of {limit} GiB. {advice(config)}")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures | {"topology": TOPOLOGY.value, "estimate": estimate}, indent=2) + "\n")


def advice(config: Any) -> str:
    """The first setting to turn."""
    if config.train.remat == "none":
        return "Try --config.train.remat=full."
    if config.mesh.fsdp == 1:
        return "Try a larger --config.mesh.fsdp."
    return f"Try --config.train.accumulate={2 * config.train.accumulate}, a larger --config.mesh.fsdp, or freeze more."


if __name__ == "__main__":
    from aligner.main import parse

    try:
        app.run(main, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
