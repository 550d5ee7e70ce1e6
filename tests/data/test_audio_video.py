"""Sounds and clips decode to what models take; the spectrogram is Whisper's."""

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from aligner.data import audio, video
from aligner.data.samples import Bad
from aligner.types import UserError
from tests.models.vision_folders import clip

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data, ../shared/data, is not here")


def tone(rate, seconds=0.5, hertz=440.0):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("mels", [80, 128])
def test_the_spectrogram_is_whispers(mels):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=mels)
    noise = np.random.default_rng(0).normal(size=20000).astype(np.float32) * 0.1
    for samples in (tone(16000), noise, np.zeros(100, np.float32)):
        theirs = extractor._np_extract_fbank_features(np.pad(samples, (0, 480000 - len(samples)))[None], "cpu")[0]
        assert np.abs(audio.log_mel(samples, mels) - theirs).max() < 1e-5
    assert audio.log_mel(noise, mels).shape == (mels, 3000)
    assert np.allclose(audio.mel_filters(mels), extractor.mel_filters.T, atol=1e-8)


@pytest.mark.parametrize("settings", [dict(feature_size=128), dict(feature_size=6, chunk_length=1, hop_length=800, n_fft=1600)])
def test_features_are_the_extractors(settings):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(**settings)
    for count in (1, 800, 801, 16000):
        samples = np.random.default_rng(count).normal(size=count).astype(np.float32)
        ours = audio.features(samples, extractor)
        theirs = extractor(samples, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="np")
        assert np.array_equal(ours["feature_attention_mask"], theirs["attention_mask"])
        np.testing.assert_allclose(ours["input_features"], theirs["input_features"], atol=2e-5)
        assert audio.frames(samples, extractor) == theirs["attention_mask"].sum()


def test_a_sound_is_not_cut():
    from transformers import WhisperFeatureExtractor

    with pytest.raises(Bad, match=r"audio too long: 1.5 seconds, the model hears 1 at most"):
        audio.frames(tone(16000, 1.5), WhisperFeatureExtractor(chunk_length=1))


@shared
def test_the_filters_are_whispers():
    stored = np.load(SHARED / "audio" / "mel_filters.npz")
    for mels in (80, 128):
        if f"mel_{mels}" in stored:
            assert np.allclose(audio.mel_filters(mels), stored[f"mel_{mels}"], atol=1e-7)


def test_every_kind_of_sound(tmp_path):
    import soundfile

    wave = np.stack([tone(48000), np.zeros(24000, np.float32)], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, 48000, subtype="FLOAT")
    data = (tmp_path / "a.wav").read_bytes()
    whole = audio.load_audio("a.wav", tmp_path)
    assert whole.dtype == np.float32 and whole.shape == (8000,)
    assert np.abs(whole[500:-500] - tone(16000)[500:-500] / 2).max() < 1e-3, "channels averaged, resampled to 16 kHz"
    array = {"array": wave.mean(axis=1).tolist(), "sampling_rate": 48000}
    for reference in (data, {"bytes": data, "path": None}, array, {"array": wave.T, "sampling_rate": 48000}):
        assert np.allclose(audio.load_audio(reference, tmp_path), whole, atol=1e-6)
    assert len(audio.load_audio("a.wav", tmp_path, rate=48000)) == 24000


@pytest.mark.parametrize(
    ("reference", "reason"),
    [("none.wav", "unreadable audio"), ("../a.wav", "audio outside of the folder"), (b"no sound", "unreadable audio"),
     ("https://x.org/a.wav", "audio is a URL"), ({"array": [], "sampling_rate": 16000}, "unreadable audio"), (None, "unreadable audio"),
     ({"array": [0.1]}, "unreadable audio"), ({"array": 0.1, "sampling_rate": 16000}, "unreadable audio"),
     ({"array": [0.1], "sampling_rate": 0}, "unreadable audio"), ({"array": ["a"], "sampling_rate": 16000}, "unreadable audio")],
)  # fmt: skip
def test_sounds_that_cannot_be_read(tmp_path, reference, reason):
    with pytest.raises(Bad) as caught:
        audio.load_audio(reference, tmp_path)
    assert caught.value.reason == reason and "object at 0x" not in caught.value.detail


