"""TPO (arXiv 2405.16681): pairs compared by the policy alone, beside the likelihood of a third answer, the gold one. No reference model."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import cpo, pairs
from aligner.likelihood import make_likelihood
from aligner.losses import reference_free
from aligner.types import Algorithm, Batch, Mean, Model, Scores, Term

GOLD = 2  # its place along R, behind the pair
LOSSES = {name: cpo.LOSSES[name] for name in ("sigmoid", "hinge", "ipo")}
LOSSES["tpo-l"] = lambda chosen, rejected, c: reference_free.simpo(chosen, rejected, c.beta, c.tpo_l_gamma, c.label_smoothing)
PER_TOKEN = ("ipo", "tpo-l")  # take the average over an answer's tokens, the others the sum


def make(config: ConfigDict, model: Model) -> Algorithm:
    """TPO as `config.algorithm` (configs.common.tpo) describes it: the loss on pairs + tpo_alpha * NLL per token of the gold answers.

    Metrics are TRL's; rewards are beta * log-probability, summed or averaged as the loss takes it.
    """
    c = config.algorithm
    cpo.check(c, LOSSES, "tpo_alpha")
    policy = make_likelihood(model, 3, pairs.STATS, config.train.remat)

    def score(params, fixed, batch: Batch, key) -> Scores:
        return policy(params, batch, key)

    def objective(scores: Scores, batch: Batch, carry):
        mask = pairs.present(scores)
        logps = pairs.average_logps(scores) if c.loss_type in PER_TOKEN else scores.logps
        losses = LOSSES[c.loss_type](logps[..., pairs.CHOSEN], logps[..., pairs.REJECTED], c)
        terms = {c.loss_type: Term(1.0, jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask))}
        if c.tpo_alpha:
            terms["nll"] = Term(c.tpo_alpha, -jnp.sum(scores.logps[..., GOLD]), jnp.sum(scores.lengths[..., GOLD]))
        found = pairs.metrics(scores._replace(logps=logps), batch, mask, c.beta * logps)
        return terms, found | {"entropy": Mean(jnp.sum(scores.tokens["entropy"]), jnp.sum(scores.lengths))}, carry

    return Algorithm(score, objective, needs="triple")
