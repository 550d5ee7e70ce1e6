"""Losses, gradients and metrics against numbers that the real TRL computed from the same log-probabilities (scripts/make_trl_vectors.py).

Runs without torch. The gradient is that by every token's log-probability.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import cpo, dpo, kto, orpo, reward, sft, tpo
from aligner.likelihood import answer_lengths, sum_answers
from aligner.logprobs import divergence
from aligner.metrics import values
from aligner.types import Head, Scores
from configs import common

FOLDER = Path(__file__).parent / "vectors"
BAR = 1e-6  # max|a - b| / max|b|
ALGORITHMS = {"dpo": dpo, "kto": kto, "cpo": cpo, "orpo": orpo}
SKIPPED = {"num_tokens"}  # the training step counts those


def load(name: str) -> list[dict]:
    return json.loads((FOLDER / f"trl_losses_{name}.json").read_text())["cases"]


def of(name: str) -> list:
    """The stored cases of a trainer, as parameters of a test."""
    return [pytest.param(record, id=f"{record['case']}: {record['batch']}") for record in load(name)]


VECTORS = {name: load(name) for name in ALGORITHMS}
with np.load(FOLDER / "trl_batches.npz") as stored:
    BATCHES: dict[str, dict[str, np.ndarray]] = {}
    for key in stored:
        BATCHES.setdefault(key.split("/")[0], {})[key.split("/")[1]] = stored[key]


def as_rows(x: np.ndarray, answers: int) -> np.ndarray:
    """[2n, T], all first answers and then all second ones -> [n, answers * T]: the answers to a prompt in one row."""
    return np.concatenate(np.split(x, 2)[:answers], axis=1)


def make_batch(arrays: dict[str, np.ndarray], answers: int) -> dict[str, jax.Array]:
    mask = as_rows(arrays["mask"], answers).astype(np.int32)
    role = 1 + np.arange(mask.shape[1]) // (mask.shape[1] // answers)
    batch = {"score_segment": mask, "score_role": mask * role, "example_id": np.arange(len(mask))[:, None]}
    return {name: jnp.asarray(x) for name, x in batch.items()} | {"label": jnp.asarray(arrays["label"], float)[:, None]}


def make_scores(arrays: dict[str, np.ndarray], batch: dict, logps: jax.Array, answers: int, ld_alpha: float | None) -> Scores:
    """What a likelihood would say: the model's part is played by the stored tokens."""
    row = lambda name: jnp.asarray(as_rows(arrays[name], answers))
    tokens = {"logp": logps, "entropy": row("entropy"), "correct": row("is_top1"), "mean_logit": row("mean_logits")}
    tokens |= {"sum_p2": jnp.exp(row("log_sum_sq_probs"))}
    lengths = answer_lengths(batch, answers).astype(logps.dtype)

    def summed(values):
        plain = sum_answers(values, batch, answers)
        return plain if ld_alpha is None else dpo.ld_logps(Scores(plain, lengths, {"logp": values}, {}), batch, ld_alpha)

    return Scores(summed(logps), lengths, tokens, {}, reference_logps=summed(row("reference")))


def setting(name: str, changes: dict):
    """TRL's arguments as our config: the same names."""
    config = common.base()
    config.algorithm = {"dpo": common.dpo, "kto": common.kto, "cpo": common.cpo, "orpo": common.orpo}[name]()
    for key, value in changes.items():
        config.algorithm[key] = tuple(value) if isinstance(value, list) else value
    if name == "orpo":
        config.algorithm.nll_over = "completion"  # the stored log-probabilities have no prompts
    return config


CASES = [pytest.param(name, r, id=f"{name}: {r['case']}: {r['batch']}") for name, records in VECTORS.items() for r in records]


@pytest.mark.parametrize(("name", "record"), CASES)
def test_equals_trl(name, record):
    arrays, config = BATCHES[record["batch"]], setting(name, record["settings"])
    answers = 1 if config.algorithm.get("loss_type") == "apo_zero_unpaired" else 2
    with jax.enable_x64(True):
        algorithm = ALGORITHMS[name].make(config, None)  # a model is needed to score only
        batch = make_batch(arrays, answers)

        def loss_of(logps):
            scores = make_scores(arrays, batch, logps, answers, config.algorithm.get("ld_alpha"))
            terms, metrics, _ = algorithm.objective(scores, batch, algorithm.carry)
            return sum(term.weight * term.sum / term.count for term in terms.values()), metrics

        logps = jnp.asarray(as_rows(arrays["logps"], answers))
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(logps)
    single = "alpha_divergence" in record["case"] or name == "orpo"  # TRL computes these in float32: a difference of metrics is less exact
    assert loss.dtype == np.float64
    assert loss == pytest.approx(record["loss"], rel=BAR)
    expected = as_rows(np.array(record["gradient"]), answers)
    where = as_rows(arrays["mask"], answers) > 0  # TRL's gradient also stands at padding, where no parameter feels it
    assert np.abs(np.asarray(gradient) - expected)[where].max() <= BAR * np.abs(expected[where]).max()
    found = values(metrics) | ({"kl": 0.0} if answers == 1 else {})
    wanted = {key: value for key, value in record["metrics"].items() if key not in SKIPPED}
    scale = max(map(abs, wanted.values())) if single else 1e-3
    for metric, value in wanted.items():
        assert found[metric] == pytest.approx(value, rel=BAR, abs=BAR * scale), metric


