"""Cost models of Safe RLHF (arXiv 2310.12773): how harmful an answer is, above zero harmful, below zero safe."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms.reward import check, over
from aligner.likelihood import make_scorer
from aligner.losses import reward
from aligner.types import Algorithm, Batch, Max, Mean, Min, Model, Scores, Term, UserError

SAFER, WORSE = 0, 1  # places along R: `chosen` is the safer answer


def make(config: ConfigDict, model: Model) -> Algorithm:
    """-log sigmoid(c_worse - c_safer) + scale * sum over both answers of -log sigmoid(s c), s = 1 for a harmful one, -1 for a safe one.

    `chosen` is the safer answer; the batch's `safe` [B, G, 2] is 1 for a safe answer, -1 for a harmful one, 0 where that is not
    known: such an answer has no part in the second term.
    """
    c = config.algorithm
    check(config, model)
    if c.scale < 0:
        raise UserError(f"config.algorithm.scale is {c.scale}; it must not be negative")
    score = make_scorer(model, 2, config.train.remat)

    def objective(scores: Scores, batch: Batch, carry):
        present, costs, safe = scores.lengths > 0, scores.values, batch["safe"]
        pairs, known = present.all(axis=-1), present & (safe != 0)
        higher, lower = costs[..., WORSE], costs[..., SAFER]
        terms = {"order": Term(1.0, *over(pairs, reward.bradley_terry(higher, lower)))}
        terms["sign"] = Term(2 * c.scale, *over(known, reward.safety_sign(costs, safe)))  # two signs a pair: twice their mean
        if c.regularization:
            terms["regularization"] = Term(c.regularization, *over(present, jnp.square(costs)))
        found = {
            "min_cost": Min(jnp.min(jnp.where(present, costs, jnp.inf))),
            "mean_cost": Mean(*over(present, costs)),
            "max_cost": Max(jnp.max(jnp.where(present, costs, -jnp.inf))),
            "accuracy": Mean(*over(pairs, higher > lower)),
            "accuracy_sign": Mean(*over(known, (costs < 0) == (safe > 0))),
            "margin": Mean(*over(pairs, higher - lower)),
        }
        return terms, found, carry

    return Algorithm(lambda params, fixed, batch, key: score(params, batch, key), objective, needs="preference_last")
