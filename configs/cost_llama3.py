"""The cost model of Safe RLHF: how harmful an answer is, above zero harmful, below zero safe.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/cost_llama3.py --workdir runs/cost_llama3 --config.mesh.fsdp=8

Rows are PKU-SafeRLHF's (prompt, response_0, response_1, safer_response_id, is_response_0_safe, is_response_1_safe). Its reward model is
configs/reward_llama3.py with --config.data.train.path=PKU-Alignment/PKU-SafeRLHF: the formatter then takes the more helpful answer.

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/cost_llama3.py:tiny --workdir runs/cost_tiny
"""

from ml_collections import ConfigDict

from configs import common, reward_llama3


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.cost()
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    for source, split in ((config.data.train, "train"), (config.data.eval, "test")):
        source.path = "PKU-Alignment/PKU-SafeRLHF"
        source.split = split
        source.formatter = "safe_rlhf_cost"
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of under a million parameters; the smaller of two numbers counts as harmful."""
    config = reward_llama3.tiny(config)
    for source in (config.data.train, config.data.eval):
        source.formatter = "configs.cost_llama3:smaller_is_harmful"
    del config.data.evals["ranked"]
    return config


def smaller_is_harmful(row: dict):
    """A formatter: the demo's pairs with a label for each answer."""
    import dataclasses

    from aligner.data.by_columns import trl

    return dataclasses.replace(trl(row), safe=(1, -1))
