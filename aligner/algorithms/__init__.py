"""Algorithms by name. Each is one file with `make(config, model) -> Algorithm`."""

import dataclasses
import importlib

from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice
from aligner.models.decoder import text_config
from aligner.types import Algorithm, Mean, Model, Term, UserError

# name -> file of this folder
FILES = {name: name for name in ("dpo", "dpo_ranked", "kto", "orpo", "cpo", "tpo", "sso", "reward", "cost", "distillation", "sft")}
FILES |= {name: name for name in ("grpo", "ppo", "online_dpo", "nash_md")}
FILES |= {"cpt": "sft", "on_policy_distillation": "distillation"}
FILES |= {name: "grpo" for name in ("rloo", "reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax")}

# these learn from what the policy itself writes
ONLINE = (*(name for name, file in FILES.items() if file in ("grpo", "ppo")), "online_dpo", "nash_md", "on_policy_distillation")

SCORING = ("reward", "cost")  # these train a score head, fresh where the checkpoint has none


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    name = config.algorithm.name
    check_choice("algorithm.name", name, FILES)
    if model.has_score_head and name not in SCORING:
        raise UserError(f"config.model.path {config.model.path} has a score head, but {name!r} trains a language model")
    return with_balance(importlib.import_module(f"aligner.algorithms.{FILES[name]}").make(config, model), model)


def with_balance(algorithm: Algorithm, model: Model) -> Algorithm:
    """The algorithm with a mixture of experts' load-balance loss as one more term, where the model's config asks for it.

    It is of the whole batch (arXiv 2501.11873), so that under accumulation the objective is evaluated on all scores together.
    """
    text = text_config(model)
    experts = getattr(text, "experts", None)
    if not experts or not experts.aux_coef:
        return algorithm
    from aligner.models.moe import balance_loss

    def objective(scores, batch, carry):
        terms, metrics, carry = algorithm.objective(scores, batch, carry)
        loss = balance_loss(scores.aux, batch, text.num_hidden_layers)
        return {**terms, "router": Term(experts.aux_coef, loss, 1.0)}, {**metrics, "aux_loss": Mean(loss, 1.0)}, carry

    return dataclasses.replace(algorithm, objective=objective, whole_batch=True)
