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
    algorithm = common.grpo()
    algorithm.reward_funcs = ("math",)
    config = common.experiment(algorithm, "llava-hf/llava-1.5-7b-hf", "rows.jsonl")  # yours; there is no set that everyone uses
    config.generation.max_new_tokens = 512
    config.optim.freeze = ("vision_tower/.*",)
    config = common.finish(config, preset, "colours")
    if preset:  # a random LLaVA of thirty-odd words learns to name colours from the reward alone
        config.algorithm.reward_funcs = ("scripts.online_demo:last_word",)
        config.algorithm.num_generations = 16
        config.algorithm.loss_type = "grpo"
        config.data.max_length = 48
        config.data.batch_size = 16
        config.generation.batch_size = 256
        config.train.steps = 300
    return config
