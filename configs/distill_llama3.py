"""Distillation: a small model follows a large one's next-token distributions on given answers.

COMMAND, 70B into 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/distill_llama3.py --workdir runs/distill_llama3 --config.mesh.fsdp=64

The two must share a tokenizer: --config.model.path=DIR --config.algorithm.teacher=DIR. Rows: as configs/sft_llama3.py takes them.
Forward KL: --config.algorithm.beta=0.0, reverse KL: 1.0

Small and offline, on two CPU cores (makes its own checkpoints and rows):
    python -m aligner.main --config configs/distill_llama3.py:tiny --workdir runs/distill_llama3_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    student, teacher = "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct"
    config = common.experiment(common.distillation(), student, "HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft")
    config.algorithm.teacher = teacher
    config.optim.learning_rate = 2e-5
    config = common.finish(config, preset, "llama", "sft")
    if preset:  # the demo's teacher has other weights and another width
        config.setup = "scripts.make_tiny_checkpoint:setup_teacher_demo"
        config.algorithm.teacher = "{workdir}/demo/teacher"
    return config
