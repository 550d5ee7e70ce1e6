"""Images of every kind open as RGB; those that may not or cannot be read say so."""

import base64
import importlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from aligner.convert import model_from_folder
from aligner.data import media, modalities
from aligner.data.samples import Bad
from tests.data import tiny
from tests.models import vision_folders


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(size=(7, 5), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def same(a, b):
    return a.mode == b.mode == "RGB" and np.array_equal(np.asarray(a), np.asarray(b))


def test_every_kind_of_reference(tmp_path):
    image = noise()
    data = encoded(image)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    plain = base64.b64encode(data).decode()
    absolute = str(tmp_path / "sub" / "a.png")
    for reference in [
        "sub/a.png", absolute, image, data, {"bytes": data, "path": None}, {"bytes": None, "path": "sub/a.png"}, plain,
        f"data:image/png;base64,{plain}",
    ]:  # fmt: skip
        assert same(media.open_image(reference, tmp_path), image)
        assert len(media.check_image(reference, tmp_path)) == 32


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_base64_of_any_format_and_in_lines(tmp_path, form):
    """As mail and the shell's `base64` write it."""
    data = encoded(noise((30, 30)), form)
    lines = base64.encodebytes(data).decode()
    assert lines.count("\n") > 1
    for reference in (base64.b64encode(data).decode(), lines, lines.replace("\n", "\r\n"), f"data:image/x;base64,{lines}"):
        assert media.encoded_bytes(reference, tmp_path) == data


def test_sounds_and_clips_as_base64(tmp_path):
    import soundfile

    for form in ("WAV", "FLAC", "OGG"):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.zeros(4000), 16000, format=form)
        assert media.encoded_bytes(base64.b64encode(buffer.getvalue()).decode(), tmp_path, "audio") == buffer.getvalue()
    for form in ("mp4", "matroska", "avi"):
        clip = vision_folders.clip(np.zeros((2, 16, 16, 3), np.uint8), form=form)
        assert media.encoded_bytes(base64.b64encode(clip).decode(), tmp_path, "video") == clip


def test_a_text_that_is_no_path_is_not_told_whole(tmp_path):
    """It may be a picture of megabytes in an encoding that is not known."""
    with pytest.raises(Bad) as caught:
        media.open_image("c7" * 100_000, tmp_path)
    assert "File name too long" in caught.value.detail and len(caught.value.detail) < 200 + len(str(tmp_path))


def test_pictures_of_floats(tmp_path):
    """Of 0..1, of 0..255; those were black, and NaN was any colour."""
    grey = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    for values in (grey, grey * 255):
        seen = np.asarray(media.open_image(encoded(Image.fromarray(values), "TIFF"), tmp_path))[..., 0]
        assert np.abs(seen - grey * 255).max() <= 0.51
    grey[1, 1] = np.nan
    for read in (media.open_image, media.check_image):
        with pytest.raises(Bad, match="unreadable image: bytes: it holds numbers that are not finite"):
            read(encoded(Image.fromarray(grey), "TIFF"), tmp_path)


