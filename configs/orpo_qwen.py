"""ORPO of Qwen 2.5: likelihood and odds ratio in one, no reference.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/orpo_qwen.py --workdir runs/orpo_qwen --config.mesh.fsdp=8

Rows: prompt, chosen, rejected, as strings or messages; one's own with --config.data.train.path=rows.jsonl --config.data.eval.path=

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/orpo_qwen.py:tiny --workdir runs/orpo_qwen_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.orpo(), "Qwen/Qwen2.5-7B-Instruct", "trl-lib/ultrafeedback_binarized", "train", "test")
    config.optim.learning_rate = 5e-6
    return common.finish(config, preset, "qwen")
