"""Algorithms by name. Each is one file with `make(config, model) -> Algorithm`."""

import dataclasses
import difflib

from ml_collections import ConfigDict

from aligner.types import Algorithm, Mean, Model, Term, UserError


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    from aligner.algorithms import dpo

    makers = {"dpo": dpo.make}
    name = config.algorithm.name
    if name not in makers:
        near = difflib.get_close_matches(str(name), makers, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config.algorithm.name {name!r} is not an algorithm{hint} (known: {', '.join(sorted(makers))})")
    return with_balance(makers[name](config, model), model)


def with_balance(algorithm: Algorithm, model: Model) -> Algorithm:
    """The algorithm with a mixture of experts' load-balance loss as one more term, where the model's config asks for it.

    It is of the whole batch (arXiv 2501.11873), so that under accumulation the objective is evaluated on all scores together.
    """
    text = getattr(model.config, "text_config", model.config)
    experts = getattr(text, "experts", None)
    if not experts or not experts.aux_coef:
        return algorithm
    from aligner.models.moe import balance_loss

    def objective(scores, batch, carry):
        terms, metrics, carry = algorithm.objective(scores, batch, carry)
        loss = balance_loss(scores.aux, batch, text.num_hidden_layers)
        return {**terms, "router": Term(experts.aux_coef, loss, 1.0)}, {**metrics, "aux_loss": Mean(loss, 1.0)}, carry

    return dataclasses.replace(algorithm, objective=objective, whole_batch=True)
