"""CPO (arXiv 2401.08417), SimPO (arXiv 2405.14734) and AlphaPO (arXiv 2501.03884): pairs compared by the policy alone. No reference."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import pairs
from aligner.algorithms.checks import check_choice, check_not_negative, check_positive, check_smoothing
from aligner.algorithms.pairs import CHOSEN
from aligner.likelihood import make_likelihood
from aligner.losses import preference, reference_free
from aligner.types import Algorithm, Batch, Mean, Model, Scores, Term, UserError

# loss_type -> (chosen, rejected, config.algorithm) -> [B,G], of log-probabilities (or AlphaPO's rewards)
LOSSES = {
    "sigmoid": lambda chosen, rejected, c: preference.sigmoid(chosen, rejected, c.beta, c.label_smoothing),
    "hinge": lambda chosen, rejected, c: preference.hinge(chosen, rejected, c.beta),
    "ipo": lambda chosen, rejected, c: preference.ipo(chosen, rejected, c.beta),
    "simpo": lambda chosen, rejected, c: reference_free.simpo(chosen, rejected, c.beta, c.simpo_gamma, c.label_smoothing),
}
PER_TOKEN = ("ipo", "simpo")  # take the average over an answer's tokens, the others the sum


def check(c: ConfigDict, losses: Mapping[str, Callable], nll: str) -> None:
    """Raises UserError where `config.algorithm` of CPO or TPO makes no sense; `nll` names the weight of its likelihood term."""
    check_positive(c, "beta")
    check_not_negative(c, nll)
    check_smoothing(c)
    check_choice("algorithm.loss_type", c.loss_type, losses)
    if c.label_smoothing and c.loss_type in ("hinge", "ipo"):
        raise UserError(f"config.algorithm.label_smoothing is {c.label_smoothing}, but {c.loss_type} does not smooth labels; set it to 0")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """CPO as `config.algorithm` (configs.common.cpo, simpo, alphapo) describes it: the loss on pairs + cpo_alpha * NLL of the chosen.

    Metrics are TRL's; rewards are beta * log-probability, summed or averaged as the loss takes it. Other than there, `logits/..` are means
    over the answers' tokens, as DPO's, not also over prompts and padding; `nll_loss` is told with cpo_alpha=0 too; and a prompt gets no BOS
    where tokenizer and template put none.
    """
    c = config.algorithm
    check(c, LOSSES, "cpo_alpha")
    policy = make_likelihood(model, 2, pairs.STATS, config.train.remat)

    def score(params, fixed, batch: Batch, key) -> Scores:
        return policy(params, batch, key)

    def objective(scores: Scores, batch: Batch, carry):
        mask = pairs.present(scores)
        logps = pairs.average_logps(scores) if c.loss_type in PER_TOKEN else scores.logps
        rewards = reference_free.alpha_reward(logps, c.alpha)
        losses = LOSSES[c.loss_type](rewards[..., 0], rewards[..., 1], c)
        nll = Mean(-jnp.sum(scores.logps[..., CHOSEN]), jnp.sum(scores.lengths[..., CHOSEN]))
        found = pairs.metrics(scores._replace(logps=logps), batch, mask, c.beta * rewards) | {"nll_loss": nll}
        terms = {c.loss_type: Term(1.0, jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask))}
        if c.cpo_alpha:
            terms["nll"] = Term(c.cpo_alpha, nll.sum, nll.count)
        return terms, found, carry

    return Algorithm(score, objective)
