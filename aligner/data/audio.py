"""Sounds: from whatever a row holds to a waveform at the model's rate, and to the log-mel spectrogram that Whisper's kin hear."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data.media import encoded_bytes
from aligner.data.samples import Bad
from aligner.types import UserError

# What libsndfile notes of a file that ends too early: WAV, AIFF, AU, W64 and RF64 say how many bytes they hold
_CUT = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (?P<said>\d+) \(should be (?P<there>\d+)\)", re.MULTILINE)
_ENDLESS = "Last page lacks an end-of-stream bit"  # and of an Ogg stream
_STREAMED = 2e9  # bytes; programs that write to a pipe do not know how many will come, and say as many as can be
RATE = 16_000  # samples a second that speech encoders take


def load_audio(reference: Any, folder: str | Path, rate: int = RATE) -> np.ndarray:
    """Decode a sound.

    Args:
        reference: a path (relative to `folder`), encoded bytes, {"bytes", "path"}, or {"array", "sampling_rate"} as `datasets` has them.
        folder: where paths are looked up; paths that leave it are refused.
        rate: samples a second of the result.

    Returns:
        float32 [n], channels averaged.

    Raises:
        Bad: it cannot be found, decoded, or may not be read.
        UserError: a package is missing.
    """
    if isinstance(reference, dict) and reference.get("array") is not None:
        samples, found = _given(reference["array"], reference.get("sampling_rate"))
    else:
        samples, found = _decoded(encoded_bytes(reference, folder, "audio"))
    if not len(samples) or not np.isfinite(samples).all():
        raise Bad("unreadable audio", "it holds no samples, or numbers that are not finite")
    return samples if found == rate else _package("soxr").resample(samples, found, rate).astype(np.float32)


def _given(array: Any, rate: Any) -> tuple[np.ndarray, int]:
    try:
        samples, rate = np.asarray(array, np.float32), int(rate)
    except (TypeError, ValueError) as error:
        raise Bad("unreadable audio", f"its array and sampling_rate are no numbers ({error})") from error
    if samples.ndim not in (1, 2) or rate < 1:
        raise Bad("unreadable audio", f"an array of shape {samples.shape} at a sampling_rate of {rate}")
    return samples if samples.ndim == 1 else samples.mean(axis=int(samples.shape[0] > samples.shape[1])), rate


def _decoded(data: bytes) -> tuple[np.ndarray, int]:
    soundfile = _package("soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            samples, rate, said, log = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames, file.extra_info
    except (soundfile.SoundFileError, RuntimeError) as error:
        # the library's own message names an object in memory
        detail = getattr(error, "error_string", str(error))
        if getattr(error, "code", None) == 1:  # AAC in an .m4a, say
            detail = "no audio format that is read; those are WAV, FLAC, MP3, Ogg, AIFF and their like"
        raise Bad("unreadable audio", detail) from error
    cut = _CUT.search(log)
    if cut and int(cut["there"]) < 0.99 * int(cut["said"]) < _STREAMED:  # headers are often wrong by some bytes
        raise Bad("unreadable audio", f"it is cut short: {cut['there']} of the {cut['said']} bytes that its header says are there")
    if len(samples) < 0.99 * said and _mp3_is_told(data):
        raise Bad("unreadable audio", f"it is cut short: {len(samples)} of the {said} samples that its header says are there")
    if _ENDLESS in log:
        raise Bad("unreadable audio", "it is cut short: its last page does not end the stream")
    return samples.mean(axis=1), rate


def _mp3_is_told(data: bytes) -> bool:
    """Whether the first frame of an MP3 says how many follow; else its length is a guess, far off where the bit rate varies."""
    tags = 10 + sum((byte & 127) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0))) if data[:3] == b"ID3" else 0
    return re.search(b"Xing|Info|VBRI", data[tags : tags + 4096]) is not None


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        raise UserError(f"audio needs the package {name}; pip install aligner[audio].") from None


def frames(samples: np.ndarray, extractor: Any) -> int:
    """How many frames of a spectrogram stand for a waveform.

    Args:
        samples: float [n] at RATE.
        extractor: the checkpoint's feature extractor, for its settings.

    Raises:
        Bad: it is longer than what the model hears; nothing of it is cut off unseen.
    """
    if len(samples) > extractor.chunk_length * RATE:
        raise Bad("audio too long", f"{len(samples) / RATE:.1f} seconds, the model hears {extractor.chunk_length} at most")
    return -(-len(samples) // extractor.hop_length)


def features(samples: np.ndarray, extractor: Any) -> dict[str, np.ndarray]:
    """What a checkpoint's feature extractor (Whisper's) returns for a waveform at RATE, by `log_mel`.

    Returns:
        `input_features` float32 [1, bands, frames] of its whole window, `feature_attention_mask` int32 [1, frames], 1 where there is sound.

    Raises:
        Bad: it is too long.
    """
    x = extractor
    heard = frames(samples, x)
    bands = log_mel(samples, x.feature_size, x.chunk_length, x.n_fft, x.hop_length)
    mask = np.arange(bands.shape[1]) < heard
    return {"input_features": bands[None], "feature_attention_mask": mask[None].astype(np.int32)}


def log_mel(samples: np.ndarray, mels: int = 80, seconds: float = 30.0, width: int = 400, hop: int = 160) -> np.ndarray:
    """The log-mel spectrogram of a waveform at 16 kHz, cut or padded with silence to `seconds` (arXiv 2212.04356, 2.2).

    Args:
        samples: float [n].
        mels: number of bands, 80 or 128.
        seconds: length of the window.
        width: samples of a frame.
        hop: samples from a frame to the next.

    Returns:
        float32 [mels, seconds * 16000 / hop], about -1..1: log10 of the power, at most 8 below its maximum, then (x + 4) / 4.
    """
    length = int(seconds * RATE)
    samples = np.pad(samples[:length].astype(np.float64), (0, max(0, length - len(samples))))
    framed = np.lib.stride_tricks.sliding_window_view(np.pad(samples, width // 2, mode="reflect"), width)[::hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    power = np.abs(np.fft.rfft(framed * window).astype(np.complex64)).astype(np.float64) ** 2
    logs = np.log10(np.maximum(power[:-1] @ mel_filters(mels, width).T, 1e-10)).T
    return ((np.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


@functools.cache
def mel_filters(mels: int, width: int = 400, rate: int = RATE) -> np.ndarray:
    """[mels, width / 2 + 1]: triangles on Slaney's scale (linear to 1 kHz, then logarithmic) up to half the rate, each of area 1."""
    step = np.log(6.4) / 27

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))

    top = 15 + np.log(rate / 2 / 1000) / step
    edges = to_hertz(np.linspace(0, top, mels + 2))
    bins = np.fft.rfftfreq(width, 1 / rate)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
