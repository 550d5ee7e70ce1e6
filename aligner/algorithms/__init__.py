"""Algorithms by name. Each is one file with `make(config, model) -> Algorithm`."""

import difflib

from ml_collections import ConfigDict

from aligner.types import Algorithm, Model, UserError

SCORING = ("reward", "cost")  # these train a score head, fresh where the checkpoint has none


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm.name` names."""
    from aligner.algorithms import cost, distillation, dpo, reward, sft

    makers = {"dpo": dpo.make}
    makers |= {"sft": sft.make, "cpt": sft.make}
    makers |= {"reward": reward.make, "cost": cost.make, "distillation": distillation.make}
    name = config.algorithm.name
    if name not in makers:
        near = difflib.get_close_matches(str(name), makers, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"config.algorithm.name {name!r} is not an algorithm{hint} (known: {', '.join(sorted(makers))})")
    if model.has_score_head and name not in SCORING:
        raise UserError(f"config.model.path {config.model.path} has a score head, but {name!r} trains a language model")
    return makers[name](config, model)
