"""A reward model from Llama 3: the language model with a score head, on pairs.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/reward_llama3.py --workdir runs/reward_llama3 --config.mesh.fsdp=8

Rows: prompt, chosen, rejected, as strings or messages; one's own with --config.data.train.path=rows.jsonl --config.data.eval.path=
A column `margin` says by how much `chosen` is better. Ranked lists: --config.algorithm.loss_type=plackett_luce --config.algorithm.answers=4
More evaluation sets: config.data.evals.NAME = common.data_source() here, reported apart.

Small and offline, on two CPU cores (makes its own checkpoint and rows), then scores of a dataset:
    python -m aligner.main --config configs/reward_llama3.py:tiny --workdir runs/reward_llama3_tiny
    python -m aligner.score --model runs/reward_llama3_tiny/export --data rows.jsonl --out scored.jsonl
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.reward(), "meta-llama/Meta-Llama-3-8B-Instruct", "trl-lib/ultrafeedback_binarized", "train", "test")
    config.algorithm.center_rewards_coefficient = 0.01
    config.optim.learning_rate = 1e-5
    config = common.finish(config, preset, "llama")
    if preset:  # a second evaluation set, of rankings
        with config.unlocked():
            config.data.evals.ranked = common.data_source()
        config.data.evals.ranked.path = "{workdir}/demo/data/ranked_heldout.jsonl"
    return config
