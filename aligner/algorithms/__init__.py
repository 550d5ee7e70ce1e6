"""Algorithms by name. Each is one file with `make(config, model) -> Algorithm`."""

import importlib

from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice
from aligner.types import Algorithm, Model

NAMES = ("dpo", "dpo_ranked", "kto", "orpo", "cpo", "sso")  # files of this folder


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    check_choice("algorithm.name", config.algorithm.name, NAMES)
    return importlib.import_module(f"aligner.algorithms.{config.algorithm.name}").make(config, model)
