"""Nash-MD (arXiv 2312.00886): towards answers that are preferred to those of a geometric mixture of the policy and its reference."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms.checks import check_positive
from aligner.algorithms.grpo import check_online, policy_and_rollout, sampling_differences
from aligner.algorithms.pairs import mean_over
from aligner.likelihood import spread, sum_answers
from aligner.losses import preference
from aligner.types import Algorithm, Batch, Model, Scores, Term, UserError


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm` (configs.common.nash_md) describes.

    The batch has `by_rival` [B,G,R], 1 at the mixture's answer; `preference` [B,G], how likely the policy's own is preferred to it; and
    `reference_logps` [B,S]. Metrics are TRL's.
    """
    c = config.algorithm
    check(config)
    R, (policy, rollout) = c.num_generations, policy_and_rollout(config, model)

    def objective(scores: Scores, batch: Batch, carry):
        logps = scores.tokens["logp"]
        own = 1 - spread(batch["by_rival"].astype(jnp.float32), batch)
        mask = (batch["score_segment"] > 0) * batch["learn"] * own
        log_ratio = jax.lax.stop_gradient(logps) - batch["reference_logps"].astype(logps.dtype)
        of_own = lambda x: sum_answers(x * mask, batch, R).sum(-1)
        there = batch["example_id"] >= 0
        losses = preference.nash_md(of_own(logps), of_own(log_ratio * logps), batch["preference"].astype(logps.dtype), c.beta)
        terms = {"nash_md": Term(1.0, jnp.sum(jnp.where(there, losses, 0)), jnp.sum(there))}
        found = {
            "loss/score": mean_over(there, (batch["preference"] - 0.5) * of_own(logps)),
            "loss/kl": mean_over(there, of_own(log_ratio)),
            "rewards/probabilities": mean_over(there, batch["preference"]),
            "objective/entropy": mean_over(mask > 0, scores.tokens["entropy"]),
        }
        old = batch.get("old_logps", jax.lax.stop_gradient(logps))
        return terms, found | sampling_differences(old, batch, mask), carry

    return Algorithm(lambda params, fixed, batch, key: policy(params, batch, key), objective, rollout=rollout, needs="prompt")


def check(config: ConfigDict) -> None:
    """What the config alone can have wrong."""
    c = config.algorithm
    check_online(config)
    check_positive(c, "beta")
    if c.num_generations != 2:
        raise UserError(f"config.algorithm.num_generations is {c.num_generations}; Nash-MD has 2, one by the policy and one by the mixture")
    if not 0 < c.mixture_coef <= 1:
        raise UserError(f"config.algorithm.mixture_coef is {c.mixture_coef}; it is the reference's share, above 0 and at most 1")
    if c.num_iterations > 1:
        raise UserError(f"config.algorithm.num_iterations is {c.num_iterations}; Nash-MD's gradient holds for the policy that wrote: 1")
