"""Supervised fine-tuning of LLaVA-1.5 on conversations about images: loss on the assistant's turns, rows packed.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/sft_llava.py --workdir runs/sft_llava --config.mesh.fsdp=8

Rows: `messages`, LLaVA's `conversations` with `image`, prompt + completion, question + answer; one's own with
--config.data.train.path=rows.jsonl --config.data.train.image_folder=DIR
The projector alone, LLaVA's first stage: --config.optim.freeze="('vision_tower/.*','language_model/.*')"

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/sft_llava.py:tiny --workdir runs/sft_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.sft(), "llava-hf/llava-1.5-7b-hf", "HuggingFaceH4/llava-instruct-mix-vsft", "train", "test")
    config.data.packing = True  # batch_size counts rows: about 128k tokens a step
    config.optim.learning_rate = 2e-5
    config.optim.warmup = 0.03
    config.optim.freeze = ("vision_tower/.*",)
    return common.finish(config, preset, "llava")
