"""Whole objectives of one's own answers against float64 NumPy, token by token: what is averaged over what, and which tokens count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import make
from aligner.algorithms.distillation import distil
from aligner.algorithms.grpo import PENALISED
from aligner.likelihood import answer_lengths, sum_answers
from aligner.rl import rollouts
from aligner.types import Scores
from configs import common
from tests.models import tiny

BAR = 1e-10
RNG = np.random.default_rng(0)
LENGTHS, LONGEST = ((4, 1, 3), (2, 5, 2)), 6  # of three answers to each of two prompts
S = 14
ROLE = np.array([[r + 1 for r, m in enumerate(row) for _ in range(m)] + [0] * (S - sum(row)) for row in LENGTHS], np.int32)
THERE = ROLE > 0
LEFT_OUT = (1, 3)  # a token that is not learnt
LOGPS = -RNG.gamma(1.5, 1.0, ROLE.shape) * THERE
OLD, REFERENCE, SAMPLED = ((LOGPS + RNG.normal(0, scale, ROLE.shape)) * THERE for scale in (0.3, 0.5, 0.4))
ENTROPY = RNG.gamma(2, 0.5, ROLE.shape) * THERE
ADVANTAGES = np.array([[1.2, -0.7, -0.5], [0.4, -1.1, 0.7]])
REWARDS = np.array([[0.3, 1.4, -0.2], [2.0, -1.0, 0.5]])


def objective_of(name, **settings):
    config = tiny.config()
    config.algorithm = getattr(common, name)()
    if "importance_cap" in settings:  # a server writes
        config.generation.server, config.generation.importance_cap = "vllm:http://host", settings.pop("importance_cap")
    config.algorithm.update(dict(reward_funcs=("math",)) | settings)
    config.generation.max_new_tokens = LONGEST
    return config.algorithm, make(config, tiny.family("llama").model).objective


def total(objective, arrays, answers, stats=()):
    """The loss that a step would have."""
    with jax.enable_x64(True):
        batch = {"score_segment": THERE.astype(np.int32), "score_role": ROLE, "example_id": np.arange(2)[:, None], "sampling_logps": SAMPLED}
        batch = {name: jnp.asarray(x) for name, x in (batch | arrays).items()}
        batch |= {name: batch[name] * (batch["score_role"] <= answers) for name in ("score_segment", "score_role")}
        tokens = {"logp": jnp.asarray(LOGPS), "entropy": jnp.asarray(ENTROPY)} | {name: jnp.asarray(x) for name, x in dict(stats).items()}
        scores = Scores(sum_answers(tokens["logp"], batch, answers), answer_lengths(batch, answers), tokens, {})
        terms, _, _ = objective(scores, batch, {"updates": jnp.ones((), jnp.int32)})
        return sum(float(term.weight * term.sum / term.count) for term in terms.values())


# ---- GRPO's family


def token_loss(c, ratio, sequence_ratio, a, logp):
    high = c.epsilon if c.epsilon_high is None else c.epsilon_high
    if c.loss_type == "cispo":
        return -min(ratio, high) * a * logp
    if c.loss_type == "sapo":
        t = c.sapo_temperature_pos if a > 0 else c.sapo_temperature_neg
        return -4 / t / (1 + np.exp(-t * (ratio - 1))) * a
    if c.loss_type == "vespo":
        k, rate = (c.vespo_k_pos, c.vespo_lambda_pos) if a >= 0 else (c.vespo_k_neg, c.vespo_lambda_neg)
        return -(sequence_ratio**k) * np.exp(rate - rate * sequence_ratio) * a * logp
    loss = max(-(ratio if c.delta is None else min(ratio, c.delta)) * a, -min(max(ratio, 1 - c.epsilon), 1 + high) * a)
    return min(loss, -c.dual_clip * a) if c.dual_clip is not None and a < 0 else loss


def reference_loss(c, cap=None):
    """`cap`: of a server's importance ratios; None where this process writes."""
    of_answers, entropies = [], []
    for row in range(2):
        for role in (1, 2, 3):
            at = [t for t in range(S) if ROLE[row, t] == role and (row, t) != LEFT_OUT]
            logs = np.array([LOGPS[row, t] - OLD[row, t] for t in at])
            a = ADVANTAGES[row, role - 1]
            lags = np.array([1.0 if cap is None else min(np.exp(OLD[row, t] - SAMPLED[row, t]), cap) for t in at])
            drift = np.mean([(OLD if cap is None else SAMPLED)[row, t] - LOGPS[row, t] for t in at])
            keep = c.off_policy_mask_threshold is None or a >= 0 or drift <= c.off_policy_mask_threshold
            whole = np.exp(logs.sum() + np.log(lags).sum())  # from who wrote
            losses = []
            for t, log, lag in zip(at, logs, lags):
                log = {"token": log, "sequence": logs.mean(), "sequence_sum": logs.sum()}[c.importance_sampling_level]
                loss = token_loss(c, np.exp(log), whole, a, LOGPS[row, t]) * keep * (1 if c.loss_type == "vespo" else lag)
                if c.beta and c.name not in PENALISED:
                    d = REFERENCE[row, t] - LOGPS[row, t]
                    loss += c.beta * (np.exp(d) - 1 - d) * (np.exp(log) if c.use_bias_correction_kl else 1)
                losses.append(loss)
                entropies.append(ENTROPY[row, t])
            of_answers.append(losses)
    flat = np.concatenate(of_answers)
    loss = {
        "grpo": lambda: np.mean([np.mean(losses) for losses in of_answers]),
        "dr_grpo": lambda: flat.sum() / (len(of_answers) * LONGEST),
        "luspo": lambda: np.mean([np.sum(losses) for losses in of_answers]),
    }
    return loss.get({"sapo": "grpo"}.get(c.loss_type, c.loss_type), lambda: flat.mean())() - c.entropy_coef * np.mean(entropies)


