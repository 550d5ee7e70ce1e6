"""Distillation (arXiv 2306.13649): the student's next-token distributions follow a teacher's, on given answers or on its own."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice, check_not_negative
from aligner.algorithms.grpo import check_online
from aligner.likelihood import answer_lengths, answer_members, read, spread, sum_answers, tempered
from aligner.logprobs import TopK, divergence, token_stats
from aligner.losses.partial_distillation import SUPPORTS, iw_opd, iw_opd_weight
from aligner.types import Algorithm, Array, Batch, Float, Mean, Model, Scores, Term, UserError

OBJECTIVES = ("divergence", "iw_opd")


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The teacher is known by its config; the run opens and loads its weights."""
    from aligner.convert import find_folder, model_from_folder

    if not config.algorithm.teacher:
        raise UserError("config.algorithm.teacher is empty: give the teacher's checkpoint folder or Hub id")
    teacher = model_from_folder(find_folder(config.algorithm.teacher, weights=False))
    check_same_tokens(model, teacher)
    top_k, words = config.algorithm.loss_top_k, len(model.assets.tokenizer)
    if top_k > words:
        raise UserError(f"config.algorithm.loss_top_k is {top_k}, but the vocabulary has {words} tokens")
    return dataclasses.replace(distil(config, model, teacher), others={"teacher": (teacher, config.algorithm.teacher)})


def distil(config: ConfigDict, model: Model, teacher: Model) -> Algorithm:
    """The mean over scored tokens of the divergence from `fixed["teacher"]`, or of IW-OPD's loss on the tokens that stand there.

    Names are TRL's: `beta` and `temperature` GKD's, `loss_top_k`, `loss_add_tail` and `iw_opd_gamma` IW-OPD's.
    """
    c = config.algorithm
    check(config)
    answers = c.get("num_generations", 1)
    top_k = TopK(c.loss_top_k, c.loss_top_k_of, c.loss_add_tail) if c.loss_top_k else None

    def score(params, fixed, batch: Batch, key) -> Scores:
        told, columns = jax.lax.stop_gradient(fixed["teacher"]), batch["score_from"]
        ours, aux, _ = read(model, params, batch, columns, key, config.train.remat)
        theirs = read(teacher, told, batch, columns).hidden
        heads = model.head(params), teacher.head(told)
        if c.objective == "iw_opd":
            stats = [token_stats(x, tempered(head, c.temperature), batch["score_token"]) for x, head in zip((ours, theirs), heads)]
            tokens = {"logp": stats[0]["logp"], "teacher_logp": stats[1]["logp"]}
        else:
            tokens = divergence(ours, heads[0], theirs, heads[1], c.beta, c.temperature, top_k=top_k)
        scored = batch["score_segment"] > 0
        tokens = {name: jnp.where(scored, value, 0) for name, value in tokens.items()}
        lengths = answer_lengths(batch, answers)
        return Scores(jnp.zeros_like(lengths), lengths, tokens, aux)

    def objective(scores: Scores, batch: Batch, carry):
        mask = (batch["score_segment"] > 0) * batch.get("learn", 1.0)  # of one's own answers some may be left out
        count, total = jnp.sum(mask), lambda x: jnp.sum(x * mask)
        if c.objective == "iw_opd":
            losses, measures = sampled(scores, batch, answers, c.iw_opd_gamma)
            found = {f"iw_opd/mean_{name}": Mean(total(value), count) for name, value in measures.items()}
        else:
            losses, found = scores.tokens["divergence"], {"agreement": Mean(total(scores.tokens["agreement"]), count)}
        return {c.objective: Term(1.0, total(losses), count)}, found, carry

    if c.name != "on_policy_distillation":
        return Algorithm(score, objective, needs="supervised")
    wrote = lambda params, fixed, batch: {"old_logps": score(params, fixed, batch, None).tokens["logp"]}
    return Algorithm(score, objective, needs="prompt", rollout=wrote if c.objective == "iw_opd" else None)


def sampled(scores: Scores, batch: Batch, answers: int, gamma: float) -> tuple[Float[Array, "B S"], dict[str, Float[Array, "B S"]]]:
    """IW-OPD's loss of every token, and TRL's measures of it; who wrote is `old_logps` of the batch, else the student as it is."""
    logps = scores.tokens["logp"]
    old = batch.get("old_logps", jax.lax.stop_gradient(logps))
    advantages = jnp.where(batch["score_segment"] > 0, jax.lax.stop_gradient(scores.tokens["teacher_logp"]) - old, 0)
    member, size = answer_members(batch, answers, logps.dtype), jnp.abs(advantages)
    before = jnp.sum(jnp.cumsum(member * size[..., None], axis=1) * member, axis=-1) - size
    total = spread(sum_answers(size, batch, answers), batch)
    weight = iw_opd_weight(before, total, gamma)
    measures = {"advantage": weight * advantages, "abs_advantage": size, "weight": weight}
    return iw_opd(logps, advantages, weight), measures


def check(config: ConfigDict) -> None:
    """What the config alone can have wrong."""
    c = config.algorithm
    if c.name == "on_policy_distillation":
        check_online(config)
    check_choice("algorithm.objective", c.objective, OBJECTIVES)
    check_choice("algorithm.loss_top_k_of", c.loss_top_k_of, SUPPORTS)
    check_not_negative(c, "iw_opd_gamma", "loss_top_k")
    if not 0 <= c.beta <= 1:
        raise UserError(f"config.algorithm.beta is {c.beta}; distillation needs it in [0, 1]: 0 is forward KL, 1 reverse KL")
    if not c.temperature > 0:
        raise UserError(f"config.algorithm.temperature is {c.temperature}; it must be above 0")


def check_same_tokens(model: Model, teacher: Model) -> None:
    """The two must mean the same by every token id, and take the same pictures.

    Raises:
        UserError: they do not.
    """
    from aligner.convert import abstract_params

    name = teacher.assets.folder
    for one, what in ((model, "config.model.path"), (teacher, "config.algorithm.teacher")):
        if one.has_score_head:
            raise UserError(f"{what} {one.assets.folder} has a score head; distillation needs language models")
    vocabularies = [one.assets.tokenizer.get_vocab() for one in (model, teacher)]
    if vocabularies[0] != vocabularies[1]:
        ours, theirs = vocabularies
        token = min((token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)), key=str)
        raise UserError(
            f"config.algorithm.teacher {name} has another vocabulary than the student: {token!r} is {theirs.get(token, 'absent')} there "
            f"and {ours.get(token, 'absent')} here; distributions are compared token by token, so take a teacher of the same tokenizer"
        )
    ours, theirs = (vocabulary_size(one, abstract_params(one)) for one in (model, teacher))
    if ours != theirs:
        raise UserError(f"config.algorithm.teacher {name} gives {theirs} logits and the student {ours}; both must pad the vocabulary alike")
    if model.media != teacher.media:
        raise UserError(f"config.algorithm.teacher {name} takes other pictures than the student: {teacher.media} there, {model.media} here")


def vocabulary_size(model: Model, params) -> int:
    """How many logits a model gives; `params` may be shapes."""
    head = model.head(params)
    return head.weight.shape[0 if head.transposed else 1]
