"""Continued pre-training of Llama 3 on running text: documents one after another, cut into full rows, none seeing another.

COMMAND, 8B on a mesh of GPUs or TPUs, on a folder of .txt files or rows with a column `text`:
    python -m aligner.main --config configs/cpt_llama3.py --workdir runs/cpt_llama3 --config.mesh.fsdp=8 \\
        --config.data.train.path=DIR --config.data.train.sample_by=document

Small and offline, on two CPU cores (makes its own checkpoint and text):
    python -m aligner.main --config configs/cpt_llama3.py:tiny --workdir runs/cpt_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.base()
    config.algorithm = common.sft()
    config.algorithm.name = "cpt"
    config.model.path = "meta-llama/Meta-Llama-3-8B"
    config.data.train.path = "Salesforce/wikitext"
    config.data.train.subset = "wikitext-103-raw-v1"
    config.data.max_length = 4096
    config.data.batch_size = 64  # rows: about 256k tokens a step
    config.data.max_bad_fraction = 0.6  # wikitext's empty lines
    config.optim.learning_rate = 1e-5
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 0.1
    config.optim.beta2 = 0.95
    config.train.remat = "full"
    config.checkpoint.export = True
    return common.apply_preset(config, preset, {"tiny": tiny})


def tiny(config: ConfigDict) -> ConfigDict:
    """A random Llama of under a million parameters reads sentences about numbers."""
    config.setup = "scripts.make_tiny_checkpoint:setup_text_demo"
    config.model.path = "{workdir}/demo/model"
    config.model.dtype = "float32"
    config.data.train.path = "{workdir}/demo/data/text_train.txt"
    config.data.train.subset = None
    config.data.eval.path = "{workdir}/demo/data/text_heldout.txt"
    config.data.max_length = 128
    config.data.batch_size = 8
    config.data.pad_to_multiple = 8
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.0
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.remat = "none"
    config.checkpoint.every = 50
    config.log.every = 1
    return config
