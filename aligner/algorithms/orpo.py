"""ORPO (arXiv 2403.07691): supervised learning on the chosen answer plus a penalty on the odds of the rejected one. No reference."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import pairs
from aligner.algorithms.checks import check_choice, check_positive
from aligner.algorithms.pairs import CHOSEN
from aligner.likelihood import make_likelihood
from aligner.losses import reference_free
from aligner.models.decoder import text_config
from aligner.types import Algorithm, Batch, Mean, Model, Scores, Term, UserError

NLL_OVER = ("prompt_and_completion", "completion")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """ORPO as `config.algorithm` (configs.common.orpo) describes it: NLL - beta * log sigmoid(log odds ratio).

    Metrics are TRL's; rewards are beta * average log-probability per token. Other than there, `logits/..` are means over answers' tokens,
    as DPO's, not also over prompts and padding; and a prompt gets no BOS where tokenizer and template put none.
    """
    c = config.algorithm
    check_positive(c, "beta")
    check_choice("algorithm.nll_over", c.nll_over, NLL_OVER)
    with_prompt = c.nll_over == "prompt_and_completion"
    if with_prompt and getattr(text_config(model), "both_ways", "") == "prompt":
        raise UserError(
            f"config.algorithm.nll_over is {c.nll_over!r}, but a prompt of {model.family} sees all of itself, what is to be predicted "
            'included; set it to "completion"'
        )
    policy = make_likelihood(model, 2, pairs.STATS, config.train.remat)

    def score(params, fixed, batch: Batch, key) -> Scores:
        return policy(params, batch, key)

    def objective(scores: Scores, batch: Batch, carry):
        mask = pairs.present(scores)
        average = pairs.average_logps(scores)
        log_odds = reference_free.log_odds_ratio(average[..., 0], average[..., 1])
        losses = reference_free.odds_ratio(average[..., 0], average[..., 1])
        # a scored token of the prompt has role 0: it stands once for both answers
        learned = (batch["score_segment"] > 0) & (batch["score_role"] <= CHOSEN + 1)
        nll = Mean(-jnp.sum(jnp.where(learned, scores.tokens["logp"], 0)), jnp.sum(learned))
        found = pairs.metrics(scores._replace(logps=average), batch, mask, c.beta * average)
        found |= {"nll_loss": nll, "log_odds_ratio": pairs.mean_over(mask, -losses), "log_odds_chosen": pairs.mean_over(mask, log_odds)}
        odds_ratio = Term(c.beta, jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask))
        return {"nll": Term(1.0, nll.sum, nll.count), "odds_ratio": odds_ratio}, found, carry

    return Algorithm(score, objective, needs="preference_prompt" if with_prompt else "preference")
