"""Losses, gradients and metrics against numbers that the real TRL computed from the same log-probabilities (scripts/trl_vectors).

Runs without torch. The gradient is that by every token's log-probability.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import cpo, dpo, kto, orpo, reward, sft, tpo
from aligner.likelihood import answer_lengths, sum_answers
from aligner.types import Scores
from configs import common
from tests.golden.trl_vectors import BATCHES, as_answers, as_rows, check, load, of, reduced

ALGORITHMS = {"dpo": dpo, "kto": kto, "cpo": cpo, "orpo": orpo}


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


@pytest.mark.parametrize(("name", "record"), of(*ALGORITHMS))
def test_equals_trl(name, record):
    arrays, config = BATCHES[record["batch"]], setting(name, record["settings"])
    answers = 1 if config.algorithm.get("loss_type") == "apo_zero_unpaired" else 2
    algorithm = ALGORITHMS[name].make(config, None)  # a model is needed to score only
    if answers == 1:
        del record["metrics"]["kl"]  # TRL's is 0 there

    def loss(logps):
        batch = make_batch(arrays, answers)
        return reduced(algorithm.objective, make_scores(arrays, batch, logps, answers, config.algorithm.get("ld_alpha")), batch)

    # TRL's gradient also stands at padding, where no parameter feels it; of one answer alone, at the second none does
    arrange = lambda x: np.concatenate([as_answers(x, answers), np.zeros_like(x)])[: len(arrays["mask"])]
    check(record, loss, as_rows(arrays["logps"], answers), arrange, arrays["mask"])


@pytest.mark.parametrize(("name", "record"), of("tpo"))
def test_tpo_equals_trl(name, record):
    """The gold answer is the chosen one of the next pair."""
    arrays, config = BATCHES[record["batch"]], common.base()
    config.algorithm = common.tpo()
    config.algorithm.update(record["settings"])
    n = len(arrays["label"])
    side = lambda x: np.concatenate([x[:n], x[n:], np.roll(x[:n], -1, axis=0)], axis=1)
    mask = side(arrays["mask"]).astype(np.int32)
    role = 1 + np.arange(mask.shape[1]) // (mask.shape[1] // 3)
    batch = {"score_segment": mask, "score_role": mask * role, "example_id": np.arange(n)[:, None]}
    objective = tpo.make(config, None).objective

    def loss(logps):
        tokens = {name: jnp.zeros(mask.shape) for name in ("entropy", "correct", "mean_logit")} | {"logp": logps}
        return reduced(objective, Scores(sum_answers(logps, batch, 3), answer_lengths(batch, 3).astype(float), tokens, {}), batch)

    check(record, loss, side(arrays["logps"]), lambda x: as_answers(x, 3)[: len(record["gradient"])])


@pytest.mark.parametrize(("name", "record"), of("sft"))
def test_sft_equals_trl(name, record):
    arrays, config = BATCHES[record["batch"]], common.base()
    config.algorithm = common.sft()
    config.algorithm.update(record["settings"])
    mask = arrays["mask"].astype(int)
    batch = {"score_segment": mask, "score_role": mask, "example_id": np.arange(len(mask))[:, None]}
    objective = sft.make(config, None).objective

    def loss(logps):
        tokens = {"logp": logps, "entropy": jnp.asarray(arrays["entropy"]), "correct": jnp.asarray(arrays["is_top1"])}
        return reduced(objective, Scores(jnp.zeros(()), answer_lengths(batch, 1), tokens, {}), batch)

    check(record, loss, arrays["logps"], where=arrays["mask"])


@pytest.mark.parametrize(("name", "record"), of("reward"))
def test_reward_equals_trl(name, record):
    arrays, config, n = BATCHES[record["batch"]], common.base(), len(BATCHES[record["batch"]]["label"])
    config.algorithm = common.reward()
    config.algorithm.center_rewards_coefficient = record["settings"].get("center_rewards_coefficient", 0.0)
    margin = arrays["mean_logits"][:n, :1] if record["settings"].get("margin") else np.zeros((n, 1))
    objective = reward.make(config, SimpleNamespace(has_score_head=True)).objective
    scores = lambda r: Scores(None, jnp.ones((n, 1, 2)), {}, {}, values=jnp.stack([r[:n], r[n:]], -1))
    check(record, lambda r: reduced(objective, scores(r), {"margin": jnp.asarray(margin)}), arrays["logps"].sum(1, keepdims=True))


def test_every_loss_of_trl_is_there():
    """The types that TRL's trainers of given answers know, by name; whole trainers are those that scripts/trl_vectors runs."""
    found = {r["settings"].get("loss_type", ["sigmoid"])[0] for r in load("dpo")}
    assert found == {*dpo.LOSSES, dpo.SFT} - {"ipo_sum", "bco"} and len(found) == 15
