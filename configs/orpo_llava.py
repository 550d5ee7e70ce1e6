"""ORPO of LLaVA-1.5 about images: likelihood and odds ratio in one, no reference.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/orpo_llava.py --workdir runs/orpo_llava --config.mesh.fsdp=8

Rows: question (or prompt), chosen, rejected and `image`; one's own with --config.data.train.path=rows.jsonl
--config.data.train.image_folder=DIR

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/orpo_llava.py:tiny --workdir runs/orpo_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.orpo(), "llava-hf/llava-1.5-7b-hf", "openbmb/RLAIF-V-Dataset")
    config.optim.learning_rate = 5e-6
    config.data.batch_size = 32
    config.optim.freeze = ("vision_tower/.*",)
    return common.finish(config, preset, "llava")
