"""A reward model from LLaVA-1.5: answers about images, scored.

COMMAND, 7B on a mesh of GPUs or TPUs, public preference data (RLAIF-V keys: image, question, chosen, rejected):
    python -m aligner.main --config configs/reward_llava.py --workdir runs/reward_llava --config.mesh.fsdp=8

On one's own checkpoint and rows:
    python -m aligner.main --config configs/reward_llava.py --workdir runs/mine --config.model.path=DIR \\
        --config.data.train.path=rows.jsonl --config.data.train.image_folder=DIR

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/reward_llava.py:tiny --workdir runs/reward_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.reward()
    config.algorithm.regularization = 0.001
    config.model.path = "llava-hf/llava-1.5-7b-hf"
    config.data.train.path = "openbmb/RLAIF-V-Dataset"
    config.data.max_length = 2048
    config.data.batch_size = 32
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.optim.freeze = ("vision_tower/.*",)
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random LLaVA of under a million parameters learns to score answers by what it sees."""
    config.setup = "scripts.make_tiny_checkpoint:setup_llava_demo"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/train.jsonl"
    config.data.eval.path = "{workdir}/demo/data/heldout.jsonl"
    config.data.max_length = 128
    config.data.batch_size = 32
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 5e-4
    config.optim.schedule = "linear"
    config.optim.freeze = ()
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 1
    return config
