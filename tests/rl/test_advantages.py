"""Advantages against their definitions, loops over answers and tokens."""

import numpy as np
import pytest

from aligner.rl import advantages as adv

RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(5, 4))


def test_gae_is_the_discounted_sum_of_errors():
    rewards, values, gamma, lam = RNG.normal(size=9), RNG.normal(size=9), 0.97, 0.9
    errors = [rewards[t] + gamma * (values[t + 1] if t < 8 else 0) - values[t] for t in range(9)]
    wanted = [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, 9)) for t in range(9)]
    np.testing.assert_allclose(adv.gae(rewards, values, gamma, lam), wanted, rtol=1e-12)
    np.testing.assert_allclose(adv.gae(rewards, values, 1.0, 1.0) + values, np.cumsum(rewards[::-1])[::-1], rtol=1e-12)


def test_groups():
    for i, group in enumerate(REWARDS):
        np.testing.assert_allclose(adv.grpo(REWARDS)[i], (group - group.mean()) / (group.std(ddof=1) + 1e-4))
        np.testing.assert_allclose(adv.grpo(REWARDS, "none")[i], group - group.mean())
        for j, reward in enumerate(group):
            assert adv.rloo(REWARDS)[i, j] == pytest.approx(reward - np.delete(group, j).mean())
    scaled = (REWARDS - REWARDS.mean(1, keepdims=True)) / (REWARDS.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(adv.grpo(REWARDS, "batch"), scaled)


def test_a_group_knows_nothing_of_other_prompts():
    changed = REWARDS.copy()
    changed[1:] += RNG.normal(size=(4, 4))
    for make in (adv.grpo, adv.rloo):
        np.testing.assert_array_equal(make(changed)[0], make(REWARDS)[0])


def test_batches():
    np.testing.assert_allclose(adv.reinforce(REWARDS), REWARDS - REWARDS.mean())
    centred = REWARDS - REWARDS.mean(1, keepdims=True)
    np.testing.assert_allclose(adv.reinforce_baseline(REWARDS), (centred - centred.mean()) / (centred.std(ddof=1) + 1e-4))
    np.testing.assert_allclose(adv.remax(REWARDS, REWARDS[:, 0]), REWARDS - REWARDS[:, :1])


def test_answers_without_a_reward_are_left_out():
    each = np.stack([REWARDS, 2 * REWARDS], axis=-1)
    each[0, 0], each[0, 1, 1] = np.nan, np.nan
    total = adv.combine(each, np.array([1.0, 0.5]))
    assert np.isnan(total[0, 0]) and total[0, 1] == pytest.approx(REWARDS[0, 1]) and total[1, 0] == pytest.approx(2 * REWARDS[1, 0])
    rest = total[0, 1:]
    np.testing.assert_allclose(adv.grpo(total)[0], [0, *((rest - rest.mean()) / (rest.std(ddof=1) + 1e-4))])
    np.testing.assert_allclose(adv.rloo(total)[0, 1], rest[0] - rest[1:].mean())
    assert adv.rloo(total)[0, 0] == 0


def test_whitening():
    mask = RNG.random((5, 4)) < 0.7
    found = adv.whiten(REWARDS, mask)
    there = REWARDS[mask]
    np.testing.assert_allclose(found[mask], (there - there.mean()) / np.sqrt(there.var(ddof=1) + 1e-8))
    np.testing.assert_allclose(adv.whiten(REWARDS, mask, shift_mean=False)[mask], found[mask] + there.mean())
    assert (found[~mask] == 0).all()


def test_the_penalty_for_length_counts_tokens():
    np.testing.assert_allclose(adv.overlong_penalty(np.array([1, 80, 90, 100]), 100, 20), [0, 0, -0.5, -1])
