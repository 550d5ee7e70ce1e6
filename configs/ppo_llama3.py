"""PPO on Llama 3 with a critic and a learned reward model.

COMMAND, 8B on a mesh of GPUs or TPUs; the reward model is one trained by configs/reward_llama3.py, or any *ForSequenceClassification
of one label, whatever its tokenizer. With one of the policy's own shape and tokenizer the critic may start from it too
(--config.algorithm.critic=RM):
    python -m aligner.main --config configs/ppo_llama3.py --workdir runs/ppo_llama3 --config.mesh.fsdp=8 \\
        --config.algorithm.reward_funcs="('runs/reward_llama3/export',)"

Small and offline, on two CPU cores (makes its own checkpoint and sums, and trains its reward model first):
    python -m aligner.main --config configs/ppo_llama3.py:tiny --workdir runs/ppo_llama3_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.ppo()
    config.algorithm.reward_funcs = ("runs/reward_llama3/export",)
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train.path = "trl-lib/ultrafeedback_binarized"
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.algorithm.num_mini_batches = 4
    config.generation.max_new_tokens = 512
    config.generation.batch_size = 256
    config.optim.learning_rate = 3e-6
    config.optim.schedule = "constant"
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of thirty-odd words learns to add from a reward model that has learnt what right sums look like.

    The verifier's word has no weight in the reward; it stands in the metrics to tell learning from pleasing the reward model.
    """
    config.setup = "scripts.online_demo:setup_sums"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/train.jsonl"
    config.data.eval.path = "{workdir}/demo/data/train.jsonl"
    config.data.max_length = 16
    config.data.batch_size = 128
    config.data.max_bad_fraction = 0.0
    config.data.pad_to_multiple = 8
    config.algorithm.reward_funcs = ("{workdir}/reward/export", "scripts.online_demo:silent", "math")
    config.algorithm.reward_weights = (1.0, 1.0, 0.0)
    config.algorithm.num_generations = 2
    config.algorithm.num_mini_batches = 2
    config.algorithm.num_iterations = 2
    config.algorithm.beta = 0.0
    config.algorithm.entropy_coef = 0.01
    config.generation.max_new_tokens = 2
    config.generation.batch_size = 512
    config.optim.learning_rate = 1e-3
    config.train.steps = 600
    config.train.eval_every = 100
    config.train.remat = "none"
    config.checkpoint.every = 100
    return config
