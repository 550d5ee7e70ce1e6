"""DPO of Qwen2-Audio about sounds.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/dpo_qwen2_audio.py --workdir runs/dpo_qwen2_audio --config.mesh.fsdp=8

Rows: prompt, chosen, rejected and `audios`, the prompt with a part {"type": "audio"} for each; one's own with
--config.data.train.path=rows.jsonl --config.data.train.formatter=auto --config.data.train.image_folder=DIR
A sound longer than the 30 seconds that the model hears is dropped and counted.

Small and offline, on two CPU cores (makes its own checkpoint and sounds):
    python -m aligner.main --config configs/dpo_qwen2_audio.py:tiny --workdir runs/dpo_qwen2_audio_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.dpo(), "Qwen/Qwen2-Audio-7B-Instruct", "PKU-Alignment/align-anything")
    config.data.train.subset, config.data.train.formatter = "text-audio-to-text", "AA_TA2T"
    config.data.batch_size = 32
    config.optim.learning_rate = 1e-6
    config.optim.freeze = ("audio_tower/.*",)
    return common.finish(config, preset, "qwen2_audio")
