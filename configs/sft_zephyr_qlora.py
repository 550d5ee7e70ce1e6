"""Supervised fine-tuning of Mistral 7B by QLoRA with the alignment handbook's settings: its recipe zephyr-7b-beta/sft/config_qlora.

COMMAND, 7B on one GPU, then the adapter for `peft`:
    python -m aligner.main --config configs/sft_zephyr_qlora.py --workdir runs/sft_zephyr_qlora
    python -m aligner.convert to-hf --workdir runs/sft_zephyr_qlora --out adapter/ --adapter

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/sft_zephyr_qlora.py:tiny --workdir runs/sft_zephyr_qlora_tiny
"""

from ml_collections import ConfigDict

from configs import common, sft_zephyr


def get_config(preset: str = "") -> ConfigDict:
    return common.qlora(sft_zephyr.get_config(preset), rank=16, alpha=16.0, learning_rate=2e-4, batch_size=8)
