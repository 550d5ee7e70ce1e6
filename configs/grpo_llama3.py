"""GRPO on Llama 3: mathematics by a verifier. RLOO and the others by `config.algorithm`, see configs/common.py.

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
    config = common.base()
    config.algorithm = common.grpo()
    config.algorithm.reward_funcs = ("math",)
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train.path = "openai/gsm8k"
    config.data.train.subset = "main"
    config.data.eval.path = "openai/gsm8k"
    config.data.eval.subset = "main"
    config.data.eval.split = "test"
    config.data.max_length = 2048
    config.data.batch_size = 64
    config.generation.max_new_tokens = 1024
    config.generation.batch_size = 256
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "constant"
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny, "tiny_rloo": tiny_rloo})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of thirty-odd words learns to add from the verifier alone."""
    config.setup = "scripts.online_demo:setup_sums"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train = common.data_source()
    config.data.train.path = "{workdir}/demo/data/train.jsonl"
    config.data.eval = common.data_source()
    config.data.eval.path = "{workdir}/demo/data/train.jsonl"  # all the sums there are, answered greedily
    config.data.max_length = 16
    config.data.batch_size = 32
    config.data.pad_to_multiple = 8
    config.algorithm.num_generations = 16
    config.algorithm.loss_type = "grpo"
    config.generation.max_new_tokens = 2
    config.generation.batch_size = 512
    config.optim.learning_rate = 1e-3
    config.train.steps = 400
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 10
    return config


def tiny_rloo(config: ConfigDict) -> ConfigDict:
    """The same by RLOO."""
    config.algorithm = common.rloo()
    config.algorithm.reward_funcs = ("math",)
    config = tiny(config)
    config.algorithm.beta = 0.0
    return config
