"""The training step on a small analytic algorithm, where every number can be written down, and its counts on the real one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aligner import algorithms, metrics, state, train_step
from aligner.train_step import global_counts, make_eval_step, make_train_step, split_rows
from aligner.types import Algorithm, Max, Mean, Scores, Term
from tests.models import tiny

ROWS, D = 8, 3


def toy(root=False):
    """A linear model scored on ragged rows: per-token squares averaged over tokens, and a second term averaged over rows."""

    def score(params, fixed, batch, key):
        out = batch["x"] @ params["w"]
        out = jnp.sqrt(jnp.abs(out)) if root else out
        lengths = jnp.sum(batch["score_segment"] > 0, axis=1)[:, None, None].astype(out.dtype)
        return Scores(out[:, None, None], lengths, {}, {} if key is None else {"draw": jax.random.normal(key)})

    def objective(scores, batch, carry):
        n, real = scores.lengths[:, 0, 0], scores.lengths[:, 0, 0] > 0
        out = jnp.where(real, scores.logps[:, 0, 0], 0)
        terms = {"square": Term(1.0, jnp.sum(n * out**2), jnp.sum(n)), "mean": Term(0.5, jnp.sum(out), jnp.sum(real))}
        found = {"tokens": Mean(jnp.sum(out), jnp.sum(n)), "top": Max(jnp.max(out))}
        if "draw" in scores.aux:
            found["draw"] = Mean(scores.aux["draw"], jnp.ones(()))
        return terms, found, carry

    return Algorithm(score, objective)


def toy_batch(seed=0, lengths=(3, 1, 7, 2, 5, 0, 1, 4)):
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    scored = np.arange(lengths.max()) < lengths[:, None]
    return {
        "x": rng.standard_normal((ROWS, D)).astype(np.float32),
        "score_segment": scored.astype(np.int32),
        "score_role": scored.astype(np.int32),
        "segment_ids": scored.astype(np.int32),
        "example_id": np.where(lengths > 0, 100 + np.arange(ROWS), -1)[:, None].astype(np.int32),
    }


W = np.float32([0.5, -1.0, 2.0])


def expected(batch, w=W):
    """(loss, gradient) in float64."""
    n, x = batch["score_segment"].sum(1), batch["x"].astype(np.float64)
    out, real = x @ w, n > 0
    loss = (n * out**2).sum() / n.sum() + 0.5 * (real * out).sum() / real.sum()
    return loss, (2 * n * out / n.sum() + 0.5 * real / real.sum()) @ x


def start(optimizer):
    params = {"w": jnp.asarray(W)}
    zero = jnp.zeros((), jnp.int32)
    return state.TrainState(step=zero, trainable=params, opt_state=optimizer.init(params), rng=jax.random.key(0), carry={}, nonfinite=zero)


def stepper(optimizer, algorithm=None, **options):
    function = make_train_step(algorithm or toy(), optimizer, dtype="float32", **{"max_grad_norm": 0.0, **options})
    return tiny.quick(function)


FIXED = {"base": {}}


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_ragged_micro_batches_are_summed(accumulate):
    batch = toy_batch()
    optimizer = optax.sgd(1.0)
    after, found = stepper(optimizer, accumulate=accumulate)(start(optimizer), FIXED, batch)
    loss, gradient = expected(batch)
    assert float(found["loss"].value) == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(after.trainable["w"], W - gradient, rtol=1e-5)
    values = metrics.values({name: found[name] for name in ("tokens", "top", "grad_norm", "num_tokens")})
    out, n = batch["x"] @ W, batch["score_segment"].sum(1)
    assert values["tokens"] == pytest.approx(((n > 0) * out).sum() / n.sum(), rel=1e-5)
    assert values["top"] == pytest.approx(np.where(n > 0, out, 0).max(), rel=1e-6)
    assert values["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5) and values["num_tokens"] == n.sum()
    np.testing.assert_array_equal(found["example_ids"].value, batch["example_id"])


def test_a_mean_of_means_would_be_another_number():
    """What the test above must be able to tell apart."""
    batch = toy_batch()
    parts = [{name: array[i::4] for name, array in batch.items()} for i in range(4)]
    assert abs(np.mean([expected(part)[0] for part in parts]) - expected(batch)[0]) > 0.1


def test_a_batch_without_examples_is_a_step_of_nothing():
    optimizer = optax.sgd(1.0)
    after, found = stepper(optimizer)(start(optimizer), FIXED, toy_batch(lengths=(0,) * 7 + (0,)) | blank())
    assert float(found["loss"].value) == 0 and int(found["nonfinite"].value) == 0
    np.testing.assert_array_equal(after.trainable["w"], W)


def blank():
    return {name: np.zeros((ROWS, 4), np.int32) for name in ("score_segment", "score_role", "segment_ids")}


def test_split_rows_deals_them_out():
    """Rows r, r + parts, ...: a device that holds neighbouring rows keeps some of its own in every part."""
    found = split_rows({"a": jnp.arange(8), "b": jnp.arange(16).reshape(8, 2)}, 4)
    np.testing.assert_array_equal(found["a"], [[0, 4], [1, 5], [2, 6], [3, 7]])
    np.testing.assert_array_equal(found["b"][1], [[2, 3], [10, 11]])


def test_step_and_micro_batches_draw_different_noise():
    optimizer = optax.sgd(0.0)
    step = stepper(optimizer, accumulate=4)
    once, found = step(start(optimizer), FIXED, toy_batch())
    _, other = step(once, FIXED, toy_batch())
    draws = [metrics.values({"draw": f["draw"]})["draw"] for f in (found, other)]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 4)
    assert draws[0] == pytest.approx(np.mean([jax.random.normal(key) for key in keys]), rel=1e-5) and draws[0] != draws[1]
    np.testing.assert_array_equal(jax.random.key_data(once.rng), jax.random.key_data(jax.random.key(0)))


def test_a_step_that_is_not_finite_changes_nothing():
    optimizer = optax.adam(0.1)
    step = stepper(optimizer, accumulate=2, max_grad_norm=1.0)
    good, bad = toy_batch(), toy_batch()
    bad["x"][3, 1] = np.nan
    before, found = step(start(optimizer), FIXED, good)
    assert int(before.nonfinite) == 0 and np.abs(before.trainable["w"] - W).min() > 0.05
    now = before
    for count in (1, 2):
        now, found = step(now, FIXED, bad)
        assert int(now.nonfinite) == int(found["nonfinite"].value) == count and not np.isfinite(found["loss"].value)
        same = jax.tree.map(np.array_equal, (now.trainable, now.opt_state), (before.trainable, before.opt_state))
        assert all(jax.tree.leaves(same))
    assert int(now.step) == 3
    after, found = step(now, FIXED, good)
    assert int(after.nonfinite) == 0 and int(after.step) == 4
    straight, _ = step(before, FIXED, good)
    np.testing.assert_array_equal(after.trainable["w"], straight.trainable["w"])


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too():
    optimizer = optax.sgd(1.0)
    batch = toy_batch()
    batch["x"][0] = 0  # the root's derivative there
    after, found = stepper(optimizer, toy(root=True))(start(optimizer), FIXED, batch)
    assert np.isfinite(found["loss"].value) and not np.isfinite(found["grad_norm"].value)
    assert int(after.nonfinite) == 1
    np.testing.assert_array_equal(after.trainable["w"], W)


def clipped(gradients, limit):
    """torch.nn.utils.clip_grad_norm_: (gradients times min(1, limit / (norm + 1e-6)), norm before clipping)."""
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients))
    return [g * min(1.0, limit / (norm + 1e-6)) for g in gradients], norm


@pytest.mark.parametrize("limit", [0.1, 1e3])
def test_clipping(limit):
    batch, optimizer = toy_batch(), optax.sgd(1.0)
    after, found = stepper(optimizer, max_grad_norm=limit)(start(optimizer), FIXED, batch)
    [gradient], norm = clipped([expected(batch)[1]], limit)
    np.testing.assert_allclose(W - after.trainable["w"], gradient, rtol=1e-4, atol=1e-7)
    assert float(found["grad_norm"].value) == pytest.approx(norm, rel=1e-5)


def test_learning_rate_is_that_of_the_step():
    optimizer = optax.sgd(0.0)
    step = stepper(optimizer, schedule=optax.linear_schedule(1.0, 0.0, 4))
    now, rates = start(optimizer), []
    for _ in range(3):
        now, found = step(now, FIXED, toy_batch())
        rates.append(float(found["learning_rate"].value))
    assert rates == [1.0, 0.75, 0.5]


def test_bfloat16_compute_keeps_float32_masters():
    optimizer = optax.sgd(2.0**-12)
    step = tiny.quick(make_train_step(toy(), optimizer, dtype="bfloat16", max_grad_norm=0.0))
    after, _ = step(start(optimizer), FIXED, toy_batch())
    assert after.trainable["w"].dtype == np.float32
    moved = (W - after.trainable["w"]) * 2**12  # far below what bfloat16 could tell apart
    np.testing.assert_allclose(moved, expected(toy_batch())[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("accumulate", [1, 8])
def test_gradients_of_bfloat16_masters_are_added_up_and_measured_wider(accumulate):
    optimizer, width = optax.sgd(1.0), 3000

    def objective(scores, batch, carry):
        return {"sum": Term(1.0, jnp.sum(scores.logps), jnp.ones(()))}, {}, carry

    score = lambda params, fixed, batch, key: Scores((batch["x"] @ params["w"])[:, None, None], jnp.ones((len(batch["x"]), 1, 1)), {}, {})
    batch = toy_batch() | {"x": (np.random.default_rng(0).standard_normal((ROWS, width))).astype(jnp.bfloat16)}
    params = {"w": jnp.zeros(width, jnp.bfloat16)}
    begun = start(optimizer).replace(trainable=params, opt_state=optimizer.init(params))
    step = tiny.quick(make_train_step(Algorithm(score, objective), optimizer, dtype="float32", accumulate=accumulate, max_grad_norm=0.0))
    after, found = step(begun, FIXED, batch)
    gradient = batch["x"].astype(np.float64).sum(0)
    assert float(found["grad_norm"].value) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert after.trainable["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(after.trainable["w"]), -gradient.astype(np.float32).astype(jnp.bfloat16))


def test_evaluation_adds_up_over_batches():
    """Two halves, the second with empty rows, give what the whole gives."""
    evaluate = tiny.quick(make_eval_step(toy(), dtype="float32"))
    batch = toy_batch()
    run = lambda rows: evaluate({"w": W}, {}, FIXED, {name: array[rows] for name, array in batch.items()})
    whole, halves = metrics.values(run(slice(None))), metrics.values(metrics.merge(run(slice(4)), run(slice(4, 8))))
    assert halves == pytest.approx(whole, rel=1e-5)
    assert whole["loss/square"] + whole["loss/mean"] == pytest.approx(expected(batch)[0], rel=1e-5)


def test_counts_are_known_before_the_model_runs(family):
    """Those from zeros are those of the real scores, on a batch with padding and empty rows."""
    algorithm = algorithms.make(tiny.config(), family.model)
    batch = tiny.as_arrays(tiny.make_batch(family, more=(3, 2, 1), empty_rows=2))
    score = lambda params, batch, key: algorithm.score(params, {}, batch, key)

    def both(params, batch):
        terms, _, _ = algorithm.objective(score(params, batch, None), batch, {})
        return {name: term.count for name, term in terms.items()}, global_counts(algorithm, score, params, batch, None, {})

    real, known = tiny.quick(both)(family.params, batch)
    assert real == known == {"sigmoid": len(family.pairs)}
    program = str(jax.make_jaxpr(lambda params, batch: global_counts(algorithm, score, params, batch, None, {}))(family.params, batch))
    assert "scan" not in program and "custom_vjp" not in program  # nothing of the model is in it


def test_nan_in_a_column_is_skipped_by_the_real_step(llama):
    """A reference that is missing (NaN) must not reach the weights."""
    from tests.invariance.step import build as build_step
    from tests.invariance.step import keep_gradient, one_device, put

    mesh = one_device()
    batch = tiny.make_batch(llama)
    batch["reference_logps"][2] = np.nan
    with jax.set_mesh(mesh):
        step, before, fixed = build_step(llama, tiny.config(), keep_gradient(), mesh)
        arguments = before, fixed, put(batch, mesh)
        after, found = step.lower(*arguments).compile(compiler_options=tiny.QUICK)(*arguments)
    assert int(after.nonfinite) == 1 and not np.isfinite(found["loss"].value)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(after.opt_state))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_a_compiler_is_told(monkeypatch, platform):
    """What that makes of a step on sixteen chips, tests/invariance/test_collectives.py looks at."""
    monkeypatch.setattr(jax, "jit", lambda function, **options: options["compiler_options"])
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    common = {"xla_allow_excess_precision": False}
    assert train_step.jit(toy, mesh) == common | (train_step.TPU_OPTIONS if platform == "tpu" else {})
    assert train_step.jit(toy) == common