CASES = [dict(loss_type=name) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo", "vespo")]
CASES += [dict(loss_type="cispo", epsilon_high=1.2), dict(loss_type="dapo", epsilon=0.1, epsilon_high=0.3, dual_clip=1.2),
          dict(loss_type="grpo", delta=1.1), dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.02),
          dict(loss_type="bnpo", beta=0.2), dict(loss_type="dapo", beta=0.2, use_bias_correction_kl=True, entropy_coef=0.03),
          dict(loss_type="dapo", off_policy_mask_threshold=0.05),
          dict(loss_type="dapo", off_policy_mask_threshold=0.05, importance_cap=1.1), dict(loss_type="vespo", importance_cap=1.1)]  # fmt: skip


@pytest.mark.parametrize("name, settings", [("grpo", case) for case in CASES] + [("rloo", dict(beta=0.1)), ("reinforce_plus_plus", {})], ids=str)
def test_grpo_and_its_kin(name, settings):
    cap = settings.get("importance_cap")
    c, objective = objective_of(name, **{"num_generations": 3, **settings})
    learn = THERE * 1.0
    learn[LEFT_OUT] = 0
    advantages = np.where(THERE, np.take_along_axis(ADVANTAGES, np.maximum(ROLE - 1, 0), 1), 0)
    arrays = {"learn": learn, "old_logps": OLD, "reference_logps": REFERENCE, "advantages": advantages}
    assert total(objective, arrays, 3) == pytest.approx(reference_loss(c, cap), rel=BAR)


# ---- pairs of one's own answers


def summed(x, row, role):
    return sum(x[row, t] for t in range(S) if ROLE[row, t] == role)


def pair_arrays(c):
    return {"learn": THERE * 1.0, "reference_logps": REFERENCE, "old_logps": LOGPS} | rollouts.pairs(c, REWARDS[:, : c.num_generations])


