"""DPO of Zephyr 7B by QLoRA with the alignment handbook's settings: its recipe zephyr-7b-beta/dpo/config_qlora.

COMMAND, 7B on one GPU, then the adapter for `peft`:
    python -m aligner.main --config configs/dpo_zephyr_qlora.py --workdir runs/dpo_zephyr_qlora
    python -m aligner.convert to-hf --workdir runs/dpo_zephyr_qlora --out adapter/ --adapter

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/dpo_zephyr_qlora.py:tiny --workdir runs/dpo_zephyr_qlora_tiny
"""

from ml_collections import ConfigDict

from configs import common, dpo_zephyr


def get_config(argument: str = "") -> ConfigDict:
    return common.qlora(dpo_zephyr.get_config(argument), rank=128, alpha=128.0, learning_rate=5e-6, batch_size=16)
