"""DPO on LLaVA-1.5 by QLoRA: the frozen base in 4 bits, adapters on the language model; the base with its adapters off is the reference.

COMMAND, 7B on one GPU, public preference data (RLAIF-V keys: image, question, chosen, rejected):
    python -m aligner.main --config configs/dpo_llava_qlora.py --workdir runs/dpo_llava_qlora
    python -m aligner.convert to-hf --workdir runs/dpo_llava_qlora --out adapter/ --adapter     # for peft
    python -m aligner.convert to-hf --workdir runs/dpo_llava_qlora --out merged/                # into the unquantised base

On one's own checkpoint and rows:
    python -m aligner.main --config configs/dpo_llava_qlora.py --workdir runs/mine --config.model.path=DIR \\
        --config.data.train.path=rows.jsonl --config.data.train.image_folder=DIR

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/dpo_llava_qlora.py:tiny --workdir runs/qlora_tiny
"""

from ml_collections import ConfigDict

from configs import dpo_llava


def get_config(preset: str = "") -> ConfigDict:
    config = dpo_llava.get_config(preset).unlock()
    config.quant.base = "nf4"
    config.lora.rank = 128 if not preset else 8
    config.lora.alpha = 2.0 * config.lora.rank
    config.lora.dropout = 0.05
    config.reference.kind = "base"
    config.data.batch_size = 32
    config.train.accumulate = 16 if not preset else 1
    config.optim.learning_rate = 2e-5 if not preset else 2e-3
    config.checkpoint.export = False  # merging needs the whole base in memory; the command above does it where there is enough
    return config.lock()
