"""Supervised fine-tuning of LLaVA-1.5 on conversations about images.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/sft_llava.py --workdir runs/sft_llava --config.mesh.fsdp=8 \\
        --config.data.train.path=llava_v1_5_mix665k.json --config.data.train.image_folder=DIR

Its rows are LLaVA's (`conversations`, `image`); messages, prompt + completion and question + answer with `image` or `images` do as well.
The projector alone, LLaVA's first stage: --config.optim.freeze="('vision_tower/.*','language_model/.*')"

Small and offline, on two CPU cores (makes its own checkpoint and pictures):
    python -m aligner.main --config configs/sft_llava.py:tiny --workdir runs/sft_llava_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.sft()
    config.model.path = "llava-hf/llava-1.5-7b-hf"
    config.data.train.path = "HuggingFaceH4/llava-instruct-mix-vsft"
    config.data.max_length = 2048
    config.data.batch_size = 64  # packed rows
    config.data.packing = True
    config.optim.learning_rate = 2e-5
    config.optim.schedule = "cosine"
    config.optim.warmup = 0.03
    config.optim.freeze = ("vision_tower/.*",)
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random LLaVA of under a million parameters learns to answer by what it sees (it imitates the chosen answers of pairs)."""
    config.setup = "scripts.make_tiny_checkpoint:setup_llava_demo"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/train.jsonl"
    config.data.eval.path = "{workdir}/demo/data/heldout.jsonl"
    config.data.max_length = 160
    config.data.batch_size = 8
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 1e-3
    config.optim.freeze = ()
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 1
    return config
