"""Online DPO (arXiv 2402.04792): the best and the worst of a prompt's own answers are the pair; and XPO (arXiv 2405.21046)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice, check_not_negative, check_positive
from aligner.algorithms.grpo import check_online, policy_and_rollout, sampling_differences
from aligner.algorithms.pairs import mean_over
from aligner.likelihood import spread, sum_answers
from aligner.losses import preference
from aligner.types import Algorithm, Batch, Model, Scores, Term, UserError

LOSSES = {"sigmoid": preference.sigmoid, "ipo": preference.ipo}  # both on summed log-ratios, as TRL's


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm` (configs.common.online_dpo) describes.

    The batch has `chosen`, `rejected`, `by_rival` [B,G,R], each 1 at one answer of a prompt or 0 at all, `reference_logps` [B,S], and
    `learn` [B,S], 0 at answers that are left out.
    """
    c = config.algorithm
    check(config)
    R, (policy, rollout) = c.num_generations, policy_and_rollout(config, model)

    def objective(scores: Scores, batch: Batch, carry):
        logps = scores.logps
        ratios = logps - sum_answers(batch["reference_logps"].astype(logps.dtype), batch, R)
        learnt = sum_answers(batch["learn"].astype(logps.dtype), batch, R) > 0
        of = lambda which, x: jnp.sum(jnp.where(learnt, batch[which] * x, 0), axis=-1)
        pairs = (of("chosen", 1.0) > 0) & (of("rejected", 1.0) > 0)
        losses = LOSSES[c.loss_type](of("chosen", ratios), of("rejected", ratios), c.beta)
        terms = {c.loss_type: Term(1.0, jnp.sum(jnp.where(pairs, losses, 0)), jnp.sum(pairs))}
        if c.xpo_alpha:  # optimism: what the reference writes is made less likely
            there = of("by_rival", 1.0) > 0
            terms["xpo"] = Term(c.xpo_alpha, jnp.sum(of("by_rival", logps)), jnp.sum(there))
        rewards = c.beta * ratios
        chosen, rejected = of("chosen", rewards), of("rejected", rewards)
        mask = batch["score_segment"] > 0
        found = {
            "rewards/chosen": mean_over(pairs, chosen),
            "rewards/rejected": mean_over(pairs, rejected),
            "rewards/accuracies": mean_over(pairs, chosen > rejected),
            "rewards/margins": mean_over(pairs, chosen - rejected),
            "logps/chosen": mean_over(pairs, of("chosen", logps)),
            "logps/rejected": mean_over(pairs, of("rejected", logps)),
            "objective/entropy": mean_over(mask, scores.tokens["entropy"]),
        }
        old = batch.get("old_logps", jax.lax.stop_gradient(scores.tokens["logp"]))
        own = mask * (1 - spread(batch["by_rival"].astype(jnp.float32), batch))  # not what the reference wrote
        return terms, found | sampling_differences(old, batch, own), carry

    return Algorithm(lambda params, fixed, batch, key: policy(params, batch, key), objective, rollout=rollout, needs="prompt")


def check(config: ConfigDict) -> None:
    """What the config alone can have wrong."""
    c = config.algorithm
    check_online(config)
    check_positive(c, "beta")
    check_not_negative(c, "xpo_alpha")
    check_choice("algorithm.loss_type", c.loss_type, LOSSES)
    if c.num_generations < 2:
        raise UserError(f"config.algorithm.num_generations is {c.num_generations}, but a pair needs two answers")
    if c.xpo_alpha and c.num_generations != 2:
        raise UserError(f"config.algorithm.num_generations is {c.num_generations}; XPO has 2, one by the policy and one by the reference")
