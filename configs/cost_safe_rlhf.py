"""The cost model of Safe RLHF: how harmful an answer is, above zero harmful, below zero safe.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/cost_safe_rlhf.py --workdir runs/cost_safe_rlhf --config.mesh.fsdp=8

Rows: PKU-SafeRLHF's (prompt, response_0, response_1, safer_response_id, is_response_0_safe, is_response_1_safe).

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/cost_safe_rlhf.py:tiny --workdir runs/cost_safe_rlhf_tiny
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.cost(), "meta-llama/Meta-Llama-3-8B-Instruct", "PKU-Alignment/PKU-SafeRLHF", "train", "test")
    config.optim.learning_rate = 1e-5
    config = common.finish(config, preset, "llama")
    for source in (config.data.train, config.data.eval):
        source.formatter = "configs.cost_safe_rlhf:smaller_is_harmful" if preset else "safe_rlhf_cost"
    return config


def smaller_is_harmful(row: dict):
    """A formatter: the demo's pairs with a label for each answer."""
    from aligner.data.by_columns import trl

    return dataclasses.replace(trl(row), safe=(1, -1))
