"""Supervised fine-tuning of Mistral 7B into Zephyr, with the alignment handbook's settings: its recipe zephyr-7b-beta/sft/config_full.

COMMAND, 7B on a mesh of GPUs or TPUs, then configs/dpo_zephyr.py:
    python -m aligner.main --config configs/sft_zephyr.py --workdir runs/sft_zephyr --config.mesh.fsdp=8

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/sft_zephyr.py:tiny --workdir runs/sft_zephyr_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.sft(), "mistralai/Mistral-7B-v0.1", "HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft")
    config.data.packing = True
    config.data.batch_size = 128
    config.data.loss_on = "all"  # as the handbook, which masks nothing
    config.optim.learning_rate = 2e-5
    return common.finish(config, preset, "llama", "sft")
