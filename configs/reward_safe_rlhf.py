"""The reward model of Safe RLHF: how helpful an answer is, whatever the harm; configs/cost_safe_rlhf.py tells that.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/reward_safe_rlhf.py --workdir runs/reward_safe_rlhf --config.mesh.fsdp=8

Rows: PKU-SafeRLHF's (prompt, response_0, response_1, better_response_id).

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/reward_safe_rlhf.py:tiny --workdir runs/reward_safe_rlhf_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.reward(), "meta-llama/Meta-Llama-3-8B-Instruct", "PKU-Alignment/PKU-SafeRLHF", "train", "test")
    config.algorithm.regularization = 0.001  # of Safe RLHF's reward and cost models
    config.optim.learning_rate = 2e-5
    return common.finish(config, preset, "llama")
