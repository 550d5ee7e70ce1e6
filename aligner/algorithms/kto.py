"""KTO (arXiv 2402.01306), APO-zero and BCO on single answers labelled good or bad.

With KTO's own loss an example has two answers after its prompt: its own (role 1) and another example's (role 2), which serves the
reference point only. Which one is fixed for the dataset, so order, packing, accumulation and hosts change nothing.
"""

import functools

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import pairs
from aligner.algorithms.checks import check_choice, check_not_negative, check_positive
from aligner.algorithms.reference import make_reference
from aligner.likelihood import make_likelihood, sum_answers
from aligner.losses import unpaired
from aligner.types import Algorithm, Batch, Last, Mean, Model, Scores, Term

OWN, MISMATCHED = 0, 1  # places along R
LOSS_TYPES = ("kto", "apo_zero_unpaired", "bco")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """KTO as `config.algorithm` (configs.common.kto) describes it. Reads `label` [B,G] of the batch, 1 good and 0 bad.

    Metrics are TRL's: rewards are beta * log-ratio, means of chosen over good answers, of rejected over bad ones.
    """
    c = config.algorithm
    check_positive(c, "beta")
    check_not_negative(c, "desirable_weight", "undesirable_weight")
    check_choice("algorithm.loss_type", c.loss_type, LOSS_TYPES)
    answers = 2 if c.loss_type == "kto" else 1
    policy, frozen = make_likelihood(model, answers, pairs.STATS, config.train.remat), make_likelihood(model, answers)
    reference = make_reference(config, lambda params, batch: frozen(params, batch).logps)

    def score(params, fixed, batch: Batch, key) -> Scores:
        return policy(params, batch, key)._replace(reference_logps=reference.logps(fixed, batch))

    def objective(scores: Scores, batch: Batch, carry, training=True):
        mask = scores.lengths[..., OWN] > 0
        good = (batch["label"] > 0.5) & mask
        logratios = scores.logps - scores.reference_logps
        own = logratios[..., OWN]
        rewards = c.beta * own
        found = metrics(scores, batch, good, mask & ~good, rewards)
        if c.loss_type == "kto":
            kl = unpaired.kl_estimate(logratios[..., MISMATCHED], mask)
            losses = unpaired.kto(own, good, kl, c.beta)
            found["kl"] = pairs.mean_over(mask, kl)  # evaluation has one a batch, of more or fewer examples
        elif c.loss_type == "bco":
            if training:
                mean, count = unpaired.running_mean(**carry, values=rewards, mask=mask)
                carry = {"mean": mean, "count": count}
            losses = unpaired.bco(own, good, carry["mean"], c.beta)
            found["delta"] = Last(carry["mean"])
        else:
            losses = unpaired.apo_zero_unpaired(own, good, c.beta)
        losses = losses * jnp.where(good, c.desirable_weight, c.undesirable_weight)
        return {c.loss_type: Term(1.0, jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask))}, found, carry

    return Algorithm(
        score,
        objective,
        held_out=functools.partial(objective, training=False),
        carry={"mean": jnp.zeros(()), "count": jnp.zeros(())} if c.loss_type == "bco" else {},
        needs="unpaired" if c.loss_type == "kto" else "unpaired_alone",
        whole_batch=c.loss_type != "apo_zero_unpaired",
        **reference.options,
    )


def metrics(scores: Scores, batch: Batch, good, bad, rewards) -> dict[str, Mean]:
    """TRL's metrics of a batch of labelled answers. `rewards/margins` follows from two of them (`aligner.metrics.values`)."""
    lengths, logps = scores.lengths[..., OWN], scores.logps[..., OWN]
    token_sums = {name: sum_answers(scores.tokens[name], batch, scores.lengths.shape[-1])[..., OWN] for name in ("entropy", "mean_logit")}
    found = {"entropy": Mean(jnp.sum(token_sums["entropy"]), jnp.sum(lengths))}
    for name, mask in (("chosen", good), ("rejected", bad)):
        found[f"rewards/{name}"] = pairs.mean_over(mask, rewards)
        found[f"logps/{name}"] = pairs.mean_over(mask, logps)
        found[f"logits/{name}"] = Mean(jnp.sum(jnp.where(mask, token_sums["mean_logit"], 0)), jnp.sum(jnp.where(mask, lengths, 0)))
    return found
