"""What all algorithms on pairs of answers share: places along R, token statistics, TRL's metrics."""

import jax.numpy as jnp

from aligner.likelihood import sum_answers
from aligner.types import Array, Batch, Bool, Float, Mean, Scores

CHOSEN, REJECTED = 0, 1  # places along R
STATS = ("logp", "entropy", "correct", "mean_logit")


def present(scores: Scores) -> Bool[Array, "B G"]:
    """Which examples there are: false where a row holds none."""
    return (scores.lengths > 0).all(axis=-1)


def average_logps(scores: Scores) -> Float[Array, "B G R"]:
    """Log-probability per token of every answer; 0 where there is none."""
    return scores.logps / jnp.maximum(scores.lengths, 1)


def mean_over(mask: Bool[Array, "..."], x: Float[Array, "..."]) -> Mean:
    """The mean of `x` where `mask` is true."""
    return Mean(jnp.sum(jnp.where(mask, x, 0)), jnp.sum(mask))


def metrics(scores: Scores, batch: Batch, pairs: Bool[Array, "B G"], rewards: Float[Array, "B G R"]) -> dict[str, Mean]:
    """TRL's metrics of a preference batch: accuracy is strict `>`, logits and entropy are means over answer tokens.

    Args:
        scores: `logps` as they are to be reported.
        pairs: which examples there are.
        rewards: of (chosen, rejected) and what stands behind them.
    """
    chosen, rejected = rewards[..., CHOSEN], rewards[..., REJECTED]

    def over_tokens(name, answer):
        total = sum_answers(scores.tokens[name], batch, answers=rewards.shape[-1])
        return Mean(jnp.sum(total[..., answer]), jnp.sum(scores.lengths[..., answer]))

    entropy = [over_tokens("entropy", answer) for answer in (CHOSEN, REJECTED)]
    return {
        "rewards/chosen": mean_over(pairs, chosen),
        "rewards/rejected": mean_over(pairs, rejected),
        "rewards/accuracies": mean_over(pairs, chosen > rejected),
        "rewards/margins": mean_over(pairs, chosen - rejected),
        "logps/chosen": mean_over(pairs, scores.logps[..., CHOSEN]),
        "logps/rejected": mean_over(pairs, scores.logps[..., REJECTED]),
        "logits/chosen": over_tokens("mean_logit", CHOSEN),
        "logits/rejected": over_tokens("mean_logit", REJECTED),
        "entropy": Mean(entropy[0].sum + entropy[1].sum, entropy[0].count + entropy[1].count),
        "mean_token_accuracy": over_tokens("correct", CHOSEN),
    }
