"""Supervised fine-tuning of Llama 3 on conversations: loss on the assistant's turns, rows packed.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/sft_llama3.py --workdir runs/sft_llama3 --config.mesh.fsdp=8

On one's own checkpoint and rows (messages, prompt + completion, Alpaca, ShareGPT, question + answer):
    python -m aligner.main --config configs/sft_llama3.py --workdir runs/mine --config.model.path=DIR \\
        --config.data.train.path=rows.jsonl

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/sft_llama3.py:tiny --workdir runs/sft_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.sft()
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train.path = "HuggingFaceH4/ultrachat_200k"
    config.data.train.split = "train_sft"
    config.data.eval.path = "HuggingFaceH4/ultrachat_200k"
    config.data.eval.split = "test_sft"
    config.data.max_length = 2048
    config.data.batch_size = 64  # packed rows: about 128k tokens a step
    config.data.packing = True
    config.data.max_bad_fraction = 0.2  # conversations beyond max_length are left out, not cut
    config.optim.learning_rate = 2e-5
    config.optim.schedule = "cosine"
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of under a million parameters learns which of two numbers is larger."""
    config.setup = "scripts.make_tiny_checkpoint:setup_text_demo"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/sft_train.jsonl"
    config.data.train.split = "train"
    config.data.eval.path = "{workdir}/demo/data/sft_heldout.jsonl"
    config.data.eval.split = "train"
    config.data.max_length = 256
    config.data.batch_size = 8
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 1e-3
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 1
    return config
