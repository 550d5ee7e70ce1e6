"""A run, read top to bottom: mesh, data, model, state, resume, prepare, step, evaluate, save, preempt."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from aligner import algorithms, allocator, checkpoint, convert, lora, metrics, optim, quant, sharding, state, workdir
from aligner.check import check_config
from aligner.console import progress, say, short, tracing
from aligner.convert import peft
from aligner.data import loader
from aligner.data.catalogue import with_template
from aligner.data.mixture import is_set
from aligner.likelihood import cast
from aligner.models import attention
from aligner.models.decoder import outgrown, text_config
from aligner.prepare import compute_columns, fingerprint
from aligner.processes import check_alike
from aligner.stopping import Stopped, catch_signals, watchdog
from aligner.train_step import jit, jit_train_step, make_eval_step
from aligner.trees import flatten, unflatten
from aligner.types import Algorithm, Model, Params, UserError


def run(config: ConfigDict, directory: str | Path) -> dict[str, float]:
    """Train as the config says, in a working directory; the same call goes on where an earlier one stopped.

    Args:
        config: see configs/common.py.
        directory: the workdir: config.json, assets/, reference/, metrics.jsonl, checkpoints/<step>/, curves.png, export/.

    Returns:
        The last evaluation's metrics, empty without an evaluation set.

    Raises:
        UserError: bad input, before any memory is allocated for the model.
        Stopped: asked to stop; the state is saved.
    """
    started = time.monotonic()
    config, mesh, backend = begin(config, directory)

    # What is trained and on what: by headers and rows, no weights yet.
    model, disk = open_policy(config, mesh)
    reference_disk = open_reference(config, model, disk)
    algorithm = algorithms.make(config, model)
    others = {name: convert.open_model(path) for name, (_, path) in algorithm.others.items()}
    abstract, trained, adapters, start = plan_params(config, model)
    optim.check_groups(config.optim.groups, trained)
    look = lambda split: loader.load_dataset(config, split, model, algorithm.needs, cache_dir=Path(directory) / "data")
    train, evaluations = look("train"), {name: look(split) for name, split in eval_splits(config).items()}
    for dataset in (train, *evaluations.values()):
        say(*dataset.report)
        check_answers(config, dataset)
        check_shared_prompts(config, model, dataset)
    weights = convert.fingerprint(disk)
    rows = {f"config.{dataset.name}": dataset.fingerprint for dataset in (train, *evaluations.values())}
    check_alike(rows | {"config.model.path": weights})
    steps = config.train.steps if config.train.steps is not None else max(1, int(config.train.epochs * train.size / config.data.batch_size))
    schedule = optim.make_schedule(config.optim, steps)
    optimizer = optim.make_optimizer(config.optim, schedule, model.trained_layers)
    held_out = {name: dataset.fingerprint for name, dataset in evaluations.items()}
    workdir.claim(directory, config, model, weights, adapters, train.fingerprint, held_out, steps)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    count_trained = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
    say(f"{model.family} with {count / 1e6:,.1f} M parameters, {count_trained / 1e6:,.1f} M train; {steps} steps of "
        f"{config.data.batch_size} examples on {mesh.size} {jax.devices()[0].platform} device{'s' * (mesh.size > 1)}, "
        f"attention: {backend}")  # fmt: skip

    with (
        jax.set_mesh(mesh),
        attention.BACKEND(backend),
        catch_signals() as check_stop,
        checkpoint.open_checkpoints(directory, config.checkpoint.keep) as checkpoints,
    ):
        trainable, base = load_policy(config, model, disk, mesh, trained, adapters, start)
        needs_reference = algorithm.prepare or config.reference.kind == "copy"
        reference = load_reference(config, model, trainable, base, disk, reference_disk, mesh) if needs_reference else None
        columns = {
            dataset.name: prepare_columns(config, directory, algorithm, reference, dataset, reference_disk, mesh, check_stop)
            for dataset in (train, *evaluations.values())
        }
        own_reference = algorithm.sync is not None  # the state holds the reference, and it starts as the policy
        fixed = {"base": base} | ({"reference": reference} if config.reference.kind == "copy" and not own_reference else {})
        if config.reference.kind == "base":
            fixed["initial"] = frozen_copy(config, trainable, adapters.saved)
        fixed |= {name: load_frozen(config, *other, mesh) for name, other in others.items()}
        del reference
        train_state = state.create(trainable, optimizer, algorithm.carry, config.seed, mesh, own_reference)
        del trainable
        batches = loader.batches(
            train, config.data.batch_size, seed=config.seed, shuffle=config.data.shuffle, rows=local_rows(mesh, config.data.batch_size)
        )
        counted = 0
        restored = checkpoint.restore(checkpoints, state.abstract(train_state))
        if restored:
            train_state, kept = restored
            done = int(train_state.step)
            workdir.check_place(directory, done, kept, train.fingerprint, steps)
            batches.set_state(kept["data"])
            counted = kept["num_tokens"]
            say(f"goes on from step {done}")

        train_step = jit_train_step(config, algorithm, optimizer, schedule, train_state, mesh)
        eval_step = jit(make_eval_step(algorithm, dtype=config.model.dtype), mesh, out_shardings=sharding.replicated(mesh))

        def evaluate(evaluation: loader.Dataset) -> dict[str, float]:
            rows = local_rows(mesh, config.data.batch_size)
            total = None
            for batch in loader.eval_batches(evaluation, config.data.batch_size, rows=rows):
                check_stop()
                placed = put(batch, columns[evaluation.name], mesh)
                found = eval_step(train_state.trainable, train_state.carry, fixed, placed, train_state.reference)
                jax.block_until_ready(total)  # the batch before: no more than two are on the devices
                total = found if total is None else metrics.merge(total, found)
            values = metrics.values(total)
            values["loss"] = sum(values.pop(name) for name in [*values] if name.startswith("loss/"))
            return values

        def due(step: int) -> bool:
            every = config.train.eval_every
            return bool(evaluations) and (step == steps or (bool(every) and step % every == 0))

        step = int(train_state.step)
        with (
            metrics.open_log(directory, step, config.log.tensorboard, config.log.wandb, config.to_dict()) as write,
            progress(step, steps) as bar,
            tracing(config.profile, directory) as trace,
            watchdog(config.train.watchdog) as watch,
        ):
            pending: tuple[int, dict] | None = None
            last: dict[str, float] = {}
            data_state: dict[str, Any] = batches.get_state()
            first, shapes = True, set()

            def report() -> None:
                """Read the metrics of the step before: the device is busy with the next one meanwhile."""
                nonlocal counted
                number, found = pending
                ids = np.asarray(found.pop("example_ids").value)
                values = metrics.values(found)
                counted += int(values["num_tokens"])
                check_finite(number, values, ids, config.train.max_nonfinite)
                bar(number, values)
                if number % config.log.every == 0 or number == steps or number == 1:
                    write(number, "train", values | {"num_tokens": counted, "example_ids_hash": ids_hash(ids)})

            def hold_out(missing: bool = False) -> None:
                """Evaluate all sets, or those that the run before, which stopped here, did not come to."""
                nonlocal last
                for name, evaluation in reversed(evaluations.items()):  # `last` is the first one's
                    last = metrics.evaluation(directory, name, step) if missing else {}
                    if last:
                        continue
                    last = evaluate(evaluation)
                    write(step, "eval", {"dataset": name} | last if name else last)
                    say(f"step {step}: {name or 'held-out'} " + short(last))

            def save() -> None:
                place = {"data": data_state, "rows": train.fingerprint, "held_out": held_out, "num_tokens": counted}
                checkpoint.save(checkpoints, train_state, place)

            try:
                if restored and due(step):
                    hold_out(missing=True)
                while step < steps:
                    batch = put(next(batches), columns[train.name], mesh)
                    data_state = batches.get_state()
                    shape = tuple(array.shape for array in batch.values())
                    if shape not in shapes:
                        watch(False)  # the step is compiled
                        shapes.add(shape)
                    trace(step)
                    train_state, found = train_step(train_state, fixed, batch)
                    if pending:
                        report()
                    pending, step = (step + 1, found), step + 1
                    if first:
                        jax.block_until_ready(found)
                        say(f"first step {time.monotonic() - started:.1f} s after the start, compilation included")
                        allocator.give_back()
                        first = False
                    saves = step % config.checkpoint.every == 0 or step == steps
                    if saves or due(step):
                        report()
                        pending = None
                    if saves:
                        save()
                    if due(step):
                        watch(False)
                        hold_out()
                    checkpoint.check(checkpoints)
                    check_stop()
                    watch(True)
            except Stopped:
                if pending:
                    report()
                checkpoint.wait(checkpoints)  # this very step may be what is being saved
                if step not in checkpoint.steps(directory):
                    save()
                metrics.draw_curves(directory)
                raise
        if not last and evaluations:
            last = metrics.evaluation(directory, next(iter(evaluations)))
        if len(shapes) > 1:
            say(f"the step was compiled {len(shapes)} times: the shapes of batches changed")
        checkpoint.wait(checkpoints)
        if config.checkpoint.export:
            convert.save(model, exported(model, disk, train_state.trainable, adapters, mesh), Path(directory) / "export")
        finish(config, directory, steps, last, time.monotonic() - started)
    return last


def begin(config: ConfigDict, directory: str | Path) -> tuple[ConfigDict, jax.sharding.Mesh, str]:
    """What every run does first: (its config in this workdir, mesh, what computes attention); they fit each other and the run before."""
    config = workdir.resolve(config, directory)
    mesh = sharding.make_mesh(config.mesh)
    check_config(config, mesh)
    backend = attention.chosen(mesh, config.model.attention)
    notes = workdir.check(config, directory)
    if config.setup:
        call_setup(config)
    for note in notes:
        say(f"goes on with a different setting: {note}")
    return config, mesh, backend


def open_policy(config: ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Model, Any]:
    """(the model that is trained, with the chat template that the config asks for; its weights by their headers)."""
    model, disk = convert.open_model(config.model.path, config.model.revision, config.algorithm.name in algorithms.SCORING)
    attention.check_heads(mesh, text_config(model).num_attention_heads, text_config(model).num_key_value_heads)
    return with_template(model, config.data), disk


def plan_params(config: ConfigDict, model: Model) -> tuple[Params, Params, lora.Adapters | None, dict[str, np.ndarray]]:
    """Shapes of (the tree with its adapters, the part of it that trains), and the adapters with the weights that they begin with."""
    abstract = convert.abstract_params(model)
    adapters, start = peft.plan(config, model, abstract)
    if adapters:
        abstract = jax.eval_shape(lambda params: attach(config, model, params, adapters, start), abstract)
    return abstract, lora.split(abstract, config.optim.freeze, adapters)[0], adapters, start


def check_answers(config: ConfigDict, dataset: loader.Dataset) -> None:
    """An algorithm on lists has room for `answers` of them; a longer list would lose its last ones."""
    room = config.algorithm.get("answers", dataset.answers)
    if dataset.answers > room:
        most = dataset.answers
        raise UserError(f"config.{dataset.name} has rows of {most} answers, but config.algorithm.answers is {room}; set it to {most}")


def check_shared_prompts(config: ConfigDict, model: Model, dataset: loader.Dataset) -> None:
    """Answers share a prompt only where none of them is so long that it changes how the prompt is turned."""
    if config.data.shared_prompt and dataset.answers > 1 and (limit := outgrown(model, *dataset.texts.T)):
        raise UserError(
            f"config.{dataset.name}: beyond {limit} tokens this {model.family} turns all of a text otherwise (its rope_type), and answers "
            f"cannot share a prompt; set config.data.shared_prompt=False, or config.data.max_length to {limit} at most"
        )


def call_setup(config: ConfigDict) -> None:
    """Call `config.setup`, "module:function"; presets make their demo input with it. Only process 0 does, the others wait."""
    import importlib

    from jax.experimental import multihost_utils

    module, _, name = config.setup.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"config.setup {config.setup!r} cannot be imported ({error}); run from the root of the repository") from None
    if jax.process_index() == 0:
        function(config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("setup")


def load_policy(
    config: ConfigDict, model: Model, disk: Any, mesh: jax.sharding.Mesh, trained: Params, adapters: lora.Adapters | None, start: Mapping
) -> tuple[Params, Params]:
    """(what trains, the fixed base) over the mesh, with the adapters that `plan_params` found."""
    params = load(config, model, disk, mesh, trained)
    if adapters:
        params = attach(config, model, params, adapters, start, mesh)
    return lora.split(params, config.optim.freeze, adapters)


def load(config: ConfigDict, model: Model, disk: Any, mesh: jax.sharding.Mesh, trained: Params) -> Params:
    """The parameters over the mesh: what trains in `param_dtype`, the frozen rest in `dtype`, some of it quantised."""
    names = sharding.tree_paths(trained).keys()
    abstract = convert.abstract_params(model)
    shardings = sharding.param_shardings(abstract, model.sharding_rules, mesh)
    packed = lora.quantised_kernels(model.conversion, abstract) - names if config.quant.base else ()
    return convert.load_params(
        model,
        disk,
        lambda path: config.model.param_dtype if path in names else config.model.dtype,
        shardings,
        finish=lambda path, leaf: quant.quantise_leaf(leaf, config.quant.base) if path in packed else leaf,
    )


def attach(config: ConfigDict, model: Model, params: Params, adapters: lora.Adapters, start: Mapping[str, Any], mesh=None) -> Params:
    """The tree with its adapters, new or from `config.lora.adapter`."""
    options = dict(dtype=config.model.param_dtype, init=config.lora.init, rules=model.sharding_rules, mesh=mesh)
    return lora.attach(params, adapters, start, key=jax.random.key(config.seed), **options)


def load_frozen(config: ConfigDict, model: Model, disk: Any, mesh: jax.sharding.Mesh) -> Params:
    """Another model's parameters, none of which trains, in the dtype of the computation."""
    shardings = sharding.param_shardings(convert.abstract_params(model), model.sharding_rules, mesh)
    return convert.load_params(model, disk, config.model.dtype, shardings)


