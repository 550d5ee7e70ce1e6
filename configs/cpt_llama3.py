"""Continued pre-training of Llama 3 on running text: documents one after another, cut into full rows, none seeing another.

COMMAND, 8B on a mesh of GPUs or TPUs, on a folder of .txt files or rows with a column `text`:
    python -m aligner.main --config configs/cpt_llama3.py --workdir runs/cpt_llama3 --config.mesh.fsdp=8 \\
        --config.data.train.path=DIR --config.data.train.sample_by=document

Small and offline, on two CPU cores (makes its own checkpoint and text):
    python -m aligner.main --config configs/cpt_llama3.py:tiny --workdir runs/cpt_llama3_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.cpt(), "meta-llama/Meta-Llama-3-8B", "Salesforce/wikitext")
    config.data.train.subset = "wikitext-103-raw-v1"
    config.data.max_length = 4096  # of a row: 256k tokens a step
    config.data.max_bad_fraction = 0.6  # wikitext's empty lines
    config.optim.learning_rate = 1e-5
    config.optim.weight_decay = 0.1
    config.optim.beta2 = 0.95
    return common.finish(config, preset, "llama", "text")
