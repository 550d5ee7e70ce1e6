"""PPO from rewards to loss against loops in float64 NumPy, written as TRL 1.12's trainer does it; and what the critic's settings do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import make, ppo
from aligner.likelihood import answer_lengths
from aligner.rl import rollouts
from aligner.types import Scores, UserError
from configs import common
from tests.models import tiny
from tests.rl.test_online import answer, group

RNG = np.random.default_rng(0)
GROUPS = [group(0, [3, 5], [[9, 8, 2]], [1.5]), group(1, [4], [[7, 7, 7, 7]], [-0.5])]
GROUPS[1] = GROUPS[1]._replace(answers=[answer(7, 7, 7, 7)._replace(stopped=False)])
LENGTHS = (3, 4)
HOST = {"beta": 0.2, "running": [0, 0.0, 0.0]}


def config_of(**changes):
    config = tiny.config()
    config.algorithm = common.ppo()
    config.algorithm.update(dict(reward_funcs=("math",)) | changes)
    config.generation.max_new_tokens = 4
    return config


@pytest.fixture(scope="module")
def batch():
    """Two answers with the numbers that a rollout asks for."""
    made = rollouts.lay_out(GROUPS, tiny.family("llama").model, True, 8)
    there = made["score_segment"] > 0
    noise = lambda scale: (scale * RNG.normal(size=there.shape) * there).astype(np.float32)
    logps = -np.abs(noise(1.0))
    return made | {"old_logps": logps, "reference_logps": logps + noise(0.3), "old_values": noise(1.0), "there": there}


def rewards_of(batch, beta, estimator, penalty):
    """The reward at every token of both answers."""
    rows = []
    for i, (m, score, stopped) in enumerate(zip(LENGTHS, (1.5, -0.5), (True, False))):
        difference = np.float64(batch["reference_logps"][i, :m]) - np.float64(batch["old_logps"][i, :m])
        kl = {"k1": -difference, "k2": difference**2 / 2, "k3": np.exp(difference) - 1 - difference}[estimator]
        row = -beta * kl
        row[-1] += score - (0 if stopped else penalty)
        rows.append(row)
    return rows


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_advantages_and_returns(batch, estimator, whiten_rewards):
    gamma, lam = 0.98, 0.9
    config = config_of(kl_estimator=estimator, whiten_rewards=whiten_rewards, missing_eos_penalty=0.7, gamma=gamma, lam=lam)
    arrays = {name: x for name, x in batch.items() if name != "there"}
    found, metrics, _ = rollouts.learnable(config, GROUPS, None, arrays, np.ones(1), dict(HOST))
    rows = rewards_of(batch, 0.2, estimator, 0.7)
    if whiten_rewards:
        flat = np.concatenate(rows)
        rows = [(row - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8) + flat.mean() for row in rows]
    advantages, returns = [], []
    for i, (row, m) in enumerate(zip(rows, LENGTHS)):
        values = np.float64(batch["old_values"][i, :m])
        later, reversed_ = 0.0, []
        for t in reversed(range(m)):
            delta = row[t] + gamma * (values[t + 1] if t + 1 < m else 0.0) - values[t]
            later = delta + gamma * lam * later
            reversed_.append(later)
        advantages.append(np.array(reversed_[::-1]))
        returns.append(advantages[-1] + values)
    flat = np.concatenate(advantages)
    for i, m in enumerate(LENGTHS):
        np.testing.assert_allclose(found["advantages"][i, :m], (advantages[i] - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8), atol=5e-7)
        np.testing.assert_allclose(found["returns"][i, :m], returns[i], atol=5e-7)
        assert not found["advantages"][i, m:].any()
    assert metrics["completions/clipped_ratio"] == 0.5


@pytest.mark.parametrize("changes", [dict(), dict(epsilon_high=0.4, dual_clip=1.2), dict(cliprange_value=None, entropy_coef=0.05)], ids=str)
def test_loss(batch, changes):
    with jax.enable_x64(True):
        config = config_of(vf_coef=0.3, **changes)
        c, there = config.algorithm, batch["there"]
        draw = lambda scale: scale * RNG.normal(size=there.shape) * there
        columns = {"old_logps": np.float64(batch["old_logps"]), "advantages": draw(1), "returns": draw(1), "old_values": draw(1)}
        logps, values, entropy = columns["old_logps"] + draw(0.3), columns["old_values"] + draw(0.3), np.abs(draw(1))
        full = {name: jnp.asarray(x) for name, x in (batch | columns | {"sampling_logps": columns["old_logps"]}).items()}
        lengths = answer_lengths(full, 1)
        scores = Scores(lengths, lengths, {"logp": logps, "value": values, "entropy": entropy}, {})
        terms, metrics, carry = make(config, tiny.family("llama").model).objective(scores, full, {"updates": jnp.zeros((), jnp.int32)})
        total = sum(float(term.weight * term.sum / term.count) for term in terms.values())
    policy, value, bonus = [], [], []
    for i, m in enumerate(LENGTHS):
        for t in range(m):
            ratio, a = np.exp(logps[i, t] - columns["old_logps"][i, t]), columns["advantages"][i, t]
            loss = max(-a * ratio, -a * np.clip(ratio, 1 - c.epsilon, 1 + (c.epsilon_high or c.epsilon)))
            policy.append(min(loss, -c.dual_clip * a) if c.dual_clip and a < 0 else loss)
            v, old, goal = values[i, t], columns["old_values"][i, t], columns["returns"][i, t]
            held = v if c.cliprange_value is None else np.clip(v, old - c.cliprange_value, old + c.cliprange_value)
            value.append(0.5 * max((v - goal) ** 2, (held - goal) ** 2))
            bonus.append(entropy[i, t])
    wanted = np.mean(policy) + 0.3 * np.mean(value) - c.entropy_coef * np.mean(bonus)
    assert total == pytest.approx(wanted, rel=1e-10) and carry["updates"] == 1


def test_what_a_server_wrote_is_corrected_for_its_lag(batch):
    config = config_of()
    full = {name: jnp.asarray(x) for name, x in (batch | {name: batch["old_values"] for name in ("advantages", "returns")}).items()}
    full["sampling_logps"] = full["old_logps"] - jnp.log(1.5) * full["there"]
    lengths = answer_lengths(full, 1)
    scores = Scores(lengths, lengths, {"logp": full["old_logps"], "value": full["old_values"], "entropy": full["old_values"]}, {})

    def policy_loss(server, cap):
        config.generation.server, config.generation.importance_cap = server, cap
        return float(make(config, tiny.family("llama").model).objective(scores, full, {"updates": jnp.ones((), jnp.int32)})[0]["policy"].sum)

    own = policy_loss("", 3.0)
    assert own != 0 and policy_loss("vllm:http://host", 3.0) == pytest.approx(1.5 * own, rel=1e-5)
    assert policy_loss("vllm:http://host", 1.2) == pytest.approx(1.2 * own, rel=1e-5)


def test_the_policy_is_held_while_the_critic_warms_up(batch):
    config = config_of(critic_warmup=2)
    full = {name: jnp.asarray(x) for name, x in (batch | {name: batch["old_values"] for name in ("advantages", "returns")}).items()}
    lengths = answer_lengths(full, 1)
    scores = Scores(lengths, lengths, {name: full["old_values"] for name in ("logp", "value", "entropy")}, {})
    objective = make(config, tiny.family("llama").model).objective
    sums = [float(objective(scores, full, {"updates": jnp.asarray(n)})[0]["policy"].sum) for n in (0, 1, 2)]
    assert sums[0] == sums[1] == 0 != sums[2]


def test_running_standardisation_and_the_adaptive_coefficient():
    c = config_of(standardize_rewards=True, reward_clip=2.0, kl_target=4.0, kl_horizon=100).algorithm
    first, second = RNG.normal(3, 2, (5, 2)), RNG.normal(3, 2, (6, 1))
    _, running = ppo.clip_and_scale(first, c, [0, 0.0, 0.0])
    found, _ = ppo.clip_and_scale(second, c, running)
    every = np.concatenate([first.ravel(), second.ravel()])
    np.testing.assert_allclose(found, np.clip((second - every.mean()) / (every.std(ddof=1) + 1e-8), -2, 2))
    assert ppo.adapted(0.1, 8.0, 50, c) == pytest.approx(0.1 * (1 + 0.2 * 50 / 100))
    assert ppo.adapted(0.1, 3.6, 50, c) == pytest.approx(0.1 * (1 - 0.1 * 50 / 100))


@pytest.mark.parametrize("changes, words", [
    (dict(reward_funcs=()), "reward_funcs is empty"),
    (dict(kl_estimator="k4"), "kl_estimator 'k4' is not known"),
    (dict(reward_weights=(1.0, 2.0)), "one number for each of reward_funcs"),
    (dict(num_mini_batches=0), "num_mini_batches is 0"),
    (dict(max_turns=0), "max_turns is 0"),
    (dict(reward_timeout=0.0), "reward_timeout is 0.0"),
    (dict(dual_clip=0.5), "dual_clip is 0.5"),
    (dict(reward_clip=-1.0), "reward_clip is -1.0"),
    (dict(ptx_coef=0.5), "algorithm.ptx_coef is set and config.data.ptx.path is not"),
], ids=str)  # fmt: skip
def test_settings_without_sense_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        make(config_of(**changes), tiny.family("llama").model)
