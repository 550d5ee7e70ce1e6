"""Algorithms by name. Each is one file with `make(config, model) -> Algorithm`."""

import importlib

from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice
from aligner.types import Algorithm, Model

# name -> file of this folder
FILES = {name: name for name in ("dpo", "dpo_ranked", "kto", "orpo", "cpo", "sso", "sft")} | {"cpt": "sft"}


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    name = config.algorithm.name
    check_choice("algorithm.name", name, FILES)
    return importlib.import_module(f"aligner.algorithms.{FILES[name]}").make(config, model)