def reduced(objective, scores, batch):
    terms, metrics, _ = objective(scores, batch, {})
    return sum(term.weight * term.sum / term.count for term in terms.values()), metrics


def compare(record, found, gradient, mask=1.0, bar=BAR, least=0.0) -> None:
    loss, metrics = found
    assert loss == pytest.approx(record["loss"], rel=bar)
    expected = np.array(record["gradient"])
    assert np.abs((np.asarray(gradient) - expected) * mask).max() <= bar * max(np.abs(expected).max(), least)
    for metric in record["metrics"].keys() - SKIPPED:
        assert values(metrics)[metric] == pytest.approx(record["metrics"][metric], rel=BAR, abs=1e-9), metric


@pytest.mark.parametrize("record", of("tpo"))
def test_tpo_equals_trl(record):
    """The gold answer is the chosen one of the next pair."""
    arrays, config = BATCHES[record["batch"]], common.base()
    config.algorithm = common.tpo()
    config.algorithm.update(record["settings"])
    n = len(arrays["label"])
    side = lambda x: np.concatenate([x[:n], x[n:], np.roll(x[:n], -1, axis=0)], axis=1)
    with jax.enable_x64(True):
        mask = side(arrays["mask"]).astype(np.int32)
        role = 1 + np.arange(mask.shape[1]) // (mask.shape[1] // 3)
        batch = {"score_segment": mask, "score_role": mask * role, "example_id": np.arange(n)[:, None]}
        tokens = {name: jnp.zeros(mask.shape) for name in ("entropy", "correct", "mean_logit")}
        scores = lambda logps: Scores(sum_answers(logps, batch, 3), answer_lengths(batch, 3).astype(float), {"logp": logps, **tokens}, {})
        loss = lambda logps: reduced(tpo.make(config, None).objective, scores(logps), batch)
        found, gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(side(arrays["logps"])))
    parts = np.split(np.asarray(gradient), 3, axis=1)
    compare(record, found, np.concatenate(parts)[: len(record["gradient"])])


@pytest.mark.parametrize("record", of("sft"))
def test_sft_equals_trl(record):
    arrays, config = BATCHES[record["batch"]], common.base()
    config.algorithm = common.sft()
    config.algorithm.update(record["settings"])
    with jax.enable_x64(True):
        mask = jnp.asarray(arrays["mask"], int)
        batch = {"score_segment": mask, "score_role": mask, "example_id": jnp.arange(len(mask))[:, None]}
        tokens = {"entropy": jnp.asarray(arrays["entropy"]), "correct": jnp.asarray(arrays["is_top1"])}
        scores = lambda logps: Scores(jnp.zeros(()), answer_lengths(batch, 1), {"logp": logps, **tokens}, {})
        loss = lambda logps: reduced(sft.make(config, None).objective, scores(logps), batch)
        found, gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(arrays["logps"]))
    compare(record, found, gradient, arrays["mask"])


@pytest.mark.parametrize("record", of("reward"))
def test_reward_equals_trl(record):
    arrays, config, n = BATCHES[record["batch"]], common.base(), len(BATCHES[record["batch"]]["label"])
    config.algorithm = common.reward()
    config.algorithm.center_rewards_coefficient = record["settings"].get("center_rewards_coefficient", 0.0)
    with jax.enable_x64(True):
        batch = {"margin": jnp.asarray(arrays["mean_logits"][:n, :1] if record["settings"].get("margin") else np.zeros((n, 1)))}
        objective = reward.make(config, SimpleNamespace(has_score_head=True)).objective
        scores = lambda r: Scores(None, jnp.ones((n, 1, 2)), {}, {}, values=jnp.stack([r[:n], r[n:]], -1))
        loss = lambda r: reduced(objective, scores(r), batch)
        found, gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(arrays["logps"].sum(1, keepdims=True)))
    compare(record, found, gradient)


@pytest.mark.parametrize("record", of("distillation"))
def test_distillation_equals_trl(record):
    """GKD's, and DistillationTrainer's, which is the same divergence computed in float32."""
    arrays, c = BATCHES[record["batch"]], record["settings"]
    with jax.enable_x64(True):
        mask, head = jnp.asarray(arrays["mask"][: len(arrays["student"])]), Head(jnp.eye(arrays["student"].shape[-1], dtype=float))

        def loss(student):
            found = divergence(student, head, jnp.asarray(arrays["teacher"]), head, c["beta"], c["temperature"])["divergence"]
            return jnp.sum(found * mask) / jnp.sum(mask), {}

        found, gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(arrays["student"]))
    single = {} if c["trainer"] == "gkd" else dict(bar=5e-6, least=0.01)
    compare(record, found, gradient, **single)


def test_every_loss_of_trl_is_there():
    assert {r["settings"].get("loss_type", ["sigmoid"])[0] for r in VECTORS["dpo"]} == {*dpo.LOSSES, dpo.SFT} - {"ipo_sum", "bco"}
