"""Supervised fine-tuning of Llama 3 by QLoRA: the frozen base in 4 bits, adapters on every linear map of its layers.

COMMAND, 8B on one GPU, then the adapter for `peft`, or merged into the unquantised base:
    python -m aligner.main --config configs/sft_llama3_qlora.py --workdir runs/sft_llama3_qlora
    python -m aligner.convert to-hf --workdir runs/sft_llama3_qlora --out adapter/ --adapter
    python -m aligner.convert to-hf --workdir runs/sft_llama3_qlora --out merged/

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/sft_llama3_qlora.py:tiny --workdir runs/sft_llama3_qlora_tiny
"""

from ml_collections import ConfigDict

from configs import common, sft_llama3


def get_config(preset: str = "") -> ConfigDict:
    return common.qlora(sft_llama3.get_config(preset), rank=16, alpha=32.0, learning_rate=2e-4, batch_size=64)
