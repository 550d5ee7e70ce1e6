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
    algorithm = common.ppo()
    algorithm.reward_funcs = ("runs/reward_llama3/export",)
    algorithm.num_mini_batches = 4
    config = common.experiment(algorithm, "meta-llama/Meta-Llama-3-8B-Instruct", "trl-lib/ultrafeedback_binarized")
    config.generation.max_new_tokens = 512
    config.optim.learning_rate = 3e-6
    config = common.finish(config, preset, "sums")
    if preset:  # a random Llama of thirty-odd words learns to add from a reward model that has learnt what right sums look like
        # the verifier's word has no weight in the reward; it stands in the metrics to tell learning from pleasing the reward model
        config.algorithm.reward_funcs = ("{workdir}/reward/export", "scripts.online_demo:silent", "math")
        config.algorithm.reward_weights = (1.0, 1.0, 0.0)
        config.algorithm.num_generations = 2
        config.algorithm.num_mini_batches = 2
        config.algorithm.num_iterations = 2
        config.algorithm.beta = 0.0
        config.algorithm.entropy_coef = 0.03
        config.algorithm.missing_eos_penalty = 1.0  # answers that end are what the reward model knows best
        config.data.max_length = 16
        config.data.batch_size = 128
        config.data.max_bad_fraction = 0.0
        config.train.steps = 600
        config.train.eval_every = 100
        config.checkpoint.every = 100
    return config
