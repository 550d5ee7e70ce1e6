"""SimPO of LLaVA-1.5 about images: rewards per token, a margin between them, no reference.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/simpo_llava.py --workdir runs/simpo_llava --config.mesh.fsdp=8

Rows: question (or prompt), chosen, rejected and `image`; one's own with --config.data.train.path=rows.jsonl
--config.data.train.image_folder=DIR
CPO is --config.algorithm.loss_type=sigmoid --config.algorithm.cpo_alpha=1.0 --config.algorithm.beta=0.1
AlphaPO is --config.algorithm.alpha=0.25

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/simpo_llava.py:tiny --workdir runs/simpo_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.simpo(), "llava-hf/llava-1.5-7b-hf", "openbmb/RLAIF-V-Dataset")
    config.algorithm.beta = 2.5  # this and gamma as the paper has them for Llama 3 8B Instruct
    config.algorithm.simpo_gamma = 1.375  # 0.55 * beta
    config.optim.learning_rate = 1e-6
    config.data.batch_size = 32
    config.optim.freeze = ("vision_tower/.*",)
    return common.finish(config, preset, "llava")
