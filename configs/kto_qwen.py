"""KTO of Qwen 2.5, on answers that are labelled good or bad.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/kto_qwen.py --workdir runs/kto_qwen --config.mesh.fsdp=8

Rows: prompt, completion, label; a pair (chosen, rejected) makes two; one's own with
--config.data.train.path=rows.jsonl --config.data.eval.path=

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/kto_qwen.py:tiny --workdir runs/kto_qwen_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.kto(), "Qwen/Qwen2.5-7B-Instruct", "trl-lib/kto-mix-14k", "train", "test")
    config.optim.learning_rate = 5e-7
    return common.finish(config, preset, "qwen", "unpaired")