@pytest.mark.parametrize("answers", [2, 3])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_online_dpo(loss, answers):
    c, objective = objective_of("online_dpo", loss_type=loss, num_generations=answers, beta=0.3)
    losses = []
    for row in range(2):
        best, worst = (int(pick(REWARDS[row, :answers])) + 1 for pick in (np.argmax, np.argmin))
        margin = summed(LOGPS - REFERENCE, row, best) - summed(LOGPS - REFERENCE, row, worst)
        losses.append(np.log1p(np.exp(-0.3 * margin)) if loss == "sigmoid" else (margin - 1 / 0.6) ** 2)
    assert total(objective, pair_arrays(c), answers) == pytest.approx(np.mean(losses), rel=BAR)


def test_answers_that_are_left_out_make_no_pair():
    """Those that were cut, where config.algorithm.mask_truncated_completions says so: here the second prompt's worse answer."""
    c, objective = objective_of("xpo", xpo_alpha=0.2, beta=0.3)
    learn = THERE * 1.0
    learn[1, ROLE[1] == 2] = 0
    margin = summed(LOGPS - REFERENCE, 0, 2) - summed(LOGPS - REFERENCE, 0, 1)
    wanted = np.log1p(np.exp(-0.3 * margin)) + 0.2 * summed(LOGPS, 0, 2)
    assert total(objective, pair_arrays(c) | {"learn": learn}, 2) == pytest.approx(wanted, rel=BAR)


@pytest.mark.parametrize("objective", ["divergence", "iw_opd"])
def test_a_teacher_is_not_followed_on_answers_that_are_left_out(objective):
    config, model = tiny.config(), tiny.family("llama").model
    config.algorithm = common.on_policy_distillation()
    config.algorithm.update(dict(objective=objective, num_generations=3, iw_opd_gamma=0.0))
    learn = THERE * 1.0
    learn[1, ROLE[1] == 2] = 0
    losses = (LOGPS - REFERENCE) * LOGPS if objective == "iw_opd" else ENTROPY
    stats = {"divergence": ENTROPY, "agreement": THERE * 1.0, "teacher_logp": REFERENCE}
    assert total(distil(config, model, model).objective, {"learn": learn}, 3, stats) == pytest.approx(losses[learn > 0].mean(), rel=BAR)


def test_xpo():
    c, objective = objective_of("xpo", xpo_alpha=0.2, beta=0.3)
    losses = []
    for row in range(2):
        sign = 1 if REWARDS[row, 0] > REWARDS[row, 1] else -1
        margin = sign * (summed(LOGPS - REFERENCE, row, 1) - summed(LOGPS - REFERENCE, row, 2))
        losses.append(np.log1p(np.exp(-0.3 * margin)) + 0.2 * summed(LOGPS, row, 2))
    assert total(objective, pair_arrays(c), 2) == pytest.approx(np.mean(losses), rel=BAR)


def test_nash_md():
    c, objective = objective_of("nash_md", beta=0.3)
    losses = []
    for row in range(2):
        preferred = 1 / (1 + np.exp(REWARDS[row, 1] - REWARDS[row, 0]))
        losses.append(0.3 * summed((LOGPS - REFERENCE) * LOGPS, row, 1) - (preferred - 0.5) * summed(LOGPS, row, 1))
    assert total(objective, pair_arrays(c), 2) == pytest.approx(np.mean(losses), rel=BAR)


def test_where_nothing_is_known_nothing_is_learnt_of_the_rewards():
    c, _ = objective_of("nash_md")
    found = rollouts.pairs(c, np.array([[1.0, np.nan], [0.5, 0.5], [2.0, 0.0]]))
    assert found["preference"][:2].tolist() == [[0.5], [0.5]] and found["preference"][2] > 0.5
    assert found["chosen"].sum(-1)[:, 0].tolist() == [0, 0, 1] and (found["by_rival"] == [0, 1]).all()


