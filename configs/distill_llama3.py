"""Distillation: a small model follows a large one's next-token distributions on given answers.

COMMAND, 70B into 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/distill_llama3.py --workdir runs/distill --config.mesh.fsdp=64

On one's own checkpoints and rows (messages, prompt + completion, ...); the two must share a tokenizer:
    python -m aligner.main --config configs/distill_llama3.py --workdir runs/mine --config.model.path=DIR --config.algorithm.teacher=DIR \\
        --config.data.train.path=rows.jsonl --config.algorithm.beta=0.0

Small and offline, on two CPU cores (makes its own checkpoints and rows):
    python -m aligner.main --config configs/distill_llama3.py:tiny --workdir runs/distill_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.distillation()
    config.algorithm.teacher = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train.path = "HuggingFaceH4/ultrachat_200k"
    config.data.train.split = "train_sft"
    config.data.eval.path = "HuggingFaceH4/ultrachat_200k"
    config.data.eval.split = "test_sft"
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.data.max_bad_fraction = 0.2  # conversations beyond max_length are left out, not cut
    config.optim.learning_rate = 2e-5
    config.optim.schedule = "cosine"
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of under a million parameters follows another random one."""
    config.setup = "configs.distill_llama3:setup"
    config.algorithm.teacher = "{workdir}/demo/teacher"
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


def setup(config: ConfigDict) -> None:
    """The text demo, and a teacher of other weights and another width."""
    from pathlib import Path

    from scripts.make_tiny_checkpoint import make_llama, setup_text_demo

    setup_text_demo(config)
    if not Path(config.algorithm.teacher).exists():
        make_llama(config.algorithm.teacher, seed=config.seed + 1, hidden_size=64)
        print(f"made another small Llama in {config.algorithm.teacher} (from code, seed {config.seed + 1})", flush=True)
