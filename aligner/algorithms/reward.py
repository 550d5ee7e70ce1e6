"""Reward models: a score for every answer, learnt from pairs, ranked lists, or given scores."""

import difflib

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.likelihood import make_scorer
from aligner.losses import reward
from aligner.types import Algorithm, Batch, Max, Mean, Min, Model, Scores, Term, UserError

# Loss type -> the kind of sample it takes.
NEEDS = {"bradley_terry": "preference_last", "plackett_luce": "ranked_last", "mse": "scored_last"}


def make(config: ConfigDict, model: Model) -> Algorithm:
    """A reward model by `config.algorithm.loss_type`; see `configs.common.reward` for its settings.

    Metrics are TRL's. Accuracy and margin are over all pairs of answers of a group, the better against the worse (ties are no accuracy):
    by their order, or with `mse` by their given scores.
    """
    c = config.algorithm
    check(config, model)
    if c.loss_type not in NEEDS:
        near = difflib.get_close_matches(str(c.loss_type), NEEDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config.algorithm.loss_type {c.loss_type!r} is not a reward loss{hint} (known: {', '.join(NEEDS)})")
    answers = 2 if c.loss_type == "bradley_terry" else c.answers
    if answers < 1 or (answers == 1 and c.loss_type == "plackett_luce"):
        raise UserError(f"config.algorithm.answers is {answers}, but a ranked list has at least 2")
    score = make_scorer(model, answers, config.train.remat)

    def objective(scores: Scores, batch: Batch, carry):
        present, values = scores.lengths > 0, scores.values
        groups = present.sum(axis=-1) > 1  # [B, G]: there is something to compare
        if c.loss_type == "mse":
            targets = batch["scores"].astype(values.dtype)
            targets = jnp.pad(targets, ((0, 0), (0, 0), (0, answers - targets.shape[-1])))  # the dataset's longest list may be shorter
            main = over(present, reward.squared_error(values, targets))
            better = targets[..., :, None] > targets[..., None, :]
        else:
            if c.loss_type == "bradley_terry":
                losses = reward.bradley_terry(values[..., 0], values[..., 1], batch.get("margin", 0.0))
            else:
                losses = reward.plackett_luce(values, present)
            main = over(groups, losses)
            better = jnp.triu(jnp.ones((answers, answers), bool), 1)  # best first
        terms = {c.loss_type: Term(1.0, *main)}
        if c.center_rewards_coefficient:
            terms["center"] = Term(c.center_rewards_coefficient, *over(groups, reward.center(values, present)))
        if c.regularization:
            terms["regularization"] = Term(c.regularization, *over(present, jnp.square(values)))
        return terms, metrics(values, present, better), carry

    return Algorithm(lambda params, fixed, batch, key: score(params, batch, key), objective, needs=NEEDS[c.loss_type])


def check(config: ConfigDict, model: Model) -> None:
    """What reward and cost models have in common."""
    if not model.has_score_head:
        raise UserError(f"config.algorithm.name {config.algorithm.name!r} needs a model with a score head, which this one lacks")
    for key in ("center_rewards_coefficient", "regularization"):
        if config.algorithm.get(key, 0) < 0:
            raise UserError(f"config.algorithm.{key} is {config.algorithm[key]}; it must not be negative")


def over(mask, values) -> tuple:
    """(sum of the values where the mask says so, how many those are)."""
    return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)


def metrics(values, present, better) -> dict[str, Mean | Min | Max]:
    """TRL's metrics of a reward model.

    Args:
        values: [B, G, R] scores.
        present: [B, G, R] which answers there are.
        better: [R, R] or [B, G, R, R], true where the first is the better answer.
    """
    pairs = better & present[..., :, None] & present[..., None, :]
    margins = values[..., :, None] - values[..., None, :]
    return {
        "min_reward": Min(jnp.min(jnp.where(present, values, jnp.inf))),
        "mean_reward": Mean(*over(present, values)),
        "max_reward": Max(jnp.max(jnp.where(present, values, -jnp.inf))),
        "accuracy": Mean(*over(pairs, margins > 0)),
        "margin": Mean(*over(pairs, margins)),
    }
