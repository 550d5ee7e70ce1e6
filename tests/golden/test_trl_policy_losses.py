"""Losses of a policy's own answers, with gradients by every token's log-probability and metrics, against numbers that the real TRL computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import make
from aligner.likelihood import answer_lengths, spread, sum_answers
from aligner.losses import policy_gradient
from aligner.types import Scores
from configs import common
from scripts.trl_vectors.online import LONGEST
from tests.golden.trl_vectors import BATCHES, as_answers, as_rows, check, of, reduced
from tests.models import tiny

R = 2  # answers of a prompt, one after the other in its row


def batch_of(arrays: dict) -> dict:
    """What a rollout makes of the arrays, two answers a row."""
    mask = as_rows(arrays["mask"], R)
    role = mask * (1 + np.arange(mask.shape[1]) // (mask.shape[1] // R))
    columns = {"advantages": arrays["advantages"][:, None] * arrays["mask"]}
    columns |= {"old_logps": arrays["old"], "reference_logps": arrays["sampled"], "sampling_logps": arrays["sampled"]}
    batch = {"score_segment": mask.astype(np.int32), "score_role": role.astype(np.int32), "example_id": np.arange(len(mask))[:, None]}
    return batch | {"learn": mask} | {name: as_rows(array, R) for name, array in columns.items()}


def scores_of(logps, arrays: dict, batch: dict) -> Scores:
    tokens = {"logp": logps, "entropy": jnp.asarray(as_rows(arrays["entropy"], R))}
    return Scores(sum_answers(logps, batch, R), answer_lengths(batch, R), tokens, {})


@pytest.mark.parametrize(("name", "record"), of("grpo", "rloo", "async_grpo"))
def test_equals_trl(name, record):
    arrays, config = BATCHES[record["batch"]], tiny.config()
    settings = dict(record["settings"])
    config.algorithm = getattr(common, name.removeprefix("async_"))()
    if "importance_cap" in settings:
        config.generation.server, config.generation.importance_cap = "vllm:http://host", settings.pop("importance_cap")
    config.algorithm.update(dict(reward_funcs=("math",), num_generations=R, beta=0.0, use_bias_correction_kl=False) | settings)
    config.generation.max_new_tokens = LONGEST
    batch = batch_of(arrays)
    if config.algorithm.top_entropy_quantile < 1:
        least = np.quantile(arrays["entropy"][arrays["mask"] > 0], 1 - config.algorithm.top_entropy_quantile)
        batch["sure"] = (as_rows(arrays["entropy"], R) < least).astype(float)
    objective = make(config, tiny.family("llama").model).objective

    def loss(logps):
        there = {name: jnp.asarray(x) for name, x in batch.items()}
        return reduced(objective, scores_of(logps, arrays, there), there)

    check(record, loss, as_rows(arrays["logps"], R), lambda x: as_answers(x, R))


@pytest.mark.parametrize(("name", "record"), of("gmpo"))
def test_gmpo(name, record):
    arrays, batch = BATCHES[record["batch"]], batch_of(BATCHES[record["batch"]])
    c = {"epsilon": 0.4, "epsilon_high": None, "beta": 0.0} | record["settings"]

    def loss(logps):
        mean = lambda x: sum_answers(x, batch, R) / answer_lengths(batch, R)
        there = batch["score_segment"] > 0
        held = policy_gradient.gmpo(logps - batch["old_logps"], batch["advantages"], c["epsilon"], c["epsilon_high"] or c["epsilon"])
        losses = -jnp.exp(spread(mean(held), batch)) * batch["advantages"]
        kl = policy_gradient.kl(logps, jnp.asarray(batch["reference_logps"]), "k3")
        return jnp.mean(mean(jnp.where(there, losses + c["beta"] * kl, 0))), {}

    check(record, loss, as_rows(arrays["logps"], R), lambda x: as_answers(x, R))


@pytest.mark.parametrize(("name", "record"), of("a2po"))
def test_a2po(name, record):
    """The first answers, each right where its prompt's label says so; of every prompt five answers of the reference are known."""
    arrays, c = BATCHES[record["batch"]], record["settings"]
    n = len(arrays["label"])
    right = (np.arange(5 * n) % 3 == 0).astype(float).reshape(n, 5)

    def loss(logps):
        ratios = jnp.sum(logps[:n] - arrays["reference"][:n], axis=1)
        optimal = policy_gradient.optimal_value(jnp.asarray(right), c["beta1"])
        return jnp.mean(policy_gradient.a2po(ratios, jnp.asarray(arrays["label"]), optimal, c["beta2"])), {}

    record["metrics"] = {}
    check(record, loss, arrays["logps"])


@pytest.mark.parametrize(("name", "record"), of("online_dpo"))
def test_online_dpo(name, record):
    """The first answer is the better one where the prompt's label says so."""
    arrays, batch, config = BATCHES[record["batch"]], batch_of(BATCHES[record["batch"]]), tiny.config()
    config.algorithm = common.online_dpo()
    config.algorithm.update(dict(reward_funcs=("math",)) | record["settings"])
    first = (arrays["label"] > 0.5).astype(float)
    batch["reference_logps"] = as_rows(arrays["reference"], R)
    batch |= {"chosen": np.stack([first, 1 - first], -1)[:, None], "rejected": np.stack([1 - first, first], -1)[:, None]}
    batch["by_rival"] = np.zeros_like(batch["chosen"])
    objective = make(config, tiny.family("llama").model).objective

    def loss(logps):
        there = {name: jnp.asarray(x) for name, x in batch.items()}
        return reduced(objective, scores_of(logps, arrays, there), there)

    check(record, loss, as_rows(arrays["logps"], R), lambda x: as_answers(x, R))


def test_a_group_is_one_prompt():
    """Answers in other places would be seen: their lengths differ."""
    with jax.enable_x64(True):
        assert np.asarray(answer_lengths(batch_of(BATCHES["ragged"]), R))[:, 0].tolist() == [[7, 3], [1, 6], [4, 4], [2, 7], [5, 1]]
