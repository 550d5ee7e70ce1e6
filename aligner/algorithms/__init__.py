"""Algorithms by name. Each is one file with `make(config, model) -> Algorithm`."""

import importlib

from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice
from aligner.types import Algorithm, Model, UserError

# name -> file of this folder
FILES = {name: name for name in ("dpo", "dpo_ranked", "kto", "orpo", "cpo", "sso", "reward", "cost", "distillation", "sft")}
FILES |= {"cpt": "sft"}

SCORING = ("reward", "cost")  # these train a score head, fresh where the checkpoint has none


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    name = config.algorithm.name
    check_choice("algorithm.name", name, FILES)
    if model.has_score_head and name not in SCORING:
        raise UserError(f"config.model.path {config.model.path} has a score head, but {name!r} trains a language model")
    return importlib.import_module(f"aligner.algorithms.{FILES[name]}").make(config, model)
