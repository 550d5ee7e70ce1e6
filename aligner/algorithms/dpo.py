"""Direct preference optimisation (arXiv 2305.18290) and the losses that differ from it only in how log-ratios become a loss."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms import pairs
from aligner.algorithms.checks import check_choice, check_positive, check_smoothing
from aligner.algorithms.pairs import CHOSEN, REJECTED
from aligner.algorithms.reference import make_reference
from aligner.likelihood import answer_members, make_likelihood, sum_answers
from aligner.losses import preference, unpaired
from aligner.types import Algorithm, Array, Batch, Bool, Float, Last, Model, Scores, Term, UserError


class Pairs(NamedTuple):
    """What a loss sees of a batch; the last axis of a [B,G,2] array is (chosen, rejected)."""

    logps: Float[Array, "B G 2"]
    reference_logps: Float[Array, "B G 2"]
    logratios: Float[Array, "B G 2"]
    scores: Float[Array, "B G 2"]  # of the f-divergence; the log-ratios under reverse KL
    lengths: Float[Array, "B G 2"]
    mask: Bool[Array, "B G"]
    delta: Float[Array, ""] | float = 0.0  # BCO's reward shift


def split(x: Float[Array, "B G 2"]) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """(chosen, rejected)."""
    return x[..., CHOSEN], x[..., REJECTED]


def per_token(p: Pairs) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """Scores averaged over the tokens of their answer."""
    return split(p.scores / jnp.maximum(p.lengths, 1))


def margin(x: Float[Array, "B G 2"]) -> Float[Array, "B G"]:
    return x[..., CHOSEN] - x[..., REJECTED]


# loss_type -> (pairs, config.algorithm) -> [B,G]. TRL's names and mathematics (1.16), except where the comment says otherwise.
LOSSES = {
    "sigmoid": lambda p, c: preference.sigmoid(*split(p.scores), c.beta, c.label_smoothing),  # TRL's does not smooth
    "hinge": lambda p, c: preference.hinge(*split(p.scores), c.beta),
    "ipo": lambda p, c: preference.ipo(*per_token(p), c.beta),
    "ipo_sum": lambda p, c: preference.ipo(*split(p.scores), c.beta),  # not in TRL: the paper's letter
    "exo_pair": lambda p, c: preference.exo_pair(*split(p.scores), c.beta, c.label_smoothing),
    "nca_pair": lambda p, c: preference.nca_pair(*split(p.logratios), c.beta),
    "robust": lambda p, c: preference.robust(*split(p.scores), c.beta, c.label_smoothing),
    "bco_pair": lambda p, c: preference.bco_pair(*split(p.logratios), c.beta),
    "bco": lambda p, c: preference.bco_pair(*split(p.logratios), c.beta, p.delta) / 2,  # a mean over answers, as TRL's BCOTrainer had it
    "sppo_hard": lambda p, c: preference.sppo_hard(*split(p.logratios), c.beta),
    "aot": lambda p, c: preference.aot(margin(p.logps), margin(p.reference_logps), p.mask, c.beta, c.label_smoothing),
    "aot_unpaired": lambda p, c: preference.aot(*split(p.logratios), p.mask, c.beta, c.label_smoothing),
    "apo_zero": lambda p, c: preference.apo_zero(*split(p.logratios), c.beta),
    "apo_down": lambda p, c: preference.apo_down(*split(p.logratios), c.beta),
    "discopop": lambda p, c: preference.discopop(*split(p.scores), c.beta, c.discopop_tau),
    "sigmoid_norm": lambda p, c: preference.sigmoid(*per_token(p), c.beta, c.label_smoothing),  # TRL's does not smooth
}
SFT = "sft"  # negative log-likelihood per token of the chosen answers
SORTED = ("aot", "aot_unpaired")
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", *SORTED)
# f-DPO leaves a term that cancels only in the difference of two scores
F_DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "exo_pair", "robust", "discopop", SFT)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """DPO as `config.algorithm` (configs.common.dpo) describes it: one loss or a weighted sum of several.

    Metrics are TRL's; rewards are beta * log-ratio with every loss and divergence.
    """
    c = config.algorithm
    names, weights = check(config)
    stats = (*pairs.STATS, "sum_p2") if c.use_weighting else pairs.STATS
    policy, frozen = make_likelihood(model, 2, stats, config.train.remat), make_likelihood(model, 2)
    summed = lambda scores, batch: scores.logps if c.ld_alpha is None else ld_logps(scores, batch, c.ld_alpha)
    reference = make_reference(config, lambda params, batch: summed(frozen(params, batch), batch), {"ld_alpha": c.ld_alpha})

    def score(params, fixed, batch: Batch, key) -> Scores:
        scores = policy(params, batch, key)
        return scores._replace(logps=summed(scores, batch), reference_logps=reference.logps(fixed, batch))

    def objective(scores: Scores, batch: Batch, carry, training=True):
        mask = pairs.present(scores)
        logratios = scores.logps - scores.reference_logps
        rewards = c.beta * logratios
        found = pairs.metrics(scores, batch, mask, rewards)
        if "bco" in names:
            if training:
                mean, count = unpaired.running_mean(**carry, values=rewards, mask=mask[..., None] & (scores.lengths > 0))
                carry = {"mean": mean, "count": count}
            found["delta"] = Last(carry["mean"])
        f_scores = preference.f_score(logratios, c.f_divergence_type, c.f_alpha_divergence_coef)
        p = Pairs(scores.logps, scores.reference_logps, logratios, f_scores, scores.lengths, mask, carry.get("mean", 0.0))
        likely = jnp.prod(wpo_weights(scores, batch), axis=-1) if c.use_weighting else 1.0

        terms, count = {}, jnp.sum(mask)
        for name, weight in zip(names, weights):
            if name == SFT:  # a mean over tokens; neither LD-DPO nor WPO touch it
                total = -jnp.sum(sum_answers(scores.tokens["logp"], batch, 2)[..., CHOSEN])
                terms[name] = Term(weight, total, jnp.sum(scores.lengths[..., CHOSEN]))
            else:
                terms[name] = Term(weight, jnp.sum(jnp.where(mask, LOSSES[name](p, c) * likely, 0)), count)
        return terms, found, carry

    return Algorithm(
        score,
        objective,
        held_out=functools.partial(objective, training=False),
        carry={"mean": jnp.zeros(()), "count": jnp.zeros(())} if "bco" in names else {},
        whole_batch=bool({*SORTED, "bco"} & {*names}),
        sync=(c.ref_model_mixup_alpha, c.ref_model_sync_steps) if c.sync_ref_model else None,
        **reference.options,
    )


def ld_logps(scores: Scores, batch: Batch, alpha: float) -> Float[Array, "B G R"]:
    """Log-probabilities summed as LD-DPO does: tokens beyond the length of the shorter answer count `alpha` times."""
    answers = scores.lengths.shape[-1]
    logps = scores.tokens["logp"]
    member = answer_members(batch, answers, logps.dtype)
    position = jnp.sum(jnp.cumsum(member, axis=1) * member, axis=-1)
    shortest = jnp.repeat(jnp.min(scores.lengths, axis=-1), answers, axis=-1).astype(logps.dtype)  # [B, G*R]
    weights = preference.ld_weights(position, jnp.sum(member * shortest[:, None], axis=-1), alpha)
    return sum_answers(logps * weights, batch, answers)


def wpo_weights(scores: Scores, batch: Batch) -> Float[Array, "B G R"]:
    """WPO's weight of every answer."""
    scored = batch["score_segment"] > 0
    log_sum_p2 = jnp.log(jnp.where(scored, scores.tokens["sum_p2"], 1))
    answers = scores.lengths.shape[-1]
    return preference.wpo_weight(*(sum_answers(x, batch, answers) for x in (scores.tokens["logp"], log_sum_p2)), scores.lengths)


