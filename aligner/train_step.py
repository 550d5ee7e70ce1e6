"""The training step: counts, gradients over micro-batches, clipping, update. One pure function of (state, fixed, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from aligner.likelihood import answer_lengths, cast
from aligner.lora import combine
from aligner.matmul import wide
from aligner.metrics import reduce_stacked
from aligner.sharding import replicated
from aligner.state import TrainState
from aligner.types import Algorithm, Batch, Last, Mean, Params

# On a TPU a split weight is gathered, beside other products; else the compiler multiplies by each chip's part as it is handed around, and
# every partial sum goes to memory and back in float32
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6}


def jit(function: Callable, mesh: Mesh | None = None, **options: Any) -> Callable:
    """The one `jax.jit` of everything that scores or trains; `mesh` is where it will run, None is one device.

    XLA may otherwise keep bfloat16 intermediates in float32 where it fuses, differently in different programs; then policy = reference
    does not give exactly log 2.
    """
    on_tpus = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    compiler_options = {"xla_allow_excess_precision": False, **(TPU_OPTIONS if on_tpus else {})}
    return jax.jit(function, compiler_options=compiler_options, **options)


def make_train_step(
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    dtype: str,
    schedule: optax.Schedule | None = None,
    accumulate: int = 1,
    max_grad_norm: float = 1.0,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]:
    """`step(state, fixed, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
        algorithm: what is scored and minimised.
        optimizer: of the trainable tree; its schedule is its own.
        dtype: of the computation; parameters are cast once a step.
        schedule: learning rate by step, for the metric only.
        accumulate: micro-batches; the rows of a batch must divide by it. Changes memory, not the result.
        max_grad_norm: global norm the gradients are clipped to; 0 turns clipping off.

    A step whose loss or gradient is not finite changes nothing but `step` and `nonfinite`.
    """

    def step(state: TrainState, fixed: dict[str, Params], batch: Batch) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.rng, state.step)
        base, trainable = cast(fixed["base"], dtype), cast(state.trainable, dtype)
        fixed = {**fixed, "base": base}
        if state.reference is not None:
            fixed = {**fixed, "reference": combine(cast(state.reference, dtype), base)}

        def score(trainable, batch, key):
            return algorithm.score(combine(trainable, base), fixed, batch, key)

        def objective(scores, batch, counts=None):
            terms, metrics, carry = algorithm.objective(scores, batch, state.carry)
            counts = counts or {name: term.count for name, term in terms.items()}
            loss = sum(term.weight * term.sum / jnp.maximum(counts[name], 1) for name, term in terms.items())
            return loss, (metrics, carry)

        if accumulate == 1:
            (loss, (metrics, carry)), grads = _gradient(lambda t: objective(score(t, batch, key), batch), trainable)
            grads = jax.tree.map(lambda g, p: g.astype(wide(p.dtype)), grads, state.trainable)
        else:
            micro = (split_rows(batch, accumulate), jax.random.split(key, accumulate))
            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide(p.dtype)), state.trainable)
            add = lambda total, grads: jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
            if algorithm.whole_batch:
                # all scores first; the gradient of the objective by them is then sent back through each micro-batch
                _, scores = jax.lax.scan(lambda _, m: (None, score(trainable, *m)), None, micro)
                (loss, (metrics, carry)), cotangent = _gradient(lambda s: objective(s, batch), join_rows(scores))

                def body(total, m):
                    return add(total, jax.vjp(lambda t: score(t, *m[0]), trainable)[1](m[1])[0]), None

                grads, _ = jax.lax.scan(body, zeros, (micro, split_rows(cotangent, accumulate)))
            else:
                counts = global_counts(algorithm, score, trainable, batch, key, state.carry)

                def body(total, m):
                    found, grads = _gradient(lambda t: objective(score(t, *m), m[0], counts), trainable)
                    return add(total, grads), found

                grads, (losses, (stacked, carries)) = jax.lax.scan(body, zeros, micro)
                loss, metrics = jnp.sum(losses), reduce_stacked(stacked)
                carry = jax.tree.map(lambda x: x[-1], carries)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(trainable, opt_state, _):
            scale = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
            clipped = jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), grads)
            updates, opt_state = optimizer.update(clipped, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state, carry

        # a branch, where a choice leaf by leaf would keep old and new side by side
        old = state.trainable, state.opt_state, state.carry
        kept = dict(zip(("trainable", "opt_state", "carry"), jax.lax.cond(finite, update, lambda *old: old, *old)))
        nonfinite = jnp.where(finite, 0, state.nonfinite + 1)
        metrics = {"loss": Last(loss), **metrics, "grad_norm": Last(norm), "nonfinite": Last(nonfinite)}
        metrics |= {"num_tokens": Last(jnp.sum(batch["segment_ids"] > 0)), "example_ids": Last(batch["example_id"])}
        if schedule is not None:
            metrics["learning_rate"] = Last(schedule(state.step))
        reference = state.reference
        if algorithm.sync:
            weight, every = algorithm.sync
            now = jnp.where((state.step + 1) % every == 0, weight, 0.0)
            reference = jax.tree.map(lambda r, p: (now * p + (1 - now) * r).astype(r.dtype), reference, kept["trainable"])
        return TrainState(step=state.step + 1, rng=state.rng, nonfinite=nonfinite, reference=reference, **kept), metrics

    return step


def jit_train_step(
    config: Any, algorithm: Algorithm, optimizer: optax.GradientTransformation, schedule: optax.Schedule, state: TrainState, mesh: Mesh
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]:
    """The step as a config says, jitted: the state, arrays or their shapes, is donated and keeps its layout; metrics lie everywhere."""
    step = make_train_step(
        algorithm,
        optimizer,
        dtype=config.model.dtype,
        schedule=schedule,
        accumulate=config.train.accumulate,
        max_grad_norm=config.optim.max_grad_norm,
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jit(step, mesh, donate_argnums=0, out_shardings=(layout, replicated(mesh)))


def _gradient(function: Callable, at):
    return jax.value_and_grad(function, has_aux=True)(at)


def make_eval_step(algorithm: Algorithm, *, dtype: str) -> Callable[..., dict]:
    """`evaluate(trainable, carry, fixed, batch, reference=None) -> metrics`, each a sum and a count so that batches add up exactly.

    `reference` is the state's, where it is synchronised. An objective of the whole batch is here one of the evaluation batch.
    """

    def evaluate(trainable: Params, carry: Any, fixed: dict[str, Params], batch: Batch, reference: Params | None = None) -> dict:
        fixed = {**fixed, "base": cast(fixed["base"], dtype)}
        params = combine(cast(trainable, dtype), fixed["base"])
        if reference is not None:
            fixed = {**fixed, "reference": combine(cast(reference, dtype), fixed["base"])}
        scores = algorithm.score(params, fixed, batch, None)
        terms, metrics, _ = (algorithm.held_out or algorithm.objective)(scores, batch, carry)
        return {**{f"loss/{name}": Mean(term.weight * term.sum, term.count) for name, term in terms.items()}, **metrics}

    return evaluate


def global_counts(algorithm: Algorithm, score: Callable, trainable: Params, batch: Batch, key, carry) -> dict:
    """The count of every term over the whole batch. Counts depend on masks alone, so zeros stand in for all that needs the model."""
    shapes = jax.eval_shape(score, trainable, batch, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    zeros = zeros._replace(lengths=answer_lengths(batch, shapes.lengths.shape[-1]))
    terms, _, _ = algorithm.objective(zeros, batch, carry)
    return {name: term.count for name, term in terms.items()}


def split_rows(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...], dealing rows out in turn: each device then keeps its own rows in every part."""

    def one(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, batch)


def join_rows(parts: Batch) -> Batch:
    """Inverse of `split_rows`."""

    def one(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(one, parts)
