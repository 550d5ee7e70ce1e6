"""What a rollout's rewards come to: its metrics, and the columns that updates read, where several settings meet."""

from types import SimpleNamespace

import numpy as np
import pytest

from aligner.data.templates import Encoded
from aligner.generation.engine import Completion, Prompt
from aligner.rl import rollouts
from aligner.rl.prompts import Item
from configs import common
from tests.models import tiny

LONGEST = 6
LENGTHS = np.array([[4, 6, 3], [6, 5, 2]])  # those of LONGEST tokens were cut
REWARDS = np.array([[[0.3, 1.0], [1.4, np.nan], [np.nan, np.nan]], [[2.0, 0.0], [-1.0, 4.0], [0.5, 1.0]]])


def rollout(algorithm, rewards=REWARDS, columns=None, **settings):
    """(batch, metrics, host state) of two prompts with three answers each; `columns` [2][3] hold numbers of every token."""
    config = tiny.config()
    config.algorithm = getattr(common, algorithm)()
    config.algorithm.update(dict(reward_funcs=("math", "format")[: rewards.shape[-1]], num_generations=3, beta=0.0) | settings)
    config.generation.max_new_tokens = LONGEST
    prompt = np.array([3], np.int32)
    groups = []
    for row, worth in zip(LENGTHS, rewards):
        answers = [Completion(np.full(m, 5, np.int32), np.full(m, -1, np.float32), bool(m < LONGEST)) for m in row]
        groups.append(rollouts.Group(Item(0, "x", Encoded(prompt, ()), Prompt(prompt), {}), answers, ["x"] * 3, worth))
    batch = rollouts.lay_out(groups, tiny.family("llama").model, True, 8)
    batch |= {name: rollouts.at_tokens(column, batch["score_from"].shape[1]) for name, column in (columns or {}).items()}
    host = {"beta": 0.0, "running": [0, 0.0, 0.0]}
    return rollouts.learnable(config, groups, None, batch, np.ones(rewards.shape[-1]), host)


def test_deviations_are_those_of_the_whole_batch():
    """TRL's reward_std and rewards/NAME/std: unbiased, over all answers that have a value."""
    _, found, _ = rollout("grpo")
    total, first = [1.3, 1.4, 2.0, 3.0, 1.5], [0.3, 1.4, 2.0, -1.0, 0.5]
    assert found["reward_std"] == pytest.approx(np.std(total, ddof=1))
    assert found["rewards/math/std"] == pytest.approx(np.std(first, ddof=1))
    assert found["rewards/format/std"] == pytest.approx(np.std([1.0, 0.0, 4.0, 1.0], ddof=1))
    assert found["reward"] == pytest.approx(np.mean(total)) and found["frac_reward_zero_std"] == 0


def test_lengths_of_answers_that_ended_by_themselves():
    """TRL's completions/*_terminated_length; 0 where none did."""
    lengths = lambda found: [found[f"completions/{which}_terminated_length"] for which in ("mean", "min", "max")]
    assert lengths(rollout("grpo")[1]) == [3.5, 2, 5]
    cut = rollouts.report(np.zeros((1, 2)), np.zeros((1, 2, 0)), np.full((1, 2), 6), np.zeros((1, 2), bool), common.ppo())
    assert lengths(cut) == [0, 0, 0] and cut["completions/clipped_ratio"] == 1


def test_two_rewards_of_one_short_name_have_their_own_metrics():
    """A reward model's and a cost model's folder are both called export: the costs stood there as the rewards."""
    names = ("runs/helpful/export", "runs/short/export")
    _, found, _ = rollout("grpo", reward_funcs=names)
    assert [found[f"rewards/{name}/mean"] for name in names] == pytest.approx([np.nanmean(REWARDS[..., k]) for k in (0, 1)])


@pytest.mark.parametrize("scale,share", [("group", 0.5), ("batch", 0.0)])
def test_rewards_without_spread_are_of_what_they_are_scaled_by(scale, share):
    """TRL's frac_reward_zero_std: of the groups, or of the batch."""
    rewards = np.array([[[1.0]] * 3, [[1.0], [2.0], [1.0]]])
    assert rollout("grpo", rewards, scale_rewards=scale)[1]["frac_reward_zero_std"] == share


@pytest.mark.parametrize("spread,share", [(1.0, 0.0), (0.0, 1.0)])
def test_under_gdpo_rewards_without_spread_are_of_the_batch_after_each_was_normalised(spread, share):
    """One number for all, as TRL has it; a group without spread counted for itself."""
    rewards = np.array([[[1.0, 2.0]] * 3, [[1.0, 2.0], [1.0, 2.0 + spread], [1.0, 2.0]]])
    batch, found, _ = rollout("grpo", rewards, multi_objective="gdpo")
    assert found["frac_reward_zero_std"] == share and (batch["advantages"].any() == bool(spread))