def test_modes_and_orientation(tmp_path):
    grey16 = Image.fromarray((np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4))
    seen = np.asarray(media.open_image(encoded(grey16), tmp_path))[..., 0]
    assert np.abs(seen - np.arange(12).reshape(3, 4) * 5000 / 257).max() <= 1, "16 bits are scaled, not clipped"
    for mode in ("RGBA", "P", "L", "LA", "1"):
        assert media.open_image(encoded(noise().convert(mode)), tmp_path).mode == "RGB"
    assert media.open_image(encoded(noise().convert("CMYK"), "JPEG"), tmp_path).mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6
    assert media.open_image(encoded(noise((7, 5)), "JPEG", exif=turned), tmp_path).size == (5, 7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1"])
def test_transparent_pictures_are_what_image_processors_see(tmp_path, mode):
    """A diagram without a background, by a mask, a palette's entries or one colour that is not shown."""
    from transformers.image_transforms import convert_to_rgb

    image = noise().convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7) * 7))
    keyed = {"P": bytes(range(0, 240, 3)), "RGB": image.getpixel((2, 3)), "L": image.getpixel((2, 3)), "1": 0}.get(mode)
    data = encoded(image, **({} if keyed is None else {"transparency": keyed}))
    seen, theirs = np.asarray(media.open_image(data, tmp_path)), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    assert np.array_equal(seen, theirs) and not np.array_equal(theirs, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("reference", "reason", "detail"),
    [
        ("missing.png", "unreadable image", "does not exist"),
        ("../secret.png", "image outside of the folder", "leaves"),
        ("/etc/hostname", "image outside of the folder", "leaves"),
        ("https://example.org/a.png", "image is a URL", "not fetched"),
        ("text.png", "unreadable image", "no image format"),
        ("cut.png", "unreadable image", "cut.png"),
        ("cut.jpg", "unreadable image", "cut.jpg"),
        ("torn.avif", "unreadable image", "torn.avif"),
        ("exif.jpg", "unreadable image", "exif.jpg"),
        ("data:image/png;base64,@@", "unreadable image", "base64"),
        (b"", "unreadable image", ""),
        ({"bytes": None, "path": None}, "unreadable image", "no image"),
        (7, "unreadable image", "int"),
        ("vector.eps", "unreadable image", "no image format"),
        ("telephone.heic", "unreadable image", "no image format that is read; those are PNG, JPEG, WEBP"),
        ("empty.jpg", "unreadable image", "empty.jpg: the file is empty"),
        ("more", "unreadable image", "more: Is a directory"),
    ],
)
def test_what_cannot_be_read(tmp_path, reference, reason, detail):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(noise()))
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes(encoded(noise((64, 64)))[:2000])
    (folder / "cut.jpg").write_bytes(encoded(noise((64, 64)), "JPEG")[:800])
    (folder / "torn.avif").write_bytes(encoded(noise((64, 64)), "AVIF").replace(b"av01", b"av02"))
    turned = Image.Exif()
    turned.update({0x0112: 6, 0x0100: 7})
    broken = encoded(noise(), "JPEG", exif=turned)
    place = broken.index(b"\x01\x00\x00\x04")  # the width, a number, becomes one that is none
    (folder / "exif.jpg").write_bytes(broken[: place + 2] + b"\x00\x07" + broken[place + 4 :])
    (folder / "telephone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    (folder / "empty.jpg").touch()
    (folder / "more").mkdir()
    (folder / "vector.eps").write_bytes(encoded(noise(), "EPS"))
    for read in (media.open_image, media.check_image):
        with pytest.raises(Bad) as caught:
            read(reference, folder)
        assert caught.value.reason == reason and detail in caught.value.detail


def test_the_size_of_what_is_cut_off(tmp_path):
    """A PNG's orientation may stand behind its pixels, which are read to find it."""
    whole = encoded(noise((64, 64)))
    assert media.image_size(whole, tmp_path) == (64, 64)
    for cut in (whole[:2000], whole[:2000] + b"7" * 99):
        with pytest.raises(Bad, match="unreadable image: bytes: "):
            media.image_size(cut, tmp_path)


@pytest.mark.parametrize(("family", "case", "detail"), [("qwen2_vl", 0, "aspect ratio .* 500"), ("llava", 4, "1000 x 2 pixels shrink to 8 x 0")])
def test_a_strip_that_the_processor_refuses(tmp_path, family, case, detail):
    """The census counts it; a LLaVA with Pixtral's tower failed at it in the middle of training."""
    model = model_from_folder(vision_folders.describe(tmp_path, family, case))
    with pytest.raises(Bad, match=f"the model takes no such image: .*{detail}"):
        modalities.shown([("image", noise((1000, 2)))], model.assets, model.media)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 30)
    with pytest.raises(Bad, match="more than 30 pixels"):
        media.open_image(encoded(noise()), tmp_path)


def test_links_inside_the_folder_are_the_users_own(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.png").write_bytes(encoded(noise()))
    (tmp_path / "images").symlink_to(tmp_path / "store")
    assert same(media.open_image("a.png", tmp_path / "images"), noise())
    assert same(media.open_image(str(tmp_path / "store" / "a.png"), tmp_path / "images"), noise())


def test_pixels_are_the_processors(tmp_path):
    processor = tiny.image_model().assets.processor.image_processor
    pictures = [noise((13, 9), 1), noise((4, 20), 2)]
    found = media.read_pictures(pictures, tiny.image_model().media, processor)
    pixels = np.concatenate([picture.arrays["pixel_values"] for picture in found])
    assert pixels.shape == (2, 8, 8, 3) and pixels.dtype == np.float32
    assert np.array_equal(pixels.transpose(0, 3, 1, 2), processor(pictures, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("family", ["internvl", "gemma3", "llava_next", "idefics3"])
def test_image_processors_are_asked_as_by_the_familys_own_processor(family, tmp_path):
    """Which overrules the file of the image processor: InternVL's say that there are no tiles."""
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    [processor] = (made for name, made in vars(module).items() if name.endswith("Processor") and made.__module__ == module.__name__)
    asked = {name: value for name, value in getattr(processor, "images_kwargs", {}).items() if name.startswith(("do_p", "crop_"))}
    settings = vision_folders.describe(tmp_path, family) / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {name: not value for name, value in asked.items()}))
    model = model_from_folder(tmp_path / "config")
    images = model.assets.processor.image_processor
    assert {name: getattr(images, name) for name in asked} == asked
    if family == "internvl":
        picture = noise((20, 9))
        theirs = images([picture], **processor.images_kwargs, return_tensors="np")["pixel_values"]
        [shown] = modalities.shown([("image", picture)], model.assets, modalities.looking_in(model, tmp_path).media)
        assert len(theirs) == shown.slots == 3