def open_reference(config: ConfigDict, model: Model, disk: Any) -> Any:
    """The reference's weights by their headers: the policy's own, or another checkpoint of the same shape."""
    if not config.reference.model:
        return disk
    other, disk = convert.open_model(config.reference.model)
    if other.config != model.config:
        raise UserError(f"config.reference.model {config.reference.model} is not of the same shape as {config.model.path}")
    return disk


def load_reference(config: ConfigDict, model: Model, trainable: Params, base: Params, disk: Any, reference_disk: Any, mesh) -> Params:
    """The reference in the dtype of the computation: the policy as loaded, sharing what does not train, or another checkpoint."""
    if reference_disk is not disk:
        return load(config, model, reference_disk, mesh, {})
    return lora.combine(frozen_copy(config, trainable), base)


def frozen_copy(config: ConfigDict, trainable: Params, paths: Collection[str] | None = None) -> Params:
    """A copy in the dtype of the computation of these leaves (None: all): what trains is donated to the step and lost."""
    leaves = {path: leaf for path, leaf in flatten(trainable).items() if paths is None or path in paths}
    same = {path: leaf.sharding for path, leaf in leaves.items()}
    return unflatten(jit(lambda tree: jax.tree.map(jnp.copy, cast(tree, config.model.dtype)), out_shardings=same)(leaves))