@pytest.mark.parametrize("worth,kept", [([1.0, 1.0, np.nan], False), ([np.nan] * 3, False), ([0.1] * 3, False), ([1.0, np.nan, 0.0], True)])
def test_only_answers_of_a_known_worth_tell_whether_a_group_is_kept(worth, kept, monkeypatch):
    """Dynamic sampling: what no reward function valued is worth nothing that is known, not 0."""
    ids = iter(range(10))
    write = lambda writer, items, places, n: [rollouts.Group(next(ids), [], [], np.array(worth)[:, None]) for _ in places]
    monkeypatch.setattr(rollouts, "write", write)
    writer, prompts = SimpleNamespace(weights=np.ones(1)), SimpleNamespace(item=lambda place: place)
    groups, place = rollouts.collect(writer, prompts, 0, 2, 3, tries=1)
    assert (len(groups), place) == ((2, 2) if kept else (2, 4))


def test_a_share_of_the_surest_tokens_is_one_of_those_that_are_learnt():
    """Answers that were cut are not; were all, nothing is learnt."""
    entropies = [[np.arange(m) + 10.0 * (m == LONGEST) + j for j, m in enumerate(row)] for row in LENGTHS]
    options = dict(columns={"old_entropy": entropies}, mask_truncated_completions=True, top_entropy_quantile=0.25)
    batch, _, _ = rollout("grpo", **options)
    learnt = np.concatenate([x for row in entropies for x in row if len(x) < LONGEST])
    acts = (batch["sure"] == 0) & (batch["learn"] > 0)
    assert acts.sum() == np.sum(learnt >= np.quantile(learnt, 0.75))


def test_the_penalty_for_length_is_one_more_reward_where_each_is_normalised_apart():
    batch, _, _ = rollout("grpo", multi_objective="gdpo", overlong_buffer=2, overlong_penalty=0.5)
    normal = lambda x: (x - np.nanmean(x, 1, keepdims=True)) / (np.nanstd(x, 1, ddof=1, keepdims=True) + 1e-4)
    penalty = np.array([[0.0, -1.0, np.nan], [-1.0, -0.5, 0.0]])
    total = sum(w * np.nan_to_num(normal(x)) for w, x in ((1, REWARDS[..., 0]), (0.5, penalty)))
    total[1] += normal(REWARDS[1:, :, 1])[0]  # the first group knows but one of the second function's
    total[0, 2] = np.nan
    wanted = np.nan_to_num((total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4))
    for row in range(2):
        firsts = np.cumsum([0, *LENGTHS[row][:-1]])
        np.testing.assert_allclose(batch["advantages"][row, firsts], wanted[row], rtol=1e-5)


@pytest.mark.parametrize("environment,turns,lost", [("", 4, 5 / 6), ("games:Game", 1, 5 / 6), ("games:Game", 2, 0.0)])
def test_an_answer_is_too_long_by_the_longest_that_can_be(environment, turns, lost):
    """Of all its turns, where it has several: an episode lost reward for two turns of which none was long."""
    names = () if environment else ("math",)
    settings = dict(reward_funcs=names, environment=environment, max_turns=turns, overlong_buffer=2, overlong_penalty=2.0)
    assert rollout("grpo", np.ones((2, 3, 1)), **settings)[1]["reward"] == pytest.approx(1 - lost)


def test_an_answer_whose_worth_is_not_known_does_not_move_what_rewards_are_standardised_by():
    zeros = [[np.zeros(m) for m in row] for row in LENGTHS]
    columns = {"old_values": zeros, "old_logps": zeros}
    batch, _, host = rollout("ppo", REWARDS[..., :1], columns, standardize_rewards=True, lam=1.0)
    known = np.array([0.3, 1.4, 2.0, -1.0, 0.5])
    count, mean, squares = host["running"]
    assert (count, mean) == (5, pytest.approx(known.mean())) and squares == pytest.approx(np.sum((known - known.mean()) ** 2))
    lasts = np.cumsum(LENGTHS[0]) - 1
    np.testing.assert_allclose(batch["returns"][0, lasts], [*((known - known.mean()) / known.std(ddof=1))[:2], 0], rtol=1e-5, atol=1e-7)


def test_nothing_is_learnt_from_an_answer_whose_worth_is_not_known():
    """Nor is it among the tokens over which advantages are normalised."""
    batch, _, _ = rollout("reinforce_plus_plus")
    known = np.repeat([1.3, 1.4, 2.0, 3.0, 1.5], [4, 6, 6, 5, 2])
    wanted = (known - known.mean()) / np.sqrt(known.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(batch["advantages"][batch["advantages"] != 0], wanted, rtol=1e-5)
    assert not batch["advantages"][0, 10:].any()


def test_an_answer_whose_worth_is_not_known_is_worth_as_much_as_the_others():
    """A raw 0, beside what a reward model gives, would make it the best or the worst of all."""
    zeros = [[np.zeros(m) for m in row] for row in LENGTHS]
    batch, _, _ = rollout("ppo", REWARDS[..., :1] - 8, {"old_values": zeros, "old_logps": zeros}, lam=1.0)
    lasts = np.cumsum(LENGTHS[0]) - 1
    np.testing.assert_allclose(batch["returns"][0, lasts], [-7.7, -6.6, np.mean([0.3, 1.4, 2.0, -1.0, 0.5]) - 8], rtol=1e-6)
