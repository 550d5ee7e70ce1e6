"""DPO of Zephyr 7B by QLoRA, with the handbook's settings: its recipe zephyr-7b-beta/dpo/config_qlora.

COMMAND, 7B on one GPU:
    python -m aligner.main --config configs/dpo_zephyr_qlora.py --workdir runs/zephyr_qlora
    python -m aligner.convert to-hf --workdir runs/zephyr_qlora --out adapter/ --adapter

On one's own checkpoint and rows (prompt, chosen, rejected):
    python -m aligner.main --config configs/dpo_zephyr_qlora.py --workdir runs/mine --config.model.path=DIR \\
        --config.data.train.path=rows.jsonl --config.data.train.split=train --config.data.eval.path=

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/dpo_zephyr_qlora.py:tiny --workdir runs/zephyr_qlora_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.model.path = "alignment-handbook/zephyr-7b-sft-full"
    config.quant.base = "nf4"
    config.lora.rank = 128
    config.lora.alpha = 128.0
    config.lora.dropout = 0.05
    config.reference.kind = "base"
    config.algorithm.beta = 0.01
    config.data.train.path = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.train.split = "train_prefs"
    config.data.eval.path = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.eval.split = "test_prefs"
    config.data.max_length = 1024
    config.data.batch_size = 32
    config.data.max_bad_fraction = 0.2  # pairs beyond max_length are left out, not cut
    config.optim.learning_rate = 5e-6
    config.optim.schedule = "cosine"
    config.train.accumulate = 8
    config.train.remat = "full"
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of under a million parameters learns to prefer the larger of two numbers."""
    config.setup = "scripts.make_tiny_checkpoint:setup_text_demo"
    config.model.path = "{workdir}/demo/model"
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.data.train.path = "{workdir}/demo/data/pairs_train.jsonl"
    config.data.train.split = "train"
    config.data.eval.path = "{workdir}/demo/data/pairs_heldout.jsonl"
    config.data.eval.split = "train"
    config.data.max_length = 256
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 2e-3
    config.train.accumulate = 1
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 1
    return config