# ---- supervised rows beside PPO's answers


def test_ptx_is_a_mean_over_its_own_tokens():
    config = tiny.config()
    config.algorithm = common.ppo()
    config.algorithm.update(dict(reward_funcs=("math",), ptx_coef=0.4))
    config.data.ptx.path = "rows.jsonl"
    objective = make(config, tiny.family("llama").model).objective
    scored, logps = np.array([[1, 1, 0], [1, 0, 0]]), -RNG.gamma(2, 1, (2, 3))
    arrays = {"learn": THERE * 1.0, "old_logps": OLD, "advantages": ADVANTAGES[:, :1] * THERE, "returns": REFERENCE, "old_values": OLD}
    role = {"score_role": (ROLE > 0).astype(np.int32)}
    with_rows = total(objective, arrays | role | {"ptx_score_segment": scored}, 1, {"value": LOGPS, "ptx": logps})
    without = total(objective, arrays | role | {"ptx_score_segment": scored}, 1, {"value": LOGPS, "ptx": 0 * logps})
    assert with_rows - without == pytest.approx(0.4 * -np.mean([logps[0, 0], logps[0, 1], logps[1, 0]]), rel=BAR)


# ---- PPO-Lagrangian


def test_the_multiplier_and_the_reward_under_a_bound_on_costs():
    """Safe RLHF, equations 9 and 31: (R - l C) / (1 + l); log l moves by lr (mean C - limit)."""
    c, _ = objective_of("ppo_lagrangian", cost_funcs=("a", "b"), cost_limit=0.4, lagrangian_lr=0.7, lagrangian_max=3.0)
    rewards, costs = RNG.normal(size=(3, 2)), RNG.normal(1.0, 1.0, (3, 2, 2))
    each = np.concatenate([rewards[..., None], costs], axis=-1)
    found, metrics, host = rollouts.bounded(c, rewards, each, {"reward": 0.0}, {"lagrangian": 1.7, "beta": 0.1})
    cost = costs[..., 0] + costs[..., 1]
    np.testing.assert_allclose(found, (rewards - 1.7 * cost) / 2.7, rtol=BAR)
    assert metrics == {"reward": 0.0, "cost": pytest.approx(cost.mean()), "lagrangian": 1.7}
    assert host["lagrangian"] == pytest.approx(min(np.exp(np.log(1.7) + 0.7 * (cost.mean() - 0.4)), 3.0), rel=BAR) and host["beta"] == 0.1
    _, _, host = rollouts.bounded(c, rewards, each + 9, {}, {"lagrangian": 1.7})
    assert host["lagrangian"] == 3.0


def test_costs_that_are_not_known_do_not_move_the_multiplier():
    """Of [1, None] the mean is 1, not 1/2; an answer has the sum of those of its costs that are known."""
    c, _ = objective_of("ppo_lagrangian", cost_funcs=("a", "b"), cost_limit=0.4, lagrangian_lr=0.7)
    each = np.array([[[0.0, 1.0, np.nan], [2.0, np.nan, np.nan]], [[4.0, 3.0, 2.0], [6.0, np.nan, np.nan]]])
    found, metrics, host = rollouts.bounded(c, each[..., 0], each, {}, {"lagrangian": 1.0})
    np.testing.assert_allclose(found, np.array([[-1.0, 2.0], [-1.0, 6.0]]) / 2)
    assert metrics == {"cost": 3.0, "lagrangian": 1.0} and host["lagrangian"] == pytest.approx(np.exp(0.7 * (3.0 - 0.4)), rel=BAR)
    each[..., 1:] = np.nan
    found, metrics, host = rollouts.bounded(c, each[..., 0], each, {}, {"lagrangian": 1.7})
    assert metrics == {"lagrangian": 1.7} == host
    np.testing.assert_allclose(found, each[..., 0] / 2.7)
