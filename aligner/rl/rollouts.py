"""A rollout: prompts answered by the policy, what the answers are worth, and both as a batch to learn from.

A rollout is made of groups, all answers to one prompt; a group is one row of the batch, its prompt computed once for all its answers.
Everything here is on the host and a function of (parameters, seed, place in the prompts).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from aligner import arrays
from aligner.algorithms import ppo
from aligner.algorithms.grpo import PENALISED, longest
from aligner.console import say
from aligner.data import layout
from aligner.generation.engine import Completion, bucket
from aligner.losses.policy_gradient import kl
from aligner.models.pictures import fill
from aligner.rl import advantages as adv
from aligner.rl import rewards
from aligner.rl.engines import RolloutEngine
from aligner.rl.environments import Environment, play
from aligner.rl.prompts import Item, Prompts
from aligner.types import Model, UserError


class Group(NamedTuple):
    """The answers to one prompt, their texts, and what each is worth to each reward function, [n, K], NaN where it gave None."""

    item: Item
    answers: list[Completion]
    texts: list[str]
    rewards: np.ndarray


class Writer(NamedTuple):
    """What writes and values answers.

    Attributes:
        engine: what writes, with the policy's parameters.
        detokenize: token ids -> text.
        rewards: reward functions.
        weights: [K] of them.
        timeout: seconds for each.
        environment: makes an episode's environment, where answers have several turns; its rewards are added as one more.
        turns: of the policy, at most.
        tokenize: text -> token ids, for what the environment says.
    """

    engine: RolloutEngine
    detokenize: Callable[[np.ndarray], str]
    rewards: list[rewards.Reward]
    weights: np.ndarray
    timeout: float
    environment: Callable[[], Environment] | None = None
    turns: int = 1
    tokenize: Callable[[str], np.ndarray] | None = None


def write(writer: Writer, items: Sequence[Item], ids: Sequence[int], n: int) -> list[Group]:
    """Answer every prompt n times, and value the answers; `ids` are the prompts' numbers in the run."""
    earned = np.zeros((len(items), n, 0))
    if writer.environment:
        found, worth = play(writer.engine, writer.environment, items, ids, n, writer.turns, writer.tokenize, writer.detokenize)
        earned = worth[..., None]
    else:
        found = writer.engine.generate([item.prompt for item in items], n, ids)
    texts = [[writer.detokenize(answer.tokens) for answer in answers] for answers in found]
    prompts = [item.text for item in items for _ in range(n)]
    names = dict.fromkeys(name for item in items for name in item.columns)
    columns = {name: [item.columns.get(name) for item in items for _ in range(n)] for name in names}
    values = rewards.value(writer.rewards, prompts, [text for of_prompt in texts for text in of_prompt], columns, writer.timeout)
    values = np.concatenate([values.reshape(len(items), n, len(writer.rewards)), earned], axis=-1)
    return [Group(*group) for group in zip(items, found, texts, values)]


def joined(first: Sequence[Group], second: Sequence[Group]) -> list[Group]:
    """The answers of both to the same prompts, the first's before the second's."""
    return [
        Group(a.item, a.answers + b.answers, a.texts + b.texts, np.concatenate([a.rewards, b.rewards])) for a, b in zip(first, second)
    ]


def collect(writer: Writer, prompts: Prompts, position: int, count: int, n: int, tries: int = 0) -> tuple[list[Group], int]:
    """Groups for `count` prompts from `position` on, and where the next rollout starts.

    With `tries`, prompts whose answers are all worth the same are replaced by the next ones so many times (dynamic sampling, DAPO): there
    is nothing to learn from them.
    """
    kept: list[Group] = []
    spare: list[Group] = []
    for left in range(tries, -1, -1):
        ids = range(position, position + count - len(kept))
        position = ids.stop
        found = write(writer, [prompts.item(place) for place in ids], ids, n)
        tells = [tries == 0 or _differ(adv.combine(group.rewards, writer.weights)) for group in found]
        kept += [group for group, good in zip(found, tells) if good]
        spare += [group for group, good in zip(found, tells) if not good]
        if len(kept) == count or not left:
            break
    return kept + spare[: count - len(kept)], position


