"""An online run, read top to bottom: as `aligner.run`, but the policy writes what it learns from.

A rollout answers prompts, values the answers and asks the policy that wrote them, its reference and its critic for what the updates need;
then it serves several updates. It is kept on disk until no checkpoint can come back to it, so that a run killed between two of
them goes on with the same numbers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aligner import algorithms, allocator, checkpoint, convert, lora, metrics, optim, sharding, state, workdir
from aligner.algorithms import ppo
from aligner.algorithms.grpo import PENALISED, reference_params
from aligner.console import progress, say, short, tracing
from aligner.data import loader
from aligner.data.mixture import is_set
from aligner.generation.engine import check_growth, make_engine
from aligner.generation.sampling import Sampling, of_checkpoint
from aligner.generation.sampling import check as check_sampling
from aligner.likelihood import cast
from aligner.models import attention
from aligner.rl import advantages, mixture, rollouts, table
from aligner.rl.engines import Local, Server
from aligner.rl.environments import find_environment
from aligner.rl.prompts import load_prompts
from aligner.rl.rewards import make_rewards
from aligner.run import (
    begin,
    check_finite,
    exported,
    finish,
    frozen_copy,
    ids_hash,
    load_frozen,
    load_policy,
    load_reference,
    open_policy,
    open_reference,
    plan_params,
    put,
)  # fmt: skip
from aligner.stopping import Stopped, catch_signals, watchdog
from aligner.train_step import jit, jit_train_step
from aligner.types import UserError

ROLLOUTS, COMPLETIONS = "rollouts", "completions"


def run(config: ConfigDict, directory: str | Path) -> dict[str, float]:
    """Train as the config says, in a working directory; the same call goes on where an earlier one stopped.

    Args:
        config: see configs/common.py.
        directory: the workdir, as in `aligner.run`, with rollouts/ and completions/ (a Parquet file a rollout).

    Returns:
        The last evaluation's metrics, empty without an evaluation set.

    Raises:
        UserError: bad input.
        Stopped: asked to stop; the state is saved.
    """
    started, directory = time.monotonic(), Path(directory)
    if jax.process_count() > 1:
        raise UserError("online training runs in one process; its devices may be many")
    config, mesh, backend = begin(config, directory)
    c = config.algorithm

    # What is trained, on what, and what it is worth.
    model, disk = open_policy(config, mesh)
    reference_disk = open_reference(config, model, disk)
    algorithm = algorithms.make(config, model)
    others = {name: convert.open_model(path) for name, (_, path) in algorithm.others.items()}
    manner = sampling_of(config, model)
    _, trained, adapters, start = plan_params(config, model)
    critic = ppo.open_critic(config, model, disk) if c.name == "ppo" else None
    if critic:
        trained = {**trained, ppo.CRITIC: convert.abstract_params(critic[0])}
    optim.check_groups(config.optim.groups, trained)
    prompts = load_prompts(config, "train", model, directory / "data")
    held_out = load_prompts(config, "eval", model, directory / "data") if is_set(config.data.eval) else None
    supervised = loader.load_dataset(config, "ptx", model, "supervised", cache_dir=directory / "data") if c.get("ptx_coef") else None
    for dataset in filter(None, (prompts, held_out, supervised)):
        say(*dataset.report)
    for asked in filter(None, (prompts, held_out)):
        check_growth(model, asked.lengths, manner.max_new_tokens)
    referred = c.beta > 0 and c.name != "on_policy_distillation"  # whose beta is the divergence's own
    updates = c.num_mini_batches * c.num_iterations
    size = config.data.batch_size * c.num_mini_batches  # prompts of a rollout
    steps = config.train.steps or max(1, int(config.train.epochs * prompts.size / size * updates))
    schedule = optim.make_schedule(config.optim, steps)
    optimizer = optim.make_optimizer(config.optim, schedule, model.trained_layers)
    environment = find_environment(c.environment) if c.environment else None
    names = (*c.reward_funcs, *c.get("cost_funcs", ()))
    seeing = dict(folder=prompts.folder, frames=config.data.video_frames)
    rewards = make_rewards(names, dtype=config.model.dtype, **seeing, timeout=c.reward_timeout)
    names += ("environment",) if environment else ()
    learned_from = ", ".join(dataset.fingerprint for dataset in filter(None, (prompts, supervised)))
    examined = {"": held_out.fingerprint} if held_out else {}
    workdir.claim(directory, config, model, convert.fingerprint(disk), adapters, learned_from, examined, steps)
    say(f"{model.family}, {c.name}: {steps} steps on {mesh.size} {jax.devices()[0].platform} device{'s' * (mesh.size > 1)}; a rollout of "
        f"{size} prompts x {c.num_generations} answers serves {updates} of them; attention: {backend}")  # fmt: skip

    with (
        jax.set_mesh(mesh),
        attention.BACKEND(backend),
        catch_signals() as check_stop,
        checkpoint.open_checkpoints(directory, config.checkpoint.keep) as checkpoints,
    ):
        trainable, base = load_policy(config, model, disk, mesh, trained, adapters, start)
        fixed = {"base": base}
        if config.reference.kind == "base":
            fixed["initial"] = frozen_copy(config, trainable, adapters.saved)
        elif referred and algorithm.rollout:
            fixed["reference"] = load_reference(config, model, trainable, base, disk, reference_disk, mesh)
        if critic:
            trainable = {**trainable, ppo.CRITIC: load_frozen(master(config), *critic, mesh)}
        train_state = state.create(trainable, optimizer, algorithm.carry, config.seed, mesh)
        del trainable
        fixed |= {name: load_frozen(config, *other, mesh) for name, other in others.items()}
        host = {"position": 0, "beta": float(c.beta), "running": [0, 0.0, 0.0], "num_tokens": 0}
        host |= {"lagrangian": float(c.lagrangian_init)} if c.get("cost_funcs") else {}
        restored = checkpoint.restore(checkpoints, state.abstract(train_state))
        if restored:
            train_state, kept = restored
            done = int(train_state.step)
            workdir.check_place(directory, done, kept, learned_from, steps)
            host = kept["host"]
            say(f"goes on from step {done}")

        train_step = jit_train_step(config, algorithm, optimizer, schedule, train_state, mesh)
        asked = lambda trainable, fixed, batch: algorithm.rollout(*whole(trainable, fixed, config), batch)
        ask = jit(asked, mesh, out_shardings=sharding.replicated(mesh))
        text = lambda tokens: model.assets.tokenizer.decode(tokens, skip_special_tokens=True)
        rows = -(-config.generation.batch_size // mesh.size) * mesh.size
        weights = np.zeros(len(names))  # costs have none: they stand in the bound
        weights[: len(c.reward_funcs)] = c.reward_weights or 1.0
        weights[len(rewards) :] = 1.0
        tokenize = lambda words: np.array(model.assets.tokenizer(words, add_special_tokens=False)["input_ids"], np.int32)
        episodes = dict(environment=environment, turns=c.max_turns, tokenize=tokenize)
        key = jax.random.key(config.seed)
        making = dict(rows=rows, dtype=config.model.dtype, detokenize=model.assets.tokenizer.decode)
        local = lambda manner, key=key, of=model: Local(make_engine(of, manner, **making), key)
        export = lambda params, folder: convert.save(model, lora.merge(params) if adapters else params, folder)
        served = config.generation.server and server_of(config, manner, model, directory / "served", export)
        writer = rollouts.Writer(served or local(manner), text, rewards, weights, c.reward_timeout, **episodes)
        share = rollouts.rivalry(c)
        rival = mixture.geometric(model, share) if 0 < share < 1 else model
        other = writer._replace(engine=local(manner, jax.random.fold_in(key, 1), rival))
        greedy = writer._replace(engine=local(dataclasses.replace(manner, temperature=0.0)))
        # the policy that wrote is asked again where it will have moved on, or where its own word is part of the reward
        wants = bool(served) or updates > 1 or referred or c.get("top_entropy_quantile", 1.0) < 1 or c.name in (*PENALISED, "ppo")
        asks = algorithm.rollout is not None and wants

        def policy() -> Any:
            return lora.combine(without_critic(train_state.trainable), base)

        def roll_out(iteration: int) -> tuple[dict[str, np.ndarray], dict, dict]:
            """(batch, host state after it, metrics) of a rollout by the policy as it is now."""
            begun = time.monotonic()
            writer.engine.update(policy(), iteration)
            if share:  # one answer by the policy, one by the reference or its mixture with the policy
                reference = reference_params(config, whole(train_state.trainable, fixed, config)[1])
                other.engine.update(reference if rival is model else {"policy": policy(), "reference": reference}, iteration)
                groups, position = rollouts.collect(writer, prompts, host["position"], size, 1)
                places = range(host["position"], position)
                groups = rollouts.joined(groups, rollouts.write(other, [group.item for group in groups], places, 1))
            else:
                tries = c.get("dynamic_sampling", 0)
                groups, position = rollouts.collect(writer, prompts, host["position"], size, c.num_generations, tries)
            wrote = time.monotonic()
            batch = rollouts.lay_out(groups, model, config.data.shared_prompt, config.data.pad_to_multiple)
            if asks:
                per_call = config.data.batch_size // config.train.accumulate
                batch |= rollouts.asked(lambda part: ask(train_state.trainable, fixed, put(part, {}, mesh)), batch, per_call)
            baseline = None
            if c.name == "remax":
                greedy.engine.update(policy(), iteration)
                alone = rollouts.write(greedy, [group.item for group in groups], range(len(groups)), 1)
                baseline = rollouts.worth(config, alone, weights)[:, 0]
            batch, found, after = rollouts.learnable(config, groups, baseline, batch, weights, host)
            if updates == 1 and c.name != "ppo" and not served:
                batch.pop("old_logps", None)  # the policy itself is the one that wrote
            total = advantages.combine(np.stack([group.rewards for group in groups]), weights)
            table.write_parquet(directory / COMPLETIONS / f"{iteration:06d}.parquet", iteration * updates, groups, names)
            if config.log.completions and iteration * updates % config.log.every == 0:
                say(*table.table(groups, total, config.log.completions))
            found |= {"time/rollout": wrote - begun, "time/scoring": time.monotonic() - wrote}
            return batch, {**after, "position": position}, found

        def evaluate() -> dict[str, float]:
            items = [held_out.item(place) for place in range(held_out.size)]
            greedy.engine.update(policy(), step)
            groups = rollouts.write(greedy, items, range(len(items)), 1)
            worth = advantages.combine(np.stack([group.rewards for group in groups]), weights)
            length = np.mean([group.answers[0].written.sum() for group in groups])
            return {"reward": rollouts.mean_reward(worth), "completions/mean_length": float(length)}

        step = int(train_state.step)
        order = dict(seed=config.seed, shuffle=config.data.shuffle, start=step)
        beside = loader.batches(supervised, config.data.batch_size, **order) if supervised else None
        last: dict[str, float] = {}
        due = lambda step: held_out is not None and (step == steps or (config.train.eval_every and step % config.train.eval_every == 0))
        with (
            metrics.open_log(directory, step, config.log.tensorboard, config.log.wandb, config.to_dict()) as write,
            progress(step, steps) as bar,
            tracing(config.profile, directory) as trace,
            watchdog(config.train.watchdog) as watch,
        ):
            batch: dict[str, np.ndarray] = {}
            found: dict[str, float] = {}
            first, saved = True, step if restored else -1

            def save() -> None:
                nonlocal saved
                checkpoint.save(checkpoints, train_state, {"host": dict(host), "rows": learned_from, "held_out": examined})
                saved = step

            def hold_out() -> None:
                nonlocal last
                last = evaluate()
                write(step, "eval", last)
                say(f"step {step}: held-out {short(last)}")

            try:
                if restored and due(step) and not metrics.evaluation(directory, step=step):
                    hold_out()  # the run was killed while it evaluated
                while step < steps:
                    iteration, update = divmod(step, updates)
                    if update and not batch:
                        batch, _, found = rollouts.load(directory / ROLLOUTS, iteration)
                    if not update:
                        batch, host, found = roll_out(iteration)
                        if updates > 1:
                            rollouts.save(directory / ROLLOUTS, iteration, batch, host, found)
                            forget(directory, iteration, updates)
                    part = rollouts.minibatch(batch, config.seed, iteration, update, c.num_mini_batches)
                    if beside:
                        part |= {ppo.PTX + name: x for name, x in next(beside).items()}
                    trace(step)
                    train_state, seen = train_step(train_state, fixed, put(part, {}, mesh))
                    step += 1
                    ids = np.asarray(seen.pop("example_ids").value)
                    values = metrics.values(seen) | found
                    host["num_tokens"] += int(values["num_tokens"])
                    bar(step, values)
                    if first:
                        say(f"first step {time.monotonic() - started:.1f} s after the start, compilation included")
                        allocator.give_back()
                        first = False
                    if step % config.log.every == 0 or step in (1, steps):
                        write(step, "train", values | {"num_tokens": host["num_tokens"], "example_ids_hash": ids_hash(ids)})
                    check_finite(step, values, ids, config.train.max_nonfinite)  # the step is saved where this ends the run, and so told
                    if step % config.checkpoint.every == 0 or step == steps:
                        save()
                    if due(step):
                        watch(False)
                        hold_out()
                    checkpoint.check(checkpoints)
                    check_stop()
                    watch(True)
            except (Stopped, UserError):  # a reward server that is gone is no reason to lose what was learned
                if step != saved and step:
                    save()
                checkpoint.wait(checkpoints)
                metrics.draw_curves(directory)
                raise
        checkpoint.wait(checkpoints)
        if config.checkpoint.export:
            convert.save(model, exported(model, disk, without_critic(train_state.trainable), adapters, mesh), directory / "export")
        last = last or (metrics.evaluation(directory) if held_out else {})
        finish(config, directory, steps, last, time.monotonic() - started)
    return last


def sampling_of(config: ConfigDict, model: Any) -> Sampling:
    """`config.generation` as the sampler takes it."""
    g = config.generation
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    manner = Sampling(**{name: g[name] for name in names}, stop_strings=tuple(g.stop_strings), **of_checkpoint(model.assets))
    check_sampling(manner)
    return manner


def server_of(config: ConfigDict, manner: Sampling, model: Any, folder: Path, export: Any) -> Server:
    """The server that `config.generation.server` names, "vllm:http://HOST:8000" or "sglang:http://HOST:30000"."""
    kind, _, url = config.generation.server.partition(":")
    if kind not in ("vllm", "sglang") or not url.startswith("http"):
        raise UserError(f"config.generation.server is {config.generation.server!r}; it must be like vllm:http://HOST:8000 or sglang:http://..")
    placeholder = model.media and model.media.placeholder
    return Server(url, kind, manner, folder, export, placeholder=placeholder, every=config.generation.server_every, seed=config.seed)


def whole(trainable: Mapping[str, Any], fixed: Mapping[str, Any], config: ConfigDict) -> tuple[dict, dict]:
    """(parameters, fixed) in the dtype of the computation, as a training step makes them."""
    fixed = {**fixed, "base": cast(fixed["base"], config.model.dtype)}
    return lora.combine(cast(trainable, config.model.dtype), fixed["base"]), fixed


def without_critic(trainable: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's part of what trains."""
    return {name: tree for name, tree in trainable.items() if name != ppo.CRITIC}


def master(config: ConfigDict) -> ConfigDict:
    """The config by which a tree that trains is loaded: in `param_dtype`."""
    changed = config.copy_and_resolve_references()
    changed.model.dtype = config.model.param_dtype
    return changed


def forget(directory: Path, iteration: int, updates: int) -> None:
    """Remove rollouts that no checkpoint comes back to; the one before may belong to a save under way."""
    needed = {iteration, iteration - 1} | {step // updates for step in checkpoint.steps(directory) if step % updates}
    for path in (directory / ROLLOUTS).glob("*.npz*"):  # also what a kill left of one
        if int(path.name.partition(".")[0]) not in needed or path.suffix == ".part":
            path.unlink()