@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_a_sound_that_is_cut_short_is_not_used(tmp_path, kind):
    """A download that broke off left a WAV file which reads well; its question was about all of it."""
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000, format=kind)
    whole = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(Bad, match=r"unreadable audio: it is cut short: \d+ of the 16000 bytes that its header says are there"):
        audio.load_audio(whole[: len(whole) // 2], tmp_path)
    place = whole.index(b"data") + 4
    for size in (16044, 0x7FFFF000, 0xFFFFFFFF):  # headers that are wrong by their own length; written to a pipe, by sox and ffmpeg
        assert len(audio.load_audio(whole[:place] + struct.pack("<I", size) + whole[place + 4 :], tmp_path)) == 8000


@pytest.mark.parametrize(("kind", "told"), [("AIFF", "bytes"), ("AU", "bytes"), ("W64", "bytes"), ("RF64", "bytes"), ("MP3", "samples"), ("OGG", "last page")])
def test_so_is_one_of_another_format(tmp_path, kind, told):
    """These too decode as far as they go."""
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a", np.random.default_rng(0).normal(scale=0.1, size=64000), 16000, format=kind)
    whole = (tmp_path / "a").read_bytes()
    assert len(audio.load_audio(whole, tmp_path)) == 64000
    tagged = b"ID3\4\0\0\0\0\x40\0" + bytes(1 << 13) + whole  # a picture of the singer, say
    for cut in (whole[: len(whole) * 2 // 3], *[tagged[: len(tagged) * 2 // 3]] * (kind == "MP3")):
        with pytest.raises(Bad, match=f"unreadable audio: it is cut short: .*{told}"):
            audio.load_audio(cut, tmp_path)


def test_an_mp3_that_does_not_say_how_long_it_is(tmp_path):
    """What is guessed from its first frames is not what its header says."""
    soundfile = pytest.importorskip("soundfile")
    wave = np.concatenate([np.zeros(16000), np.random.default_rng(0).normal(scale=0.3, size=48000)])
    soundfile.write(tmp_path / "a.mp3", wave, 16000, bitrate_mode="VARIABLE", compression_level=0.3)
    whole = (tmp_path / "a.mp3").read_bytes()
    streamed = whole[whole.index(whole[:2], 100) :]  # without the frame that says it
    assert soundfile.info(io.BytesIO(streamed)).frames > 2 * len(wave)
    assert len(wave) <= len(audio.load_audio(streamed, tmp_path)) < len(wave) + 3000


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UserError, match=r"audio needs the package soxr; pip install aligner\[audio\]"):
        audio.load_audio({"array": tone(8000), "sampling_rate": 8000}, tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"video needs the package av; pip install aligner\[video\]"):
        video.load_clip(b"", tmp_path)


def test_frames_are_taken_evenly(tmp_path):
    data = clip(np.stack([np.full((32, 32, 3), i * 12, np.uint8) for i in range(20)]))
    whole = video.load_clip(data, tmp_path)
    frames = whole.frames
    assert frames.shape == (20, 32, 32, 3) and np.allclose(whole.times, np.arange(20) / 10)
    assert np.isclose(whole.seconds, 2) and whole.size == (32, 32)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - np.arange(20) * 12).max() < 6
    few = video.load_clip(data, tmp_path, count=4)
    assert np.allclose(few.times, [0, 0.5, 1.0, 1.5]) and np.array_equal(few.frames, frames[[0, 5, 10, 15]])
    sized = video.load_clip(data, tmp_path, count=4, pixels=False)
    assert np.array_equal(sized.times, few.times) and sized[1:] == (few.seconds, few.size, None)
    assert np.allclose(video.load_clip(data, tmp_path, fps=2).times, [0, 0.5, 1.0, 1.5])
    assert len(video.load_clip(data, tmp_path, count=100).frames) == 20
    for reference, reason in [(b"no clip", "unreadable video"), ("../a.mp4", "video outside of the folder"), (data[:200], "unreadable video")]:
        with pytest.raises(Bad) as caught:
            video.load_clip(reference, tmp_path)
        assert caught.value.reason == reason
    import soundfile

    soundfile.write(tmp_path / "a.wav", tone(8000), 8000)
    with pytest.raises(Bad, match="it holds no pictures"):
        video.load_clip("a.wav", tmp_path)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_frames_stand_upright(tmp_path, matrix, turns):
    """A file says by a matrix how its frames are to be turned: a telephone's camera always lies on its side."""
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[:, :16, :24] = 255  # so that every corner is told from the others
    data, one = clip(frames), 1 << 16
    lying = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    head, rest = data[: (place := data.index(lying, data.index(b"tkhd")))], data[place + len(lying) :]
    a, b, c, d = (one * value for value in matrix)
    found = video.load_clip(head + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + rest, tmp_path)
    assert found.frames.shape[1:3] == found.size == np.rot90(frames[0], turns).shape[:2]
    assert np.abs(found.frames[0].astype(int) - np.rot90(frames[0], turns)).mean() < 8


@pytest.mark.parametrize(
    ("form", "options"), [("mp4", {}), ("mp4", {"movflags": "empty_moov", "frag_duration": "1000000"}), ("avi", {}), ("matroska", {})]
)
def test_a_clip_that_is_cut_short_is_not_used(tmp_path, form, options):
    """FFmpeg decodes what is there; its question was about all of it."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8)
    whole = clip(frames, form=form, **options)
    assert video.told_size(whole) == len(whole) and len(video.load_clip(whole, tmp_path).frames) == 20
    for cut in (0.9, 0.6, 0.1):
        with pytest.raises(Bad, match=r"unreadable video: it is cut short: \d+ of the \d+ bytes that its headers say are there"):
            video.load_clip(whole[: int(len(whole) * cut)], tmp_path)


def test_frames_that_change_their_size(tmp_path):
    """Two recordings one behind the other; the first look at a dataset must find it, not the training."""
    small, large = (clip(np.zeros((4, side, side, 3), np.uint8), form="mpegts") for side in (32, 64))
    for pixels in (True, False):
        assert video.load_clip(small, tmp_path, pixels=pixels).size == (32, 32)
        with pytest.raises(Bad, match="unreadable video: its frames change from 32 x 32 to 64 x 64 pixels"):
            video.load_clip(small + large, tmp_path, pixels=pixels)


def test_a_sound_in_a_format_that_is_not_read(tmp_path):
    with pytest.raises(Bad, match="unreadable audio: no audio format that is read; those are WAV, FLAC, MP3"):
        audio.load_audio(clip(np.zeros((2, 16, 16, 3), np.uint8)), tmp_path)


def test_a_clip_that_does_not_say_how_long_it_is(tmp_path):
    """As what was written to a pipe; and one with something behind it."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    piped = clip(frames, form="matroska", live="1")
    boxed = clip(frames)
    place = boxed.index(b"mdat") - 4
    assert len(video.load_clip(piped, tmp_path).frames) == 20 and video.told_size(piped) == 0
    for nothing in (bytes(4), b"\0\0\0\1", b"\0\0\0\7"):  # up to the end; a long number, which is none here; less than a box has
        broken = boxed[:place] + nothing + boxed[place + 4 : place + 8] + bytes(8) + boxed[place + 16 :]
        assert video.told_size(broken) == place
    for behind in (bytes(100), b"\x7fsomething else"):
        assert len(video.load_clip(boxed + behind, tmp_path).frames) == 20


@pytest.mark.parametrize("total", [1, 7, 20, 301])
def test_frames_are_those_that_video_processors_take(total):
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    for wanted in (1, 5, 7, None):
        if (wanted or 0) <= total:
            theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=24), wanted)
            assert video.sample(total, wanted).tolist() == theirs.tolist()


@shared
def test_real_sounds_and_clips():
    speech = audio.load_audio("jfk.flac", SHARED / "audio")
    assert len(speech) == 11 * 16000 and 0.05 < np.abs(speech).max() <= 1
    for path in sorted((SHARED / "audio" / "mllm_demo_data").iterdir()):
        assert len(audio.load_audio(path.name, path.parent)) > 1000
    whole = (SHARED / "video" / "baby.mp4").read_bytes()
    with pytest.raises(Bad, match=f"it is cut short: 231773 of the {len(whole)} bytes"):  # of which FFmpeg shows one half
        video.load_clip(whole[: len(whole) // 2], SHARED)
    for path in sorted((SHARED / "video" / "mllm_demo_data").iterdir())[:2]:
        clip = video.load_clip(path.name, path.parent, count=8)
        assert len(clip.frames) == 8 and (np.diff(clip.times) > 0).all()