def _differ(worth: np.ndarray) -> bool:
    """Whether two answers, of those whose worth is known, are worth something else."""
    return len(np.unique(worth[~np.isnan(worth)])) > 1


def lay_out(groups: Sequence[Group], model: Model, shared: bool, multiple: int) -> dict[str, np.ndarray]:
    """The groups as a batch, a row each, with `sampling_logps` [B,S] and `learn` [B,S]."""
    encoded = []
    for group in groups:
        answers, own = (tuple(getattr(answer, name) for answer in group.answers) for name in ("tokens", "written"))
        encoded.append(group.item.encoded._replace(answers=answers, scored=own))
    T, S, I = (max(sizes) for sizes in zip(*(layout.shape_of(one, shared) for one in encoded)))
    T, S = (layout.round_up(bucket(size, 8), multiple) for size in (T, S))  # the update is what costs: little is padded
    rows = []
    for group, one in zip(groups, encoded):
        row = layout.pair_row(one, T, S, I, model.media, shared, group.item.row)
        fill(row, group.item.prompt.pictures, model.media)
        rows.append(row)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch["sampling_logps"] = at_tokens([[answer.logps[answer.written] for answer in group.answers] for group in groups], S)
    batch["learn"] = (batch["score_segment"] > 0).astype(np.float32)
    return batch


def at_tokens(values: Sequence[Sequence[np.ndarray]], S: int) -> np.ndarray:
    """Numbers at every token of every answer, [B][R][m], as a column [B,S]: scored positions stand in the order of the answers."""
    column = np.zeros((len(values), S), np.float32)
    for row, answers in zip(column, values):
        flat = np.concatenate(answers)
        row[: len(flat)] = flat
    return column


def of_answers(column: np.ndarray, groups: Sequence[Group]) -> list[list[np.ndarray]]:
    """The inverse of `at_tokens`, in float64."""
    cuts = [np.cumsum([answer.written.sum() for answer in group.answers]) for group in groups]
    return [np.split(np.asarray(row[: cut[-1]], np.float64), cut[:-1]) for row, cut in zip(column, cuts)]


