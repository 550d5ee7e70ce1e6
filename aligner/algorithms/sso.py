"""SSO (arXiv 2410.17131): a model learns to answer by a good principle and, told a bad one, not to follow the good.

A row holds two pairs about one request: under the good principle chosen > rejected (roles 1, 2), under the bad principle
raw > chosen (roles 3, 4), where raw is what the model answered to that principle.
"""

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import pairs
from aligner.algorithms.checks import check_not_negative, check_positive, check_smoothing
from aligner.algorithms.pairs import CHOSEN, REJECTED
from aligner.algorithms.reference import make_reference
from aligner.likelihood import make_likelihood, sum_answers
from aligner.losses import preference
from aligner.types import Algorithm, Batch, Mean, Model, Scores, Term

SIDES = ("good", "bad")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """SSO as `config.algorithm` (configs.common.sso) describes it: DPO of both pairs - gamma * (log p per token of both preferred answers).

    Per token means over the answer's own tokens; AutoAlign divides by the padded length of the row instead.
    Metrics are TRL's of all pairs together, and rewards/{accuracies,margins}/{good,bad} apart.
    """
    c = config.algorithm
    check_positive(c, "beta")
    check_not_negative(c, "gamma")
    check_smoothing(c)
    policy, frozen = make_likelihood(model, 4, pairs.STATS, config.train.remat), make_likelihood(model, 4)
    reference = make_reference(config, lambda params, batch: frozen(params, batch).logps)

    def score(params, fixed, batch: Batch, key) -> Scores:
        return policy(params, batch, key)._replace(reference_logps=reference.logps(fixed, batch))

    def objective(scores: Scores, batch: Batch, carry):
        sides = lambda x: x.reshape(*x.shape[:-1], 2, 2)  # [B, G, (good, bad), (chosen, rejected)]
        mask = pairs.present(scores)
        both = jnp.broadcast_to(mask[..., None], (*mask.shape, 2))
        rewards = sides(c.beta * (scores.logps - scores.reference_logps))
        losses = preference.sigmoid(rewards[..., CHOSEN], rewards[..., REJECTED], 1.0, c.label_smoothing)
        average = sides(pairs.average_logps(scores))[..., CHOSEN]
        total = lambda x: jnp.sum(jnp.where(both, x, 0))
        terms = {"dpo": Term(1.0, total(losses), jnp.sum(mask)), "nll": Term(c.gamma, -total(average), jnp.sum(mask))}
        return terms, metrics(scores, batch, both, rewards), carry

    return Algorithm(score, objective, needs="sso", **reference.options)


def metrics(scores: Scores, batch: Batch, both, rewards) -> dict[str, Mean]:
    """TRL's names, over all pairs; accuracies and margins of each side apart as well."""
    chosen, rejected = rewards[..., CHOSEN], rewards[..., REJECTED]
    entropy, count = sum_answers(scores.tokens["entropy"], batch, 4), jnp.sum(scores.lengths)
    found = {"rewards/chosen": pairs.mean_over(both, chosen), "rewards/rejected": pairs.mean_over(both, rejected)}
    found |= {"rewards/accuracies": pairs.mean_over(both, chosen > rejected), "rewards/margins": pairs.mean_over(both, chosen - rejected)}
    for place, side in enumerate(SIDES):
        here = both & (jnp.arange(2) == place)
        found[f"rewards/accuracies/{side}"] = pairs.mean_over(here, chosen > rejected)
        found[f"rewards/margins/{side}"] = pairs.mean_over(here, chosen - rejected)
    logps = scores.logps.reshape(*both.shape, 2)
    found |= {"logps/chosen": pairs.mean_over(both, logps[..., CHOSEN]), "logps/rejected": pairs.mean_over(both, logps[..., REJECTED])}
    return found | {"entropy": Mean(jnp.sum(entropy), count)}
