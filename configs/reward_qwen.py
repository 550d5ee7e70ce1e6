"""A reward model from Qwen 2.5: the language model with a score head, on pairs.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/reward_qwen.py --workdir runs/reward_qwen --config.mesh.fsdp=8

Rows: prompt, chosen, rejected, as strings or messages; one's own with --config.data.train.path=rows.jsonl --config.data.eval.path=

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/reward_qwen.py:tiny --workdir runs/reward_qwen_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.reward(), "Qwen/Qwen2.5-7B-Instruct", "trl-lib/ultrafeedback_binarized", "train", "test")
    config.algorithm.center_rewards_coefficient = 0.01
    config.optim.learning_rate = 1e-5
    return common.finish(config, preset, "qwen")
