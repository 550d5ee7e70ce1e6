"""Supervised fine-tuning of Llama 3 on conversations: loss on the assistant's turns, rows packed.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/sft_llama3.py --workdir runs/sft_llama3 --config.mesh.fsdp=8

Rows: `messages`, prompt + completion, Alpaca, ShareGPT, question + answer; one's own with
--config.data.train.path=rows.jsonl --config.data.eval.path=

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/sft_llama3.py:tiny --workdir runs/sft_llama3_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.sft(), "meta-llama/Meta-Llama-3-8B-Instruct", "HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft")
    config.data.packing = True  # batch_size counts rows: about 128k tokens a step
    config.optim.learning_rate = 2e-5
    return common.finish(config, preset, "llama", "sft")
