"""DPO of Zephyr 7B with the alignment handbook's settings (zephyr-7b-beta/dpo/config_full), and its scan over losses and beta.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/dpo_zephyr.py --workdir runs/dpo_zephyr --config.mesh.fsdp=8

The scan (pref_align_scan) takes LOSS,BETA behind the colon; kto makes two labelled answers of each pair:
    for loss in sigmoid kto ipo; do for beta in 0.01 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9; do
        python -m aligner.main --config configs/dpo_zephyr.py:$loss,$beta --workdir runs/zephyr_scan/$loss,$beta --config.mesh.fsdp=8
    done; done

Small and offline, on two CPU cores (makes its own checkpoint and rows), also as ipo,0.5,tiny:
    python -m aligner.main --config configs/dpo_zephyr.py:tiny --workdir runs/dpo_zephyr_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    """`argument`: "", "tiny", "LOSS,BETA" or "LOSS,BETA,tiny"."""
    *scan, preset = argument.split(",") + [""] * (argument.count(",") == 1)
    loss, beta = scan or ("sigmoid", 0.01)
    algorithm = common.kto() if loss == "kto" else common.dpo()
    if loss != "kto":
        algorithm.loss_type = (loss,)
    algorithm.beta = float(beta)
    model, data = "alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized"
    config = common.experiment(algorithm, model, data, "train_prefs", "test_prefs")
    config.data.max_length = 1024
    config.data.batch_size = 128
    config.optim.learning_rate = 5e-7
    return common.finish(config, preset, "llama")
