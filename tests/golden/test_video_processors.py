"""Clips against the parts of `transformers`' video processors that run without torchvision: sizes, patches, times in the text."""

from types import SimpleNamespace

import numpy as np
import pytest

from aligner.convert import model_from_folder
from aligner.models import clips, qwen_vl
from aligner.models.pictures import Clip
from tests.models import vision_folders
from tests.models.vision_configs import CASES, QWEN, hf_config
from tests.torch_required import torch

SIZES = [(3, 30, 41), (8, 100, 60), (2, 9, 13), (5, 57, 230), (4, 400, 720), (7, 5, 90)]


@pytest.mark.parametrize("limits", [(16, 128), (1000, 4000), (60_000, 90_000)])
@pytest.mark.parametrize("shape", SIZES)
def test_sizes(shape, limits):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as of_a_frame
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_a_video

    frames, height, width = shape
    clip, settings = Clip(np.arange(frames), 1.0, (height, width)), dict(size=dict(shortest_edge=limits[0], longest_edge=limits[1]))
    two, three = (qwen_vl.config_from_hf(hf_config(family, CASES[family][0])) for family in ("qwen2_vl", "qwen3_vl"))
    wanted = dict(factor=4, min_pixels=limits[0], max_pixels=limits[1])
    assert qwen_vl.clip_size(two, clip, settings) == of_a_frame(height, width, **wanted)
    assert qwen_vl.clip_size(three, clip, settings) == of_a_video(frames, height, width, **wanted)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_patches(frames):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    values = np.random.default_rng(0).normal(size=(frames, 3, 8, 12)).astype(np.float32)
    theirs, *grid = Qwen3VLVideoProcessor.patchify(None, torch.tensor(values)[None], patch_size=2, merge_size=2, temporal_patch_size=2)
    assert np.array_equal(clips.patches(values, 2, 2, 2), theirs[0].numpy()) and grid == [-(-frames // 2), 4, 6]


def test_frames_are_images_to_qwen():
    """A clip of one frame twice is what the image processor, which shares the formulas, makes of that frame."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    frame = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16, "longest_edge": 256})
    config = qwen_vl.config_from_hf(hf_config("qwen2_vl", CASES["qwen2_vl"][0]))
    clip = Clip(np.array([0.0, 0.1]), 0.2, (30, 41), np.stack([frame, frame]))
    ours = qwen_vl.process_clip(config, clip, SimpleNamespace(video_settings=processor.to_dict()))
    theirs = processor([frame], return_tensors="np")
    assert ours["video_grid_thw"] == theirs["image_grid_thw"].tolist() or ours["video_grid_thw"] == [tuple(theirs["image_grid_thw"][0])]
    assert np.abs(ours["pixel_values_videos"] - theirs["pixel_values"]).max() < 1e-5


@pytest.mark.parametrize("frames", [3, 4])
@pytest.mark.parametrize("family", QWEN)
def test_how_a_clip_stands_in_the_text(family, frames, tmp_path):
    """What each processor writes instead of one video token, from the frames' numbers and rate."""
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    processor = getattr(module, {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family])
    model = model_from_folder(vision_folders.describe(tmp_path, family))
    numbers, rate = np.arange(frames) * 7, 24.0
    clip = Clip(numbers / rate, frames * 7 / rate, (30, 41), np.zeros((frames, 30, 41, 3), np.uint8))
    made = model.media.process_clip(clip, model.assets)
    metadata = SimpleNamespace(fps=rate, frames_indices=numbers.tolist())
    fake = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<video>", vision_start_token="<start>",
        vision_end_token="<end>", _calculate_timestamps=lambda *given: processor._calculate_timestamps(None, *given),
    )  # fmt: skip
    theirs = processor.replace_video_token(fake, {"video_grid_thw": np.array(made["video_grid_thw"]), "video_metadata": [metadata]}, 0)
    shown = model.media.show_clip(clip, model.assets)
    runs = iter(shown.runs)
    ours = "".join("<video>" * next(runs) if part == "<video>" else part for part in (shown.text or "<video>").replace("<video>", "\n<video>\n").split("\n"))
    assert ours == theirs and shown.slots == ours.count("<video>") == len(made["pixel_values_videos"]) // 4
    assert made["second_per_grid_ts"] == [pytest.approx(2 * 7 / rate)]
