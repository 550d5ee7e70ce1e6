"""Distillation (arXiv 2306.13649 without sampling): the student's next-token distributions follow a teacher's on given answers."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms.grpo import check_online
from aligner.likelihood import answer_lengths
from aligner.logprobs import divergence
from aligner.types import Algorithm, Batch, Mean, Model, Scores, Term, UserError


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The teacher is opened by its headers; the run loads its weights."""
    from aligner.convert import open_model

    if not config.algorithm.teacher:
        raise UserError("config.algorithm.teacher is empty: give the teacher's checkpoint folder or Hub id")
    teacher, disk = open_model(config.algorithm.teacher)
    check_same_tokens(model, teacher)
    return dataclasses.replace(distil(config, model, teacher), others={"teacher": (teacher, disk)})


def distil(config: ConfigDict, model: Model, teacher: Model) -> Algorithm:
    """The mean over scored tokens of the divergence from `fixed["teacher"]`, with TRL's GKD names `beta` and `temperature`."""
    c = config.algorithm
    if c.name == "on_policy_distillation":
        check_online(config)
    if not 0 <= c.beta <= 1:
        raise UserError(f"config.algorithm.beta is {c.beta}; distillation needs it in [0, 1]: 0 is forward KL, 1 reverse KL")
    if not c.temperature > 0:
        raise UserError(f"config.algorithm.temperature is {c.temperature}; it must be above 0")

    def states(of: Model, params, batch: Batch, key=None, remat="none"):
        output = of.apply(params, batch, features=of.encode(params, batch, key, remat=remat), key=key, remat=remat)
        return jnp.take_along_axis(output.hidden, batch["score_from"][..., None], axis=1), output.aux

    def score(params, fixed, batch: Batch, key) -> Scores:
        ours, aux = states(model, params, batch, key, config.train.remat)
        theirs, _ = states(teacher, jax.lax.stop_gradient(fixed["teacher"]), batch)
        tokens = divergence(ours, model.head(params), theirs, teacher.head(fixed["teacher"]), c.beta, c.temperature)
        scored = batch["score_segment"] > 0
        tokens = {name: jnp.where(scored, value, 0) for name, value in tokens.items()}
        lengths = answer_lengths(batch, 1)
        return Scores(jnp.zeros_like(lengths), lengths, tokens, aux)

    def objective(scores: Scores, batch: Batch, carry):
        count = jnp.sum(batch["score_segment"] > 0)
        terms = {"divergence": Term(1.0, jnp.sum(scores.tokens["divergence"]), count)}
        return terms, {"agreement": Mean(jnp.sum(scores.tokens["agreement"]), count)}, carry

    return Algorithm(score, objective, needs="prompt" if c.name == "on_policy_distillation" else "supervised")


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
