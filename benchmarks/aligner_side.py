"""aligner's side of comparisons: the jitted training step as `aligner.run` builds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aligner import algorithms, convert, lora, optim, sharding, state
from aligner.allocator import give_back
from aligner.data.layout import pair_row, shape_of
from aligner.data.templates import Encoded
from aligner.models import attention
from aligner.train_step import jit_train_step
from benchmarks.torch_sides import BETA, LEARNING_RATE, MAX_GRAD_NORM
from configs import common


def make_config(dtype: str, algorithm: str = "dpo"):
    """The defaults of an algorithm (a function of configs/common.py) with the settings that the other sides have."""
    config = common.base()
    config.algorithm = getattr(common, algorithm)()
    config.algorithm.update({"beta": BETA} if "beta" in config.algorithm else {})
    config.reference.kind = "copy"  # computed in the step, as on the other sides
    config.model.dtype = dtype
    config.optim.learning_rate = LEARNING_RATE
    config.optim.schedule, config.optim.warmup = "constant", 0.0
    config.optim.max_grad_norm = MAX_GRAD_NORM
    return config


def make_batch(rows: list[dict[str, list[int]]], shared_prompt: bool) -> dict[str, jax.Array]:
    """Prompts and their answers, token ids under any names, as rows with no column left over."""
    as_ids = lambda row: [np.asarray(ids, np.int32) for ids in row.values()]
    examples = [Encoded(prompt, tuple(answers)) for prompt, *answers in map(as_ids, rows)]
    T, S, I = (max(sizes) for sizes in zip(*(shape_of(example, shared_prompt) for example in examples)))
    laid = [pair_row(example, T, S, I, None, shared_prompt, example_id=i) for i, example in enumerate(examples)]
    return {name: jax.device_put(np.stack([row[name] for row in laid])) for name in laid[0]}


def aligner_step(
    folder: Path, rows: list[dict[str, list[int]]], dtype: str, shared_prompt: bool = True, algorithm: str = "dpo"
) -> Callable[[], float]:
    """One optimizer step of DPO or SFT per call; returns the loss.

    Args:
        folder: Hugging Face checkpoint, of policy and reference.
        rows: `prompt, chosen, rejected`, for SFT `prompt, completion`, as token ids.
        dtype: of the computation; master parameters are float32, the frozen reference is kept in `dtype`.
        shared_prompt: lay a pair out as [prompt | chosen | rejected] instead of [prompt chosen] [prompt rejected].
    """
    config = make_config(dtype, algorithm)
    model, params = convert.load(folder, dtype="float32", mesh=one_device(config))
    return make_steps(config, model, params, [make_batch(rows, shared_prompt)], folder if algorithm == "dpo" else None)


def one_device(config) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


def make_steps(
    config, model, params, batches: list[dict[str, Any]], reference: Path | None = None, adapters: lora.Adapters | None = None
) -> Callable[[], float]:
    """A step on each of some batches of one shape per call; returns the last one's loss.

    Args:
        config: of the algorithm and its optimizer.
        model, params: what trains, float32; given up to the training state.
        batches: as the loader gives them, or `make_batch`.
        reference: checkpoint of the reference, where the algorithm has one of its own.
        adapters: that alone train, where `params` has some; the reference is then the base without them.
    """
    mesh, dtype = one_device(config), config.model.dtype
    backend = attention.chosen(mesh, config.model.attention)
    with jax.set_mesh(mesh), attention.BACKEND(backend):
        algorithm = algorithms.make(config, model)
        schedule = optim.make_schedule(config.optim, 1000)
        optimizer = optim.make_optimizer(config.optim, schedule, model.trained_layers)
        trainable, base = lora.split(params, config.optim.freeze, adapters)
        del params
        fixed = {"base": base}
        if reference:
            fixed["reference"] = convert.load(reference, dtype=dtype, mesh=mesh)[1]
        batches = [jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in batches]
        box = [state.create(trainable, optimizer, algorithm.carry, config.seed, mesh)]
        del trainable
        compiled = jit_train_step(config, algorithm, optimizer, schedule, box[0], mesh).lower(box[0], fixed, batches[0]).compile()
    give_back()  # as `aligner.run` does after its first step

    def call() -> float:
        for batch in batches:
            box[0], metrics = compiled(box[0], fixed, batch)
        jax.block_until_ready(box[0])
        return float(metrics["loss"].value)

    call.compiled, call.box, call.fixed, call.batches = compiled, box, fixed, batches  # for whoever profiles it
    return call
