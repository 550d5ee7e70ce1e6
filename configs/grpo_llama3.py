"""GRPO on Llama 3: mathematics by a verifier. RLOO and the others by `config.algorithm`, see configs/online.py.

COMMAND, 8B on a mesh of GPUs or TPUs (GSM8K: question, answer; the number after #### is compared):
    python -m aligner.main --config configs/grpo_llama3.py --workdir runs/grpo_llama3 --config.mesh.fsdp=8

On one's own prompts (`prompt`, and `answer` or any column that the reward function reads) and reward function:
    python -m aligner.main --config configs/grpo_llama3.py --workdir runs/mine --config.model.path=DIR \\
        --config.data.train.path=prompts.jsonl --config.algorithm.reward_funcs="('my_rewards:short',)"

Small and offline, on two CPU cores (makes its own checkpoint and sums), by GRPO and by RLOO:
    python -m aligner.main --config configs/grpo_llama3.py:tiny --workdir runs/grpo_llama3_tiny
    python -m aligner.main --config configs/grpo_llama3.py:tiny_rloo --workdir runs/rloo_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    algorithm = common.rloo() if preset == "tiny_rloo" else common.grpo()
    algorithm.reward_funcs = ("math",)
    config = common.experiment(algorithm, "meta-llama/Meta-Llama-3-8B-Instruct", "openai/gsm8k", held_out="test")
    config.data.train.subset = config.data.eval.subset = "main"
    config.generation.max_new_tokens = 1024
    config = common.finish(config, "tiny" if preset == "tiny_rloo" else preset, "sums")
    if preset:  # a random Llama of thirty-odd words learns to add from the verifier alone
        config.algorithm.num_generations = 16
        config.algorithm.loss_type = "grpo"
        config.algorithm.beta = 0.0
        config.data.max_length = 16
        config.data.batch_size = 32
        config.train.steps = 400
    return config
