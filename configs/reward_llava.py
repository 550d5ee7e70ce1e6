"""A reward model from LLaVA-1.5: the language model with a score head, on pairs about images.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/reward_llava.py --workdir runs/reward_llava --config.mesh.fsdp=8

Rows: question (or prompt), chosen, rejected and `image`; one's own with --config.data.train.path=rows.jsonl
--config.data.train.image_folder=DIR

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/reward_llava.py:tiny --workdir runs/reward_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.reward(), "llava-hf/llava-1.5-7b-hf", "openbmb/RLAIF-V-Dataset")
    config.algorithm.center_rewards_coefficient = 0.01
    config.optim.learning_rate = 1e-5
    config.data.batch_size = 32
    config.optim.freeze = ("vision_tower/.*",)
    return common.finish(config, preset, "llava")
