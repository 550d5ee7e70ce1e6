"""Direct preference optimisation (arXiv 2305.18290)."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.likelihood import make_likelihood, sum_answers
from aligner.lora import without_adapters
from aligner.losses import preference
from aligner.types import Algorithm, Batch, Mean, Model, Scores, Term, UserError

CHOSEN, REJECTED = 0, 1  # places along R
STATS = ("logp", "entropy", "correct", "mean_logit")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """DPO with `beta` and `label_smoothing`.

    The reference is a column (`reference.kind="precomputed"`), a frozen copy, or the base without its adapters.

    Metrics are TRL's: rewards are beta * log-ratio, accuracy is strict `>`, logits and entropy are means over answer tokens.
    """
    c = config.algorithm
    if not c.beta > 0:
        raise UserError(f"config.algorithm.beta is {c.beta}, but DPO needs beta > 0")
    if not 0 <= c.label_smoothing < 0.5:
        raise UserError(f"config.algorithm.label_smoothing is {c.label_smoothing}, but it must be in [0, 0.5)")
    policy = make_likelihood(model, answers=2, stats=STATS, remat=config.train.remat)
    reference = make_likelihood(model, answers=2)
    frozen = {"copy": lambda fixed: fixed["reference"], "base": without_adapters}.get(config.reference.kind)

    def score(params, fixed, batch: Batch, key) -> Scores:
        scores = policy(params, batch, key)
        return scores._replace(reference_logps=reference(frozen(fixed), batch).logps if frozen else batch["reference_logps"])

    def objective(scores: Scores, batch: Batch, carry):
        pairs = (scores.lengths > 0).all(axis=-1)  # [B, G]; false where a row holds no example
        logratios = scores.logps - scores.reference_logps
        chosen, rejected = logratios[..., CHOSEN], logratios[..., REJECTED]
        losses = preference.sigmoid(chosen, rejected, c.beta, c.label_smoothing)
        terms = {"dpo": Term(1.0, jnp.sum(jnp.where(pairs, losses, 0)), jnp.sum(pairs))}
        return terms, metrics(scores, batch, pairs, c.beta * chosen, c.beta * rejected), carry

    def prepare(params, batch: Batch) -> dict:
        return {"reference_logps": reference(params, batch).logps}

    return Algorithm(score, objective, prepare=None if frozen else prepare, columns=() if frozen else ("reference_logps",))


def metrics(scores: Scores, batch: Batch, pairs, chosen_rewards, rejected_rewards) -> dict[str, Mean]:
    """TRL's metrics of a preference batch, as sums and counts."""
    count = jnp.sum(pairs)

    def over_pairs(x):
        return Mean(jnp.sum(jnp.where(pairs, x, 0)), count)

    def over_tokens(name, answer):
        total = sum_answers(scores.tokens[name], batch, answers=2)
        return Mean(jnp.sum(total[..., answer]), jnp.sum(scores.lengths[..., answer]))

    entropy = [over_tokens("entropy", answer) for answer in (CHOSEN, REJECTED)]
    return {
        "rewards/chosen": over_pairs(chosen_rewards),
        "rewards/rejected": over_pairs(rejected_rewards),
        "rewards/accuracies": over_pairs(chosen_rewards > rejected_rewards),
        "rewards/margins": over_pairs(chosen_rewards - rejected_rewards),
        "logps/chosen": over_pairs(scores.logps[..., CHOSEN]),
        "logps/rejected": over_pairs(scores.logps[..., REJECTED]),
        "logits/chosen": over_tokens("mean_logit", CHOSEN),
        "logits/rejected": over_tokens("mean_logit", REJECTED),
        "entropy": Mean(entropy[0].sum + entropy[1].sum, entropy[0].count + entropy[1].count),
        "mean_token_accuracy": over_tokens("correct", CHOSEN),
    }
