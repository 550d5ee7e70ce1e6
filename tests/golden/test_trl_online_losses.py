"""PPO, online DPO, XPO and Nash-MD against numbers that TRL 1.12 computed (scripts/make_trl_online_vectors.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import make
from aligner.data.templates import Encoded
from aligner.generation.engine import Completion, Prompt
from aligner.likelihood import answer_lengths, sum_answers
from aligner.rl import rollouts
from aligner.rl.prompts import Item
from aligner.types import Scores
from configs import common
from tests.models import tiny

STORED = json.loads((Path(__file__).parent / "vectors" / "trl_losses_online.json").read_text())
EOS, WIDTH = 2, 5
BAR = 1e-6


def close(found, wanted):
    """To a millionth of the largest."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=BAR * np.abs(wanted).max())


def config_of(algorithm, **settings):
    config = tiny.config()
    config.algorithm = getattr(common, algorithm)()
    config.algorithm.update(dict(reward_funcs=("math",)) | settings)
    config.generation.max_new_tokens = WIDTH
    return config


# ---- PPO


def ppo_config(c):
    names = {"kl_coef": "beta", "cliprange": "epsilon"}
    return config_of("ppo", **{names.get(name, name): value for name, value in c.items()})


def group(row, tokens, score):
    """An answer of some tokens; what its reward function gave stands before the penalty for a missing EOS."""
    tokens = np.array(tokens, np.int32)
    answer = Completion(tokens, -np.ones(len(tokens), np.float32), tokens[-1] == EOS)
    item = Item(row, "x", Encoded(np.array([3], np.int32), ()), Prompt(np.array([3], np.int32)), {})
    return rollouts.Group(item, [answer], ["x"], np.array([[score]]))


def wide(column, batch):
    """TRL's columns [B, 5] as ours [B, S]."""
    column = np.array(column)
    return np.pad(column, ((0, 0), (0, batch["score_from"].shape[1] - WIDTH)))


def rollout_of(case):
    """(config, our batch with advantages and returns, which of its columns are tokens)."""
    there = np.arange(WIDTH) < np.array(case["lengths"])[:, None]
    groups = [group(*row) for row in zip(range(8), (t[:m] for t, m in zip(case["tokens"], case["lengths"])), case["raw_scores"])]
    batch = rollouts.lay_out(groups, tiny.family("llama").model, True, 8)
    there = wide(there, batch)
    column = lambda name: np.where(there, wide(case[name], batch), 0)
    batch |= {"old_logps": column("logprobs"), "reference_logps": column("ref_logprobs"), "old_values": column("values")}
    config = ppo_config(case["settings"])
    found, metrics, _ = rollouts.learnable(config, groups, None, batch, np.ones(1), {"beta": config.algorithm.beta, "running": [0, 0, 0]})
    assert metrics["reward"] == pytest.approx(np.mean(case["raw_scores"]))
    return config, found, there


PPO = {case["case"]: case for case in STORED["ppo"]}


@pytest.mark.parametrize("name", PPO)
def test_ppo_advantages_and_returns(name):
    _, batch, there = rollout_of(PPO[name])
    for column in ("advantages", "returns"):
        close(batch[column], np.where(there, wide(PPO[name][column], batch), 0))


@pytest.mark.parametrize("name", PPO)
def test_ppo_updates(name):
    """Losses and gradients of four updates, the later ones with ratios and values that are clipped."""
    case = PPO[name]
    config, whole, there = rollout_of(case)
    seen = {"policy/clipfrac_avg": [], "val/clipfrac_avg": [], "loss/policy_avg": [], "loss/value_avg": []}
    with jax.enable_x64(True):
        objective = make(config, tiny.family("llama").model).objective
        for update in case["updates"]:
            rows = update["rows"]
            part = {key: jnp.asarray(x[rows]) for key, x in whole.items()}
            own = there[rows]

            def loss(logps, values, part=part):
                lengths = answer_lengths(part, 1)
                tokens = {"logp": logps, "value": values, "entropy": jnp.zeros_like(logps)}
                terms, metrics, _ = objective(Scores(lengths, lengths, tokens, {}), part, {"updates": jnp.zeros((), jnp.int32)})
                return sum(t.weight * t.sum / t.count for t in terms.values()), (terms, metrics)

            given = [jnp.asarray(np.where(own, wide(update[key], part), 0)) for key in ("new_logprobs", "vpred")]
            (_, (terms, metrics)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*given)
            # TRL counts one value more for every answer that ends early, whose loss is 0 here
            counted = own.sum() / (own.sum() + np.sum(own.sum(axis=1) < WIDTH))
            policy, value = (float(terms[key].sum / terms[key].count) for key in ("policy", "value"))
            assert policy == pytest.approx(update["pg_loss"], rel=BAR, abs=BAR)
            assert value * counted == pytest.approx(update["vf_loss"], rel=BAR)
            close(gradients[0], np.where(own, wide(update["logp_gradient"], part), 0))
            close(gradients[1] * counted, np.where(own, wide(update["value_gradient"], part), 0))
            for key, values in seen.items():
                share = counted if "val" in key else 1.0
                values.append(share * float(metrics[key].sum / metrics[key].count))
    for key, values in seen.items():
        assert np.mean(values) == pytest.approx(case["metrics"][key], rel=BAR, abs=BAR)
    assert case["metrics"]["policy/clipfrac_avg"] > 0


# ---- two answers to a prompt

ARRAYS = {name: np.array(value) for name, value in STORED["pairs"].items()}


def at_slots(array):
    """[6, T] -> [3, S] scored positions: a prompt's first answer, and its second after that."""
    lengths = ARRAYS["mask"].sum(1).astype(int)
    rows = [np.concatenate([array[i, : lengths[i]], array[i + 3, : lengths[i + 3]]]) for i in range(3)]
    return np.stack([np.pad(row, (0, 12 - len(row))) for row in rows])


@pytest.mark.parametrize("case", STORED["losses"], ids=lambda case: f"{case['algorithm']}: {case['case']}")
def test_loss_and_gradient_of_pairs(case):
    names = {"alpha": "xpo_alpha"}
    config = config_of(case["algorithm"], **{names.get(name, name): value for name, value in case["settings"].items()})
    role = at_slots(np.where(ARRAYS["mask"] > 0, np.repeat([1, 2], 3)[:, None], 0)).astype(np.int32)
    total = ARRAYS["rewards"].reshape(2, 3).T
    with jax.enable_x64(True):
        batch = {"score_segment": (role > 0).astype(np.int32), "score_role": role, "example_id": np.zeros((3, 1), np.int32)}
        batch |= {"learn": (role > 0) * 1.0} | rollouts.pairs(config.algorithm, total)
        batch |= {name: at_slots(ARRAYS["reference"]) for name in ("reference_logps", "sampling_logps")}
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        objective = make(config, tiny.family("llama").model).objective

        def loss(logps):
            tokens = {"logp": logps, "entropy": jnp.zeros_like(logps)}
            terms, _, _ = objective(Scores(sum_answers(logps, batch, 2), answer_lengths(batch, 2), tokens, {}), batch, {})
            return sum(term.weight * term.sum / term.count for term in terms.values())

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(at_slots(ARRAYS["logps"])))
    assert float(value) == pytest.approx(case["loss"], rel=BAR)
    close(gradient, at_slots(np.array(case["gradient"])))
