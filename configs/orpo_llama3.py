"""ORPO of Llama 3: likelihood and odds ratio in one, no reference.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/orpo_llama3.py --workdir runs/orpo_llama3 --config.mesh.fsdp=8

Rows: prompt, chosen, rejected, as strings or messages; one's own with --config.data.train.path=rows.jsonl --config.data.eval.path=

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/orpo_llama3.py:tiny --workdir runs/orpo_llama3_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.orpo(), "meta-llama/Meta-Llama-3-8B-Instruct", "trl-lib/ultrafeedback_binarized", "train", "test")
    config.optim.learning_rate = 5e-6
    return common.finish(config, preset, "llama")