def check(config: ConfigDict) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(loss types, their weights), after everything that the config alone can have wrong.

    Raises:
        UserError: one sentence that names the key.
    """
    c = config.algorithm
    check_positive(c, "beta", "discopop_tau")
    check_smoothing(c)
    names = (c.loss_type,) if isinstance(c.loss_type, str) else tuple(c.loss_type)
    for name in names:
        check_choice("algorithm.loss_type", name, [*LOSSES, SFT])
    if not names or len({*names}) < len(names):
        raise UserError(f"config.algorithm.loss_type is {names}, but it must name one loss or several different ones")
    weights = tuple(c.loss_weights) or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(f"config.algorithm.loss_weights {weights} must have one number for each of config.algorithm.loss_type {names}")
    if "exo_pair" in names and not c.label_smoothing > 0:
        raise UserError("config.algorithm.label_smoothing is 0, but exo_pair needs it above 0; its paper recommends 1e-3")
    if c.label_smoothing and not {*SMOOTHED} & {*names}:
        smooth = f"{' and '.join(names)} {'do' if len(names) > 1 else 'does'} not smooth labels"
        raise UserError(f"config.algorithm.label_smoothing is {c.label_smoothing}, but {smooth}; set it to 0")
    check_choice("algorithm.f_divergence_type", c.f_divergence_type, F_DIVERGENCES)
    others = [name for name in names if name not in F_DIVERGENCE_LOSSES]
    if c.f_divergence_type != "reverse_kl" and others:
        raise UserError(
            f"config.algorithm.f_divergence_type={c.f_divergence_type!r} has no meaning for {others[0]}, only for "
            f"{', '.join(F_DIVERGENCE_LOSSES)}; use reverse_kl"
        )
    if c.use_weighting and {*SORTED} & {*names}:
        raise UserError("config.algorithm.use_weighting weighs each pair, but aot and aot_unpaired compare values of different pairs")
    if c.ld_alpha is not None and not 0 <= c.ld_alpha <= 1:
        raise UserError(f"config.algorithm.ld_alpha is {c.ld_alpha}, but it must be in [0, 1]; None turns LD-DPO off")
    if c.sync_ref_model:
        if config.reference.kind != "copy" or config.reference.model:
            raise UserError(
                "config.algorithm.sync_ref_model=True needs a reference in memory that starts as the policy: "
                "config.reference.kind=copy and config.reference.model empty"
            )
        check_positive(c, "ref_model_mixup_alpha", "ref_model_sync_steps")
        if c.ref_model_mixup_alpha > 1:
            raise UserError(f"config.algorithm.ref_model_mixup_alpha is {c.ref_model_mixup_alpha}, but it must be in (0, 1]")
    return names, weights