def prepare_columns(
    config: ConfigDict, directory: str | Path, algorithm: Algorithm, reference: Params, dataset: Any, disk: Any, mesh, check_stop
) -> dict[str, np.ndarray]:
    """The columns that the algorithm computes once per example, from disk where they are already there."""
    if algorithm.prepare is None:
        return {}
    weights = convert.fingerprint(disk)
    size = config.data.batch_size
    key = fingerprint(weights=weights, rows=dataset.fingerprint, dtype=config.model.dtype, columns=algorithm.columns, batch_size=size,
                      shape=dataset.shape, shared_prompt=config.data.shared_prompt, settings=algorithm.prepared_with,
                      quantised=config.quant.base, adapter=peft.fingerprint(config.lora.adapter))  # fmt: skip
    folder = Path(config.reference.cache or Path(directory) / "reference") / f"{dataset.name.split('.')[-1]}-{key}"

    def columns_of(reference, batch):
        return {"example_id": batch["example_id"]} | dict(algorithm.prepare(cast(reference, config.model.dtype), batch))

    prepare = jit(columns_of, mesh, out_shardings=sharding.replicated(mesh))
    one = lambda batch: prepare(reference, put(batch, {}, mesh))
    rows = local_rows(mesh, size)
    batches = lambda: loader.eval_batches(dataset, size, rows=rows)
    return compute_columns(one, batches, -(-dataset.size // size), dataset.rows_total, folder, f"reference, {dataset.name}", check_stop)


def eval_splits(config: ConfigDict) -> dict[str, str]:
    """What each evaluation set is called in metrics.jsonl -> its section under config.data; `eval` goes without a name and comes first."""
    others = {name: f"evals.{name}" for name, source in config.data.evals.items() if is_set(source)}
    return ({"": "eval"} if is_set(config.data.eval) else {}) | others


def local_rows(mesh: jax.sharding.Mesh, size: int) -> np.ndarray:
    """Which rows of the global batch this process's devices hold."""
    places = sharding.batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in places]))


