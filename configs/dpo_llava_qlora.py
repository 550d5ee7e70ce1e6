"""DPO on LLaVA-1.5 by QLoRA: the frozen base in 4 bits, its output with the adapters off is the reference.

COMMAND, 7B on one GPU, public preference data (RLAIF-V keys), then the adapter for `peft`, or merged into the unquantised base:
    python -m aligner.main --config configs/dpo_llava_qlora.py --workdir runs/dpo_llava_qlora
    python -m aligner.convert to-hf --workdir runs/dpo_llava_qlora --out adapter/ --adapter
    python -m aligner.convert to-hf --workdir runs/dpo_llava_qlora --out merged/

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/dpo_llava_qlora.py:tiny --workdir runs/dpo_llava_qlora_tiny
"""

from ml_collections import ConfigDict

from configs import common, dpo_llava


def get_config(preset: str = "") -> ConfigDict:
    return common.qlora(dpo_llava.get_config(preset), rank=128, alpha=256.0, learning_rate=2e-5, batch_size=32)
