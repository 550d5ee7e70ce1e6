"""A reward model from Llama 3: the language model with a score head, on pairs.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/reward_llama3.py --workdir runs/reward_llama3 --config.mesh.fsdp=8

On one's own checkpoint and pairs (a column `margin` says by how much `chosen` is better), with several evaluation sets: make a config
file that sets `config.data.evals.NAME = common.data_source()` for each. Ranked lists:
    python -m aligner.main --config configs/reward_llama3.py --workdir runs/ranked --config.data.train.path=ranked.json \\
        --config.algorithm.loss_type=plackett_luce --config.algorithm.answers=4

Small and offline, on two CPU cores (makes its own checkpoint and rows), then scores of a dataset:
    python -m aligner.main --config configs/reward_llama3.py:tiny --workdir runs/reward_tiny
    python -m aligner.score --model runs/reward_tiny/export --data runs/reward_tiny/demo/data/pairs_heldout.jsonl --out scored.jsonl
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.reward()
    config.algorithm.center_rewards_coefficient = 0.01
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train.path = "trl-lib/ultrafeedback_binarized"
    config.data.eval.path = "trl-lib/ultrafeedback_binarized"
    config.data.eval.split = "test"
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.data.max_bad_fraction = 0.2  # pairs beyond max_length are left out, not cut
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of under a million parameters learns which of two numbers is larger; evaluated on pairs and on rankings."""
    config.setup = "scripts.make_tiny_checkpoint:setup_text_demo"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/pairs_train.jsonl"
    config.data.eval.path = "{workdir}/demo/data/pairs_heldout.jsonl"
    config.data.eval.split = "train"
    config.data.evals.ranked = common.data_source()
    config.data.evals.ranked.path = "{workdir}/demo/data/ranked_heldout.jsonl"
    config.data.max_length = 128
    config.data.batch_size = 16
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "linear"
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 1
    return config