def put(batch: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows, with the columns computed for them, as a part of the global batch."""
    rows = sharding.batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(rows, array) for name, array in loader.attach(batch, columns).items()}


def ids_hash(ids: np.ndarray) -> str:
    """A short name for which examples a batch held, in their order."""
    return hashlib.sha256(np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest()[:16]


def check_finite(step: int, values: Mapping[str, float], ids: np.ndarray, limit: int) -> None:
    """Say which examples gave a loss or gradient that is not finite; raise after `limit` such steps in a row."""
    in_a_row = int(values["nonfinite"])
    if not in_a_row:
        return
    rows = ", ".join(map(str, ids[ids >= 0][:32]))
    say(f"step {step} skipped: loss {values['loss']}, gradient norm {values['grad_norm']}; rows {rows}")
    if in_a_row >= limit:
        raise UserError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, the last one step {step} with rows {rows}; "
            "a lower config.optim.learning_rate or config.model.dtype=float32 may help"
        )


def exported(model: Model, disk: Any, trainable: Params, adapters: lora.Adapters | None, mesh: jax.sharding.Mesh) -> Params:
    """What a run comes to: the leaves that trained, the others as they stand on disk, adapters merged into those."""
    merge = lora.merge_into(adapters, trainable)
    ours = {path: leaf for path, leaf in flatten(trainable).items() if path.rpartition("/")[2] not in lora.TRAINED}

    def one(path: str, leaf: jax.Array) -> jax.Array:
        whole = merge(path, leaf)
        return whole.astype(leaf.dtype) if leaf.dtype == jnp.bfloat16 else whole  # what it is written in; memory is dear here

    shardings = sharding.param_shardings(convert.abstract_params(model), model.sharding_rules, mesh)
    rest = convert.load_params(model, disk, None, shardings, only=lambda path: path not in ours, finish=one)
    return unflatten(ours | flatten(rest))


def finish(config: ConfigDict, directory: str | Path, steps: int, last: Mapping[str, float], seconds: float) -> None:
    """Curves, and where everything is."""
    directory = Path(directory)
    lines = [f"done: {steps} steps, {seconds:.0f} s" + (f"; held-out {short(last)}" if last else "")]
    lines.append(f"  metrics     {directory / metrics.JSONL}")
    curves = metrics.draw_curves(directory)
    if curves:
        lines.append(f"  curves      {curves}")
    lines.append(f"  checkpoint  {directory / checkpoint.FOLDER / str(steps)}")
    if config.checkpoint.export:
        lines.append(f"  export      {directory / 'export'}  (Hugging Face layout{', adapters merged' if config.lora.rank else ''})")
    else:
        lines.append(f"  export it   python -m aligner.convert to-hf --workdir {directory} --out DIR")
    say(*lines)
