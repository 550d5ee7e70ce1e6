"""GRPO on LLaVA-1.5: questions about pictures, answers judged by a function.

COMMAND, 7B on a mesh of GPUs or TPUs, rows with `image`, `prompt`, and what the reward function reads:
    python -m aligner.main --config configs/grpo_llava.py --workdir runs/grpo_llava --config.mesh.fsdp=8 \\
        --config.data.train.path=rows.jsonl --config.data.train.image_folder=DIR

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/grpo_llava.py:tiny --workdir runs/grpo_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.grpo()
    config.algorithm.reward_funcs = ("math",)
    config.model.path = "llava-hf/llava-1.5-7b-hf"
    config.data.train.path = "rows.jsonl"  # yours; there is no set that everyone uses
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.generation.max_new_tokens = 512
    config.generation.batch_size = 256
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "constant"
    config.optim.freeze = ("vision_tower/.*",)
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random LLaVA of thirty-odd words learns to name colours from the reward alone."""
    config.setup = "scripts.online_demo:setup_colours"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/train.jsonl"
    config.data.eval.path = "{workdir}/demo/data/heldout.jsonl"
    config.data.max_length = 48
    config.data.batch_size = 16
    config.data.pad_to_multiple = 8
    config.algorithm.reward_funcs = ("scripts.online_demo:last_word",)
    config.algorithm.num_generations = 16
    config.algorithm.loss_type = "grpo"
    config.generation.max_new_tokens = 2
    config.generation.batch_size = 256
    config.optim.learning_rate = 1e-3
    config.optim.freeze = ()
    config.train.steps = 300
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    return config
