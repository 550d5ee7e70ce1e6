"""SimPO of Llama 3: rewards per token, a margin between them, no reference.

COMMAND, 8B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/simpo_llama3.py --workdir runs/simpo_llama3 --config.mesh.fsdp=8

Rows: prompt, chosen, rejected, as strings or messages; one's own with --config.data.train.path=rows.jsonl --config.data.eval.path=
CPO is --config.algorithm.loss_type=sigmoid --config.algorithm.cpo_alpha=1.0 --config.algorithm.beta=0.1
AlphaPO is --config.algorithm.alpha=0.25

Small and offline, on two CPU cores (makes its own checkpoint and rows):
    python -m aligner.main --config configs/simpo_llama3.py:tiny --workdir runs/simpo_llama3_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.simpo(), "meta-llama/Meta-Llama-3-8B-Instruct", "trl-lib/ultrafeedback_binarized", "train", "test")
    config.algorithm.beta = 2.5  # this and gamma as the paper has them for Llama 3 8B Instruct
    config.algorithm.simpo_gamma = 1.375  # 0.55 * beta
    config.optim.learning_rate = 1e-6
    return common.finish(config, preset, "llama")
