"""Supervised fine-tuning of Qwen2-Audio to write down speech: loss on the assistant's turns, rows packed.

COMMAND, 7B on a mesh of GPUs or TPUs:
    python -m aligner.main --config configs/sft_qwen2_audio.py --workdir runs/sft_qwen2_audio --config.mesh.fsdp=8

Rows: `messages` with <audio> where a sound of `audios` stands, prompt + completion; one's own with
--config.data.train.path=rows.jsonl --config.data.train.formatter=auto --config.data.train.image_folder=DIR
A sound longer than the 30 seconds that the model hears is dropped and counted.

Small and offline, on two CPU cores (makes its own checkpoint and sounds):
    python -m aligner.main --config configs/sft_qwen2_audio.py:tiny --workdir runs/sft_qwen2_audio_tiny
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    config = common.experiment(common.sft(), "Qwen/Qwen2-Audio-7B-Instruct", "openslr/librispeech_asr", "train.100", "validation")
    for source in (config.data.train, config.data.eval):
        source.subset, source.formatter = "clean", "LibriSpeech"
    config.data.packing = True  # batch_size counts rows: about 128k tokens a step
    config.optim.learning_rate = 1e-5
    config.optim.warmup = 0.03
    config.optim.freeze = ("audio_tower/.*",)
    return common.finish(config, preset, "qwen2_audio")
