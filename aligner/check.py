"""What can be known to be wrong from a config alone, before anything is read or allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from aligner import lora, optim, quant, sharding, workdir
from aligner.data.mixture import is_set
from aligner.models.layers import REMAT
from aligner.types import UserError

# Smallest value of each number that has one.
AT_LEAST = {
    1: ("data.batch_size", "data.max_length", "data.pad_to_multiple", "data.video_frames", "train.steps", "train.accumulate",
        "train.max_nonfinite", "checkpoint.every", "checkpoint.keep", "log.every", "generation.batch_size", "generation.server_every"),
    0: ("data.max_bad_fraction", "data.workers", "optim.learning_rate", "optim.warmup", "optim.weight_decay", "optim.max_grad_norm",
        "train.eval_every", "train.watchdog", "checkpoint.requeue_code", "profile", "seed"),
}  # fmt: skip


def check_config(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """What can be known to be wrong from the config alone."""
    if not config.model.path:
        raise UserError("config.model.path is empty: give a checkpoint folder or Hub id, --config.model.path=DIR")
    if not is_set(config.data.train):
        raise UserError("config.data.train.path is empty: give a file, folder or Hub dataset, --config.data.train.path=rows.jsonl")
    kinds = ("precomputed", "copy", "base")
    if config.reference.kind not in kinds:
        raise UserError(f"config.reference.kind is {config.reference.kind!r}; it must be one of {', '.join(kinds)}")
    lora.check(config)
    quant.check(config)
    if config.reference.kind == "base" and (not config.lora.rank or config.reference.model):
        other = "config.reference.model is set" if config.lora.rank else "config.lora.rank is 0"
        raise UserError(f'config.reference.kind is "base", the model with its adapters off, but {other}; use "precomputed" or "copy"')
    for key in ("dtype", "param_dtype"):
        if config.model[key] not in ("float32", "bfloat16", "float64"):
            raise UserError(f"config.model.{key} is {config.model[key]!r}; it must be float32, bfloat16 or float64")
        if config.model[key] == "float64" and not jax.config.jax_enable_x64:
            raise UserError(f"config.model.{key} float64 needs the environment variable JAX_ENABLE_X64=1; set it, or choose float32")
    values = workdir.flat(config.to_dict())
    for least, keys in AT_LEAST.items():
        for key in keys:
            if values[key] is not None and not least <= values[key] < math.inf:
                raise UserError(f"config.{key} is {values[key]}; it must be at least {least}" + " and finite" * (values[key] == math.inf))
    for key in AT_LEAST[1]:
        if isinstance(values[key], int) and values[key] >= 2**31:
            raise UserError(f"config.{key} is {values[key]}; it must be below 2^31")
    if config.train.steps is None and not 0 < config.train.epochs < math.inf:
        raise UserError(f"config.train.epochs is {config.train.epochs}; it must be above 0 and finite where config.train.steps is not set")
    if config.seed >= 2**63:
        raise UserError(f"config.seed is {config.seed}; it must be below 2^63")
    if config.checkpoint.requeue_code > 255:
        raise UserError(f"config.checkpoint.requeue_code is {config.checkpoint.requeue_code}; an exit status is from 0 to 255")
    if config.data.max_bad_fraction > 1:
        raise UserError(f"config.data.max_bad_fraction is {config.data.max_bad_fraction}; it is a fraction, from 0 to 1")
    if config.data.packed_length is not None and not config.data.packing:
        raise UserError(f"config.data.packed_length is {config.data.packed_length}, but no rows are packed; set config.data.packing=True")
    for group in config.optim.groups:
        if not (isinstance(group, list | tuple) and len(group) == 2 and isinstance(group[1], Mapping)):
            pair = '(regex, {"learning_rate": factor, "weight_decay": factor})'
            raise UserError(f"config.optim.groups holds {group!r}; each must be a pair {pair}")
    for key, patterns in (("freeze", config.optim.freeze), ("groups", [pattern for pattern, _ in config.optim.groups])):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(f"config.optim.{key} has {pattern!r}, which is no regex on tree paths: {error}") from None
    optim.make_schedule(config.optim, steps=1)
    if config.train.remat not in REMAT:
        raise UserError(f"config.train.remat is {config.train.remat!r}; it must be one of {', '.join(REMAT)}")
    of_rows = {"pad_to_multiple": True, "packed_length": config.data.packed_length, "max_length": config.algorithm.name == "cpt"}
    for key in filter(of_rows.get, of_rows):
        if config.data[key] % (cut := mesh.shape["sequence"]):
            raise UserError(f"config.data.{key} {config.data[key]} cannot be cut over config.mesh.sequence={cut}; make it a multiple")
    size, parts, accumulate = config.data.batch_size, sharding.batch_parts(mesh), config.train.accumulate
    if size % (parts * accumulate):
        raise UserError(
            f"config.data.batch_size {size} cannot be divided: config.train.accumulate={accumulate} micro-batches over {parts} parts of "
            f"the mesh (data x fsdp) need a multiple of {parts * accumulate}"
        )
