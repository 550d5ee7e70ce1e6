"""Supervised fine-tuning of Llama 3 by QLoRA: the frozen base in 4 bits, adapters on every linear map of its layers.

COMMAND, 8B on one GPU:
    python -m aligner.main --config configs/sft_llama3_qlora.py --workdir runs/sft_qlora
    python -m aligner.convert to-hf --workdir runs/sft_qlora --out adapter/ --adapter     # for peft
    python -m aligner.convert to-hf --workdir runs/sft_qlora --out merged/                # into the unquantised base

On one's own checkpoint and rows (messages, prompt + completion, Alpaca, ShareGPT, question + answer):
    python -m aligner.main --config configs/sft_llama3_qlora.py --workdir runs/mine --config.model.path=DIR \\
        --config.data.train.path=rows.jsonl

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/sft_llama3_qlora.py:tiny --workdir runs/sft_qlora_tiny
"""

from ml_collections import ConfigDict

from configs import sft_llama3


def get_config(preset: str = "") -> ConfigDict:
    config = sft_llama3.get_config(preset).unlock()
    config.quant.base = "nf4"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.optim.learning_rate = 2e-4 if not preset else 3e-3
    config.checkpoint.export = False  # merging needs the whole base in memory; the command above does it where there is enough
    if not preset:
        config.train.accumulate = 16
    return config.lock()
