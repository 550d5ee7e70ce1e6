"""DPO on a ranking of several answers by Plackett-Luce (arXiv 2305.18290, section A.3)."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import pairs
from aligner.algorithms.checks import check_positive
from aligner.algorithms.reference import make_reference
from aligner.likelihood import make_likelihood, sum_answers
from aligner.losses import reward
from aligner.types import Algorithm, Array, Batch, Bool, Float, Mean, Model, Scores, Term, UserError


def make(config: ConfigDict, model: Model) -> Algorithm:
    """Ranked DPO as `config.algorithm` (configs.common.dpo_ranked) describes it; with two answers it is DPO.

    Metrics: `rewards/chosen` is of the best answer, `rewards/rejected` the mean of the others, `rewards/accuracies` the share of ordered
    pairs of answers whose rewards are in that order, `rewards/margins` best less worst.
    """
    c = config.algorithm
    check_positive(c, "beta")
    if c.answers < 2:
        raise UserError(f"config.algorithm.answers is {c.answers}, but a ranking needs at least 2")
    policy, frozen = make_likelihood(model, c.answers, pairs.STATS, config.train.remat), make_likelihood(model, c.answers)
    reference = make_reference(config, lambda params, batch: frozen(params, batch).logps)

    def score(params, fixed, batch: Batch, key) -> Scores:
        return policy(params, batch, key)._replace(reference_logps=reference.logps(fixed, batch))

    def objective(scores: Scores, batch: Batch, carry):
        present = scores.lengths > 0
        mask = present.sum(axis=-1) > 1  # a row without an example, or padding
        rewards = c.beta * (scores.logps - scores.reference_logps)
        losses = reward.plackett_luce(rewards, present)
        terms = {"dpo": Term(1.0, jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask))}
        return terms, metrics(scores, batch, mask, present, rewards), carry

    return Algorithm(score, objective, needs="ranked", **reference.options)


def metrics(
    scores: Scores, batch: Batch, mask: Bool[Array, "B G"], present: Bool[Array, "B G R"], rewards: Float[Array, "B G R"]
) -> dict[str, Mean]:
    answers = rewards.shape[-1]
    best, last = rewards[..., 0], jnp.sum(present, axis=-1) - 1
    worst = jnp.take_along_axis(rewards, jnp.maximum(last, 0)[..., None], axis=-1)[..., 0]
    others = present.at[..., 0].set(False) & mask[..., None]
    ordered = (present[..., :, None] & present[..., None, :]) & jnp.triu(jnp.ones((answers, answers), bool), 1)
    right = rewards[..., :, None] > rewards[..., None, :]
    entropy = sum_answers(scores.tokens["entropy"], batch, answers)
    return {
        "rewards/chosen": pairs.mean_over(mask, best),
        "rewards/rejected": pairs.mean_over(others, rewards),
        "rewards/accuracies": pairs.mean_over(ordered & mask[..., None, None], right),
        "rewards/margins": pairs.mean_over(mask, best - worst),
        "logps/chosen": pairs.mean_over(mask, scores.logps[..., 0]),
        "logps/rejected": pairs.mean_over(others, scores.logps),
        "entropy": Mean(jnp.sum(entropy), jnp.sum(scores.lengths)),
    }
