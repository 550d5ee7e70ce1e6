"""Qwen2-Audio (arXiv 2407.10759): Whisper's encoder, whose positions are averaged two by two, and a matrix to the decoder's width."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from aligner.models import decoder, vlm, whisper
from aligner.models.layers import Linear
from aligner.models.pictures import Picture, Shown
from aligner.types import Batch, Media, Model


@dataclasses.dataclass(frozen=True)
class Qwen2AudioConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    audio_config: whisper.WhisperConfig
    audio_token_index: int


def config_from_hf(hf: Any) -> Qwen2AudioConfig:
    """Read a `Qwen2AudioConfig`."""
    vlm.check_part(hf, hf.audio_config.model_type, ("qwen2_audio_encoder",))
    text = vlm.read_text(hf, tie_word_embeddings=False)  # `transformers` ties nothing here, whatever the config says
    return Qwen2AudioConfig(text, whisper.read(hf.audio_config, pool=2), hf.audio_token_index)


def placeholders(frames: int) -> int:
    """How many features a sound of so many frames has: those left after every halving."""
    return (frames + 1) // 2 // 2


def pictures(processed: Mapping[str, Any]) -> list[Picture]:
    """The feature extractor's sounds, [n, bands, frames] with a mask [n, frames]: a slot each."""
    made = []
    for bands, mask in zip(processed["input_features"], processed["feature_attention_mask"]):
        frames = int(np.sum(mask))
        slot = {"pixel_values": np.asarray(bands).T[None], "frames": np.array([frames], np.int32)}
        made.append(Picture(slot, np.arange(placeholders(frames)), kind="audio"))
    return made


def show(size: tuple[int, int], assets: Any, count: int) -> Shown:
    """Of a spectrogram of so many (frames, bands)."""
    return Shown(1, (placeholders(size[0]),), kind="audio")


def make(hf: Any) -> Model:
    """A Qwen2-Audio model from its Hugging Face config."""
    config = config_from_hf(hf)
    audio, projector = config.audio_config, Linear(config.text_config.hidden_size, True)
    window = (audio.frames, audio.num_mel_bins)

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        with jax.named_scope("audio_tower"):
            heard = vlm.flat_images(batch, params["audio_tower"]["conv1"]["kernel"].dtype), batch["frames"].reshape(-1)
            states = whisper.WhisperEncoder(audio, remat).apply({"params": params["audio_tower"]}, *heard, rngs=rngs)
        features = projector.apply({"params": params["multi_modal_projector"]["linear"]}, states, rngs=rngs)
        return features.reshape(len(batch["pixel_values"]), -1, features.shape[-1])

    return vlm.assemble(
        hf,
        config,
        parts={"audio_tower": vlm.module_params(whisper.WhisperEncoder(audio), (1, *window), (1,)),
               "multi_modal_projector/linear": vlm.module_params(projector, (1, audio.layers.hidden_size))},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.llava_names, [whisper.names("audio_tower/", "audio_tower.")],
                                  **vlm.llava_renames("audio_tower.", "audio_tower|multi_modal_projector")),
        media=Media(config.audio_token_index, audio.features, *window, pictures=pictures, show=show, kind="audio",
                    slot={"pixel_values": (window, np.float32), "frames": ((), np.int32)}),
    )  # fmt: skip
