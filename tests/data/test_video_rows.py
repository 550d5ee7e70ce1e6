"""Rows with videos, from a file to the arrays of a batch: what a model reads is what its Hugging Face processors would give it."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from aligner import preview
from aligner.convert import model_from_folder
from aligner.data import loader, modalities, video
from aligner.data.templates import encode_prompt
from aligner.models import clips
from aligner.types import UserError
from tests.data import tiny as data_tiny
from tests.models import vision_folders

FRAMES = 3
PER_TOKEN = ("tokens", "positions", "media_index", "rope_positions")
noise = lambda *shape: np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(30, 41), (57, 23), (16, 16), (9, 13)])
@pytest.mark.parametrize("changes", [{}, {"size": {"height": 12, "width": 20}}, {"resample": 2, "do_center_crop": False}, {"do_normalize": False}])
def test_square_frames_are_clips(size, changes):
    """The video processor of LLaVA-NeXT-Video does to every frame what CLIP's image processor does."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    frames = noise(3, *size, 3)
    settings = dict(size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}, image_mean=[0.4, 0.5, 0.6]) | changes
    processor = CLIPImageProcessorPil(**settings)
    theirs = processor([*frames], return_tensors="np")["pixel_values"]
    assert np.abs(clips.square(frames, processor.to_dict()) - theirs).max() < 1e-5


def test_a_processor_that_does_not_resize_is_refused():
    with pytest.raises(UserError, match="do_resize is false in the settings"):
        clips.pixels(noise(1, 4, 4, 3), (4, 4), {"do_resize": False})


@pytest.fixture(scope="module", params=[*vision_folders.VIDEO_PROCESSORS])
def seeing(request, tmp_path_factory):
    """A model of every family that takes videos, and rows of which every second has a clip."""
    folder = tmp_path_factory.mktemp(request.param)
    return model_from_folder(vision_folders.describe(folder, request.param)), vision_folders.rows(folder / "rows", 4, videos=True)


def opened(model, data):
    config = data_tiny.config(data, image_folder=str(data.parent))
    with config.unlocked():
        config.data.video_frames = FRAMES
    return loader.load_dataset(config, "train", model, progress=False)


def processed(model, row, folder):
    """What Hugging Face's processors give for a row's media: images by the checkpoint's own, each video by ours."""
    images = [Image.open(folder / name).convert("RGB") for name in row["images"]]
    made = dict(model.assets.processor.image_processor(images, return_tensors="np")) if images else {}
    for name in row.get("videos", ()):
        made |= model.media.process_clip(video.load_clip(name, folder, FRAMES), model.assets)
    return made


def test_a_row_is_what_the_processors_give(seeing):
    """Pixels, and which of their features stands where, are those of the processors' output, which `model.inputs` reads."""
    model, data = seeing
    dataset = opened(model, data)
    for number, line in enumerate(data.read_text().splitlines()):
        row = dataset.row(number)
        columns = np.isin(row["role"], (0, 2)) & (row["segment_ids"] > 0)
        made, ids = processed(model, json.loads(line), data.parent), row["tokens"][columns]
        expected = model.inputs({"input_ids": ids[None], "attention_mask": np.ones_like(ids[None]), **made})
        assert ("pixel_values" in expected) == bool(number), "the first row has neither image nor clip"
        assert (ids == model.media.video).any() == bool(number % 2), "every second row has a clip"
        slots = int(np.sum(expected.get("image_mask", 0)))
        for name in expected.keys() - {"role", "segment_ids"}:
            found = row[name][columns] if name in PER_TOKEN else row[name][:slots]
            assert np.array_equal(found, np.asarray(expected[name])[0][: len(found)]), name
        assert not row["image_mask"][slots:].any()


def test_the_page_shows_frames(seeing):
    """As the tower gets them, also where it gets patches."""
    model, data = seeing
    found = [*preview.stills(opened(model, data).row(1), model)]  # the clip stands first
    frames, settings = video.load_clip("1.mp4", data.parent, FRAMES).frames, model.assets.video_settings
    if "patch_grid" in model.media.slot:
        expected = clips.pixels(frames[::2], found[0].shape[:2], settings)  # of each patch, which spans two
    else:
        expected = clips.square(frames, settings)
    assert np.array_equal(found[: len(expected)], expected.transpose(0, 2, 3, 1)) and len(found) > len(expected)


def test_media_stand_in_the_order_of_their_placeholders(seeing):
    """Some templates write images first, wherever they stand in a message."""
    model, data = seeing
    content = [{"type": "video", "video": "1.mp4"}, {"type": "image", "image": "1.0.png"}, {"type": "text", "text": "t30"}]
    model = modalities.looking_in(model, data.parent, FRAMES)
    encoded = encode_prompt([{"role": "user", "content": content}], model.assets, model.media)
    assert [kind for kind, _ in encoded.media] == ["video", "image"]
    images_first = model.assets.tokenizer.chat_template.replace("for part in message['content']", "for part in message['content'] | sort(attribute='type')")
    turned = encode_prompt([{"role": "user", "content": content}], dataclasses.replace(model.assets, chat_template=images_first), model.media)
    assert [kind for kind, _ in turned.media] == ["image", "video"] and turned.slots == encoded.slots
    tokens = turned.prompt[np.isin(turned.prompt, [*model.media.tokens.values()])]
    assert tokens[0] == model.media.placeholder and tokens[-1] == model.media.video


@pytest.mark.parametrize(("model", "takes"), [(data_tiny.text_model, "llama model takes text only"), (data_tiny.image_model, "llava model takes text, image only")])
def test_a_model_that_takes_no_video_says_so(tmp_path, model, takes):
    path = vision_folders.rows(tmp_path, 2, videos=True)
    path.write_text(path.read_text().splitlines()[1].replace('"1.0.png"', "").replace('{"type": "image"}, ', ""))
    with pytest.raises(UserError, match=f"row 0 of .* holds a video, but the {takes}; choose"):
        loader.load_dataset(data_tiny.config(path), "train", model(), progress=False)


def test_a_clip_that_cannot_be_read_is_dropped_and_counted(seeing, tmp_path):
    model, data = seeing
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[3]["videos"] = ["none.mp4"]
    (data.parent / "broken.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = loader.load_dataset(data_tiny.config(data.parent / "broken.jsonl"), "train", model, progress=False)
    assert dataset.dropped == {"unreadable video": (1, [3])} and "none.mp4" in dataset.details["unreadable video"]