def asked(rollout: Callable, batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """`Algorithm.rollout` of the whole batch, so many rows at once."""
    parts = [rollout({name: x[start : start + rows] for name, x in batch.items()}) for start in range(0, len(batch["tokens"]), rows)]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def worth(config: ConfigDict, groups: Sequence[Group], weights: np.ndarray) -> np.ndarray:
    """What answers come to [B, n]: the rewards together, less the penalty for their length; NaN where no reward gave a value."""
    c, lengths = config.algorithm, np.array([[answer.written.sum() for answer in group.answers] for group in groups])
    penalty = c.overlong_penalty * adv.overlong_penalty(lengths, longest(config), c.overlong_buffer)
    return adv.combine(np.stack([group.rewards for group in groups]), weights) + penalty


def learnable(
    config: ConfigDict, groups: Sequence[Group], greedy: np.ndarray | None, batch: dict[str, np.ndarray], weights: np.ndarray, host: dict
) -> tuple[dict[str, np.ndarray], dict[str, float], dict]:
    """The batch with `advantages` (and PPO's `returns`), the rollout's metrics by TRL's names, and the host's state moved on.

    Args:
        config: the whole config.
        groups: the answers, row by row of the batch.
        greedy: [B] what the greedy answers are worth, for ReMax.
        batch: with what the algorithm's `rollout` gave.
        weights: [K] of the reward functions.
        host: what is kept from rollout to rollout: `beta`, `running`.
    """
    c = config.algorithm
    S, most = batch["score_from"].shape[1], longest(config)
    lengths = np.array([[answer.written.sum() for answer in group.answers] for group in groups])
    stopped = np.array([[answer.stopped for answer in group.answers] for group in groups])
    each = np.stack([group.rewards for group in groups])  # [B, n, K]
    total = worth(config, groups, weights)
    found = report(total, each, lengths, stopped, c)
    if c.get("multi_objective") == "gdpo":  # of what is normalised, all or nothing, as TRL's
        found["frac_reward_zero_std"] = without_spread(_apart(c, total, each, weights, lengths, most), None)
    drift = None
    if "reference_logps" in batch:
        estimator = c.get("kl_estimator", "k1")
        drift = of_answers(np.asarray(kl(batch["old_logps"].astype(np.float64), batch["reference_logps"], estimator)), groups)
        found["objective/kl"] = float(np.mean([np.sum(one) for answers in drift for one in answers]))
        if c.name in PENALISED:  # where the answer is learnt from, as TRL's RLOO: others pay for nothing
            learnt = stopped | (not c.mask_truncated_completions)
            paid = np.array([[np.sum(one) for one in answers] for answers in drift]) * learnt
            found["kl"] = float(np.sum(paid) / max(np.sum(lengths * learnt), 1))
    if c.get("cost_funcs"):
        total, found, host = bounded(c, total, each, found, host)
    if c.name == "on_policy_distillation":
        columns = {}
    elif c.name in ("online_dpo", "nash_md"):
        columns = pairs(c, total)
    elif c.name == "ppo":
        columns, host = _ppo(c, total, stopped, drift, batch, groups, S, host)
    else:
        if drift is not None and c.name in ("rloo", "reinforce", "remax"):
            total = total - c.beta * paid
            found["frac_reward_zero_std"] = without_spread(total, 1)
        columns = {"advantages": _per_answer(c, total, each, weights, greedy, drift, lengths, most, S)}
    batch = {**batch, **columns}
    if c.mask_truncated_completions:
        cut = [[np.full(m, float(end)) for m, end in zip(row, ends)] for row, ends in zip(lengths, stopped)]
        batch["learn"] = batch["learn"] * at_tokens(cut, S)
    if c.get("top_entropy_quantile", 1.0) < 1:
        entropies = batch["old_entropy"][batch["learn"] > 0]  # of the tokens that are learnt, which may be none
        least = np.quantile(entropies, 1 - c.top_entropy_quantile) if len(entropies) else 0.0
        batch["sure"] = (batch["old_entropy"] < least).astype(np.float32)
    batch.pop("old_entropy", None)
    return batch, found, host


def _per_answer(c: ConfigDict, total, each, weights, greedy, drift, lengths, most: int, S: int) -> np.ndarray:
    """Advantages [B,S] of the algorithms without a critic."""
    if c.name == "reinforce_plus_plus":  # the KL from each token on, normalised over all tokens of the batch
        at = lambda i, j, m: np.full(m, np.nan_to_num(total[i, j])) - (c.beta * adv.discounted(drift[i][j], 1.0) if drift else 0.0)
        tokens = [[at(i, j, m) for j, m in enumerate(row)] for i, row in enumerate(lengths)]
        flat = at_tokens(tokens, S).astype(np.float64)
        there = at_tokens([[np.full(m, known) for m, known in zip(*row)] for row in zip(lengths, ~np.isnan(total))], S) > 0
        return adv.whiten(flat, there).astype(np.float32)
    match c.name:
        case "rloo":
            values = adv.rloo(total)
        case "reinforce":
            values = adv.reinforce(total)
        case "reinforce_plus_plus_baseline":
            values = adv.reinforce_baseline(total)
        case "remax":
            values = adv.remax(total, greedy)
        case _ if c.multi_objective == "gdpo":
            values = adv.whiten_batch(_apart(c, total, each, weights, lengths, most))
        case _:
            values = adv.grpo(total, c.scale_rewards)
    return at_tokens([[np.full(m, v) for m, v in zip(*row)] for row in zip(lengths, values)], S)


def _apart(c: ConfigDict, total, each, weights, lengths, most: int) -> np.ndarray:
    """GDPO's rewards [B,n] before they are normalised over the batch; the penalty for length is one more function."""
    penalty = np.where(np.isnan(total), np.nan, adv.overlong_penalty(lengths, most, c.overlong_buffer))
    return adv.normalised_apart(np.concatenate([each, penalty[..., None]], axis=-1), np.append(weights, c.overlong_penalty))


def pairs(c: ConfigDict, total: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of algorithms that compare a prompt's answers by their worth [B,n]: `chosen` and `rejected` [B,1,n] mark the best and the
    worst, none where all are worth the same or one is not known; `by_rival` what another than the policy wrote; of Nash-MD `preference`
    [B,1], how likely the policy's answer is to be preferred to its rival's, one half where that is not known."""
    known = ~np.isnan(total).any(axis=1) & (np.ptp(total, axis=1) > 0)
    mark = lambda places: ((np.arange(total.shape[1]) == places[:, None]) & known[:, None])[:, None].astype(np.float32)
    filled = np.nan_to_num(total)
    by_rival = np.broadcast_to(np.arange(total.shape[1]) == (1 if rivalry(c) else -1), total.shape)[:, None].astype(np.float32)
    columns = {"chosen": mark(filled.argmax(axis=1)), "rejected": mark(filled.argmin(axis=1)), "by_rival": by_rival}
    if c.name == "nash_md":
        columns["preference"] = 1 / (1 + np.exp(np.nan_to_num(total[:, 1:] - total[:, :1])))
    return columns


def rivalry(c: ConfigDict) -> float:
    """The reference's share in who writes the second of two answers: 1 in XPO, Nash-MD's coefficient; 0 where the policy writes both."""
    return 1.0 if c.get("xpo_alpha") else c.get("mixture_coef", 0.0)


def bounded(c: ConfigDict, total: np.ndarray, each: np.ndarray, found: dict, host: dict) -> tuple[np.ndarray, dict, dict]:
    """PPO-Lagrangian (Safe RLHF, section 3.3): rewards less the multiplier times the costs, and the multiplier moved on.

    The costs stand after the rewards; one critic learns the sum, where Safe RLHF has two. A cost of None takes nothing off the reward, and
    has no part in the mean that moves the multiplier, which stays where no cost is known.
    """
    start = len(c.reward_funcs)
    costs = adv.combine(each[..., start : start + len(c.cost_funcs)], np.ones(len(c.cost_funcs)))
    multiplier = moved = host["lagrangian"]
    found = {**found, "lagrangian": multiplier}
    if not np.isnan(costs).all():
        found["cost"] = float(np.nanmean(costs))
        moved = min(multiplier * float(np.exp(c.lagrangian_lr * (found["cost"] - c.cost_limit))), c.lagrangian_max)
    return (total - multiplier * np.nan_to_num(costs)) / (1 + multiplier), found, {**host, "lagrangian": moved}


def _ppo(c: ConfigDict, total, stopped, drift, batch, groups, S: int, host: dict) -> tuple[dict[str, np.ndarray], dict]:
    """PPO's columns: the reward at the last token less the KL at every token, GAE, whitened advantages."""
    scores, running = ppo.clip_and_scale(total, c, host["running"])
    scores = np.where(np.isnan(scores), adv.mean(scores, None), scores)  # of no known worth: as much as the others, on average
    if c.missing_eos_penalty is not None:
        scores = scores - c.missing_eos_penalty * ~stopped
    values = of_answers(batch["old_values"], groups)
    there = batch["score_segment"] > 0
    penalty = lambda i, j, m: np.zeros(m) if drift is None else -host["beta"] * drift[i][j]
    tokens = [[penalty(i, j, len(v)) for j, v in enumerate(row)] for i, row in enumerate(values)]
    for row, ends in zip(tokens, scores):
        for one, score in zip(row, ends):
            one[-1] += score
    if c.whiten_rewards:
        tokens = of_answers(adv.whiten(at_tokens(tokens, S).astype(np.float64), there, shift_mean=False), groups)
    advantages = [[adv.gae(r, v, c.gamma, c.lam) for r, v in zip(*row)] for row in zip(tokens, values)]
    returns = [[a + v for a, v in zip(*row)] for row in zip(advantages, values)]
    whitened = adv.whiten(at_tokens(advantages, S).astype(np.float64), there).astype(np.float32)
    if drift is not None:
        answers = [np.sum(one) for row in drift for one in row]
        host = {**host, "beta": ppo.adapted(host["beta"], float(np.mean(answers)), len(answers), c)}
    return {"advantages": whitened, "returns": at_tokens(returns, S)}, {**host, "running": running}


def report(total: np.ndarray, each: np.ndarray, lengths: np.ndarray, stopped: np.ndarray, c: ConfigDict) -> dict[str, float]:
    """TRL's metrics of a rollout."""
    ended = lengths[stopped] if stopped.any() else np.zeros(1)
    found = {
        "reward": mean_reward(total),
        "reward_std": adv.std(total, None).item(),
        "frac_reward_zero_std": without_spread(total, None if c.get("scale_rewards") == "batch" else 1),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - stopped.mean()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
    }
    names = [str(name) for name in (*c.reward_funcs, *c.get("cost_funcs", ()), *(("environment",) if c.environment else ()))]
    short = [name.rpartition(":")[2].rstrip("/").rpartition("/")[2] for name in names]
    for k, name in enumerate(names):
        label = short[k] if short.count(short[k]) == 1 else name  # two exports of runs: of each its whole path
        if not np.isnan(each[..., k]).all():
            found |= {f"rewards/{label}/mean": float(np.nanmean(each[..., k])), f"rewards/{label}/std": adv.std(each[..., k], None).item()}
    return found


def without_spread(total: np.ndarray, axis: int | None) -> float:
    """TRL's share of groups (axis 1), or of the batch (None), whose answers are all worth the same: not those of which fewer than two are
    known, but where a group is one answer."""
    known = np.sum(~np.isnan(total), axis=axis, keepdims=True)
    return float(np.mean((adv.std(total, axis) < 1e-9) & ((known > 1) | (total.shape[1] == 1))))


def mean_reward(total: np.ndarray) -> float:
    """Mean over the answers that are worth something; where every reward gave None for all of them that is said, and 0."""
    if np.isnan(total).all():
        say(f"every reward gave None for all of {total.size} answers, so that there is nothing to learn from or to compare")
        return 0.0
    return float(np.nanmean(total))


def minibatch(batch: Mapping[str, np.ndarray], seed: int, iteration: int, update: int, updates: int) -> dict[str, np.ndarray]:
    """The rows of one update: every pass over a rollout deals its groups out anew.

    Args:
        batch: of the whole rollout.
        seed, iteration: of the run, and which rollout it is.
        update: which update of the rollout.
        updates: how many a pass has.
    """
    rows = len(batch["tokens"])
    order = np.random.default_rng([seed, iteration, update // updates]).permutation(rows)
    part = order.reshape(updates, -1)[update % updates]
    return {name: x[part] for name, x in batch.items()}


# ---- kept on disk, so that a run that was killed between two updates of a rollout goes on with the same numbers ----------------------


def save(folder: Path, iteration: int, batch: Mapping[str, np.ndarray], host: Mapping[str, Any], found: Mapping[str, float]) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays.write(folder / f"{iteration}.npz", __rest__=json.dumps([host, found]), **batch)


def load(folder: Path, iteration: int) -> tuple[dict[str, np.ndarray], dict, dict]:
    """(batch, host state, metrics) of a rollout."""
    path = folder / f"{iteration}.npz"
    batch = arrays.read(path)
    if batch is None:
        raise UserError(
            f"{path} is missing or damaged, and the newest checkpoint stands in the middle of that rollout; "
            "remove that checkpoint's folder to go on from the one before"
        )
    return batch, *json.loads(str(batch.pop("__rest__")))
