"""What a config needs, before any machine is rented: the real training step, compiled ahead of time for a topology that need not be here.

    python -m aligner.plan --config configs/dpo_llava.py --topology v5e:4x8 --config.mesh.fsdp=32
    python -m aligner.plan --config configs/dpo_llava.py --topology v5p:4x4x4 --slices 2 --config.mesh.fsdp=64
    python -m aligner.plan --config configs/dpo_llava.py:tiny --topology cpu:8

TPU topologies need `pip install '.[tpu]'` and no TPU. `cuda:h200:8` is compiled for as many CPU devices and says that it is an
estimate. Only the checkpoint's config.json is read, never its weights. A config that does not fit is changed, one setting after the
other, and compiled again until it does; the exit status is 1 where nothing helps.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from aligner.commandline import check_out, ended
from aligner.types import UserError

TOPOLOGY = flags.DEFINE_string("topology", "cpu:1", "v5e:4x8, v5p:4x4x4, v6e:4x4, cpu:8, cuda:h200:8 ...")
SLICES = flags.DEFINE_integer("slices", 1, "How many slices of TPUs of this topology there are.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "Write the figures to this file as well.")
TOKENS = flags.DEFINE_integer("tokens", None, "Columns of a row; default: data.packed_length, else data.max_length.", lower_bound=1)
SCORED = flags.DEFINE_integer(
    "scored", None, "Scored positions of a row; default: half of its columns (running text: all; scores: one an answer).", lower_bound=1
)
IMAGES = flags.DEFINE_integer("images", 1, "Images of a row, for models that see.", lower_bound=0)
EXAMPLES = flags.DEFINE_integer("examples", None, "Examples of a row; default: 1, packed: one for every 256 columns.", lower_bound=1)
SEARCH = flags.DEFINE_boolean("search", True, "Where the config does not fit, look for the first setting with which it does.")

GIB = 2**30
TPUS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of one chip
GPUS = {"a100": 80, "h100": 80, "h200": 141, "b200": 180}
MEMORY = TPUS | GPUS
REMAT = ("none", "dots", "context", "full")  # what the backward pass recomputes, ever more
RANK = 16  # of the adapters that are tried


def devices_of(topology: str, slices: int = 1) -> tuple[list[Any], str, bool]:
    """(devices, chip, whether the figures are an estimate) of a topology's name. Nothing else may have started JAX before.

    Args:
        topology: of one slice.
        slices: how many there are; only TPUs have several.
    """
    kind, _, rest = topology.partition(":")
    if slices > 1 and kind not in TPUS:
        raise UserError(f"--slices {slices}: only TPUs have slices; give --topology {topology} all its devices")
    if kind in ("cpu", "cuda"):
        chip, _, count = rest.rpartition(":")
        if not count.isdigit() or not int(count) or (kind == "cpu" and chip):
            raise UserError(f"--topology {topology}: a number of devices must stand at the end, such as cpu:8 or cuda:h200:8")
        if kind == "cuda" and chip not in GPUS:
            raise UserError(f"--topology {topology}: chip {chip!r} is not known; known are {', '.join(GPUS)}")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        return jax.devices("cpu")[: int(count)], chip or "cpu", kind == "cuda"
    if kind not in TPUS:
        meant = f"; write cuda:{topology}" if kind in GPUS else f"; known are cpu, cuda and the TPUs {', '.join(TPUS)}"
        raise UserError(f"--topology {topology}: {kind!r} is not known{meant}")
    if not re.fullmatch(r"\d+(x\d+)+", rest):
        raise UserError(f"--topology {topology}: the chips along each side must stand behind the colon, such as v5e:4x8 or v5p:4x4x4")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu complains that it cannot ask for these two
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is touched, so that several plans may be made at once
    from jax.experimental import topologies

    cores = {"chip_config_name": "megacore"} if kind == "v4" else {}  # a chip's two cores are one device, as in a run
    if set(rest.split("x")) == {"1"}:  # a machine of one chip, where else there are four
        cores["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices, **cores).devices), kind, False
    except Exception as error:
        reason = str(error).splitlines()[0]
        hint = "; pip install '.[tpu]'" if "not installed" in reason else ""
        raise UserError(f"--topology {topology} cannot be described: {reason}{hint}") from None


def plan(config: Any, devices: list[Any], **row: int | None) -> dict[str, Any]:
    """The figures of a config, `aligner.ahead.figures`, and the row that they are of.

    Args:
        config: resolved.
        devices: of the topology.
        row: tokens, scored, images, examples, as `aligner.ahead.row_of` takes them.
    """
    from aligner import ahead, algorithms, convert
    from aligner.check import check_config
    from aligner.sharding import make_mesh

    check_config(config, make_mesh(config.mesh, devices))
    folder = convert.find_folder(config.model.path, config.model.revision, weights=False)
    model = convert.model_from_folder(folder, config.algorithm.name in algorithms.SCORING)
    sizes = ahead.row_of(config, model, **row)
    found = ahead.figures(ahead.make_step(config, model, devices, sizes))
    return found | {"rows": config.data.batch_size, "row": sizes._asdict()}


def fits(figures: dict[str, Any], limit: int | None) -> bool:
    """Whether the step fits into `limit` bytes; everything fits where there is no limit."""
    return not figures["too_large"] and (limit is None or figures["total_bytes"] <= limit)


def remedies(config: Any, resident_fits: bool, devices: int) -> Iterator[tuple[str, Any]]:
    """(command line, config) of ever more changes, those that cost least first: recomputing, smaller micro-batches, more sharding, LoRA.

    Args:
        config: that does not fit.
        resident_fits: whether what lies on a device between steps does: else smaller activations cannot help.
        devices: of the topology.
    """
    changed, told = config.copy_and_resolve_references().unlock(), []

    def turn(section: str, key: str, value: Any) -> tuple[str, Any]:
        changed[section][key] = value
        name = f"--config.{section}.{key}="
        told[:] = [setting for setting in told if not setting.startswith(name)] + [f"{name}{value}"]
        return " ".join(told), changed.copy_and_resolve_references()

    def smaller() -> Iterator[tuple[str, Any]]:
        for remat in REMAT[REMAT.index(changed.train.remat) + 1 :]:
            yield turn("train", "remat", remat)
        while changed.data.batch_size % (2 * changed.train.accumulate * parts) == 0:
            yield turn("train", "accumulate", 2 * changed.train.accumulate)

    parts = devices // math.prod(max(1, changed.mesh[axis]) for axis in ("sequence", "tensor"))  # that rows are split into
    if resident_fits:
        yield from smaller()
    if -1 not in changed.mesh.values():
        turn("mesh", "data", -1)
    while changed.mesh.fsdp > 0 and parts % (2 * changed.mesh.fsdp) == 0:
        yield turn("mesh", "fsdp", 2 * changed.mesh.fsdp)
    if not resident_fits:
        yield from smaller()
    if not changed.lora.rank:
        if changed.reference.kind == "copy":
            turn("reference", "kind", "base")
        yield turn("lora", "rank", RANK)


def find_remedy(config: Any, figures: dict[str, Any], limit: int | None, devices: list[Any], **row: int | None) -> tuple[str, dict] | None:
    """(settings, figures) of the first remedy that fits, found by compiling each; None where none does."""
    resident_fits = limit is None or figures["resident_bytes"] <= limit
    for settings, changed in remedies(config, resident_fits, len(devices)):
        print(f"  trying {settings} ...", end=" ", flush=True)
        try:
            found = plan(changed, devices, **row)
        except UserError as error:  # what the config asks for goes not with this
            print(f"no: {error}", flush=True)
            continue
        print(f"{found['total_bytes'] / GIB:.2f} GiB", flush=True)
        if fits(found, limit):
            return settings, found
    return None


def describe(figures: dict[str, Any], topology: str, chip: str, estimate: bool) -> str:
    """The figures as a table for people."""
    unit, size = ("GiB", GIB) if figures["total_bytes"] >= GIB else ("MiB", 2**20)
    memory = lambda name: f"{figures[name] / size:10.2f} {unit}"
    prefix, power = ("T", 1e12) if figures["flops"] >= 1e12 else ("G", 1e9)
    row = figures["row"]
    lines = [
        f"{topology}: {figures['devices']} devices, mesh {figures['mesh']}" + ("  (ESTIMATE: compiled for CPU)" if estimate else ""),
        f"{figures['rows']} rows of {row['tokens']} columns, {row['scored']} scored, {row['images']} images",
        f"parameters      {figures['parameters'] / 1e6:10,.1f} M, of which {figures['trainable'] / 1e6:,.1f} M train",
        "on each device",
        f"  trainable     {memory('trainable_bytes')}",
        f"  frozen        {memory('frozen_bytes')}",
        f"  optimizer     {memory('optimizer_bytes')}",
        *([f"  reference     {memory('reference_bytes')}   that follows the policy"] if figures["reference_bytes"] else []),
        *([f"  for rollouts  {memory('beside_bytes')}   weights that write answers, and the reference"] if figures["beside_bytes"] else []),
        f"  batch         {memory('batch_bytes')}",
    ]
    if not figures["too_large"]:
        lines += [
            f"  temporaries   {memory('temporary_bytes')}   all that lives only within a step, at its peak:",
            f"    gradients   {memory('gradient_bytes')}   at most",
            f"    activations {memory('activation_bytes')}   at least, with weights gathered or cast for the computation",
        ]
    lines.append(f"  in all        {memory('total_bytes')}" + (f"   of {MEMORY[chip]} GiB" if chip in MEMORY else ""))
    lines.append(f"  operations    {figures['flops'] / power:10.2f} {prefix}FLOP a step, in matrix products, what is recomputed included")
    for kind, entry in sorted(figures.get("collectives", {}).items()):
        lines.append(f"  {kind:<20} {entry['times']:6,d} times a step, {entry['bytes'] / size:10.3f} {unit} of results")
    groups: dict[str, list[str]] = {}
    for path, spec in figures["shardings"].items():
        groups.setdefault(spec, []).append(path)
    lines.append("laid out")
    for spec, paths in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"  {spec:<36} {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))
    lines.append(f"compiled in {figures['compile_seconds']:.0f} s")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    from aligner.main import CONFIG, WORKDIR

    if CONFIG.value is None:
        raise UserError("--config is missing; for example: python -m aligner.plan --config configs/dpo_llava.py --topology v5e:4x8")
    if JSON.value:
        check_out(JSON.value, "--json")
    devices, chip, estimate = devices_of(TOPOLOGY.value, SLICES.value)
    from aligner import ahead, workdir
    from aligner.run import call_setup

    directory = WORKDIR.value or "runs/plan"
    config = workdir.resolve(CONFIG.value, directory)
    ahead.check_planned(config)
    if config.setup:
        workdir.make(directory)
        call_setup(config)
    if estimate:
        config.model.attention = "auto"  # a GPU's kernels cannot be compiled for a CPU
    row = dict(tokens=TOKENS.value, scored=SCORED.value, images=IMAGES.value, examples=EXAMPLES.value)
    figures = plan(config, devices, **row)
    limit = MEMORY[chip] * GIB if chip in MEMORY else None
    limit = figures.get("chip_bytes", limit)
    place = dict(topology=TOPOLOGY.value, slices=SLICES.value)
    print(describe(figures, TOPOLOGY.value + f", {SLICES.value} slices" * (SLICES.value > 1), chip, estimate))
    found = figures | place | {"estimate": estimate, "limit_bytes": limit, "fits": fits(figures, limit)}
    if not found["fits"]:
        print(f"DOES NOT FIT: {figures['total_bytes'] / GIB:.2f} of {limit / GIB:.2f} GiB.")
        if SEARCH.value:
            remedy = find_remedy(config, figures, limit, devices, **row)
            found["remedy"] = remedy and {"settings": remedy[0], **remedy[1]}
            print(f"IT FITS WITH {remedy[0]}" if remedy else "Nothing that was tried fits: take more chips, or shorter rows.")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["fits"] or found.get("remedy") else 1


if __name__ == "__main__":
    from aligner.main import parse

    sys.exit(ended(lambda: app.run(main, flags_parser=parse)))
