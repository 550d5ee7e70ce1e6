"""Images: from whatever a row holds to the pixels that the model sees."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from aligner.data.samples import Bad
from aligner.models import pictures
from aligner.types import Media

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # larger ones are decompression bombs, or nothing a vision tower could use
# Without Pillow's formats that start other programs or render vector graphics.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# JPEG, PNG, GIF, WebP (and WAV, AVI), BMP, TIFF; AVIF, JPEG 2000 and MP4; FLAC, Ogg, MP3, Matroska
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA", "ZkxhQ", "T2dnU", "SUQz", "GkXfo")


def open_image(reference: Any, folder: str | Path) -> Image.Image:
    """Decode an image.

    Args:
        reference: a path (relative to `folder`), a PIL image, encoded bytes, {"bytes", "path"} as `datasets` has them, or base64,
            bare or as a data URL.
        folder: where paths are looked up; paths that leave it are refused, so that a dataset cannot read other files.

    Returns:
        An RGB image, turned as its EXIF orientation says, on white where it is transparent.

    Raises:
        Bad: it cannot be found, decoded, or may not be read.
    """
    image = _opened(reference, folder)
    with _decoding(_name(reference)):
        return _rgb(ImageOps.exif_transpose(image))


def check_image(reference: Any, folder: str | Path) -> bytes:
    """Decode an image cheaply (a JPEG at an eighth of its size) to know that it can be.

    Returns:
        sha256 of its encoded bytes (of the pixels, for a PIL image).
    """
    if isinstance(reference, Image.Image):
        return hashlib.sha256(open_image(reference, folder).tobytes()).digest()
    data = encoded_bytes(reference, folder)
    image = _opened(data, folder, _name(reference))
    with _decoding(_name(reference)):
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # which may be what fails
        if image.mode == "F":
            _rgb(image)  # as may this
    return hashlib.sha256(data).digest()


def image_size(reference: Any, folder: str | Path) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, from the image's header."""
    image = _opened(reference, folder)
    with _decoding(_name(reference)):  # a PNG's EXIF may stand behind its pixels, which are read on the way
        turned = image.getexif().get(274, 1) in (5, 6, 7, 8)  # EXIF orientations that lie on their side
    return (image.height, image.width) if turned else image.size


def read_pictures(images: list[Image.Image], media: Media, image_processor: Any) -> list[pictures.Picture]:
    """What the checkpoint's own image processor makes of the images, as the model takes them."""
    return pictures.read(media, image_processor([images] if media.together else images, return_tensors="np"))


def _opened(reference: Any, folder: str | Path, name: str = "") -> Image.Image:
    name = name or _name(reference)
    with _decoding(name):
        made = isinstance(reference, Image.Image)
        image = reference if made else Image.open(io.BytesIO(encoded_bytes(reference, folder)), formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        raise Bad("unreadable image", f"{name}: {image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    return image


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """What fails here is the fault of the image called `name`, whatever is raised: of broken files each of Pillow's formats has its own."""
    try:
        yield
    except Bad:
        raise
    except Exception as error:
        # Pillow's own message names an object in memory
        unknown = f"no image format that is read; those are {', '.join(_formats())}"
        detail = unknown if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise Bad("unreadable image", f"{name}: {detail}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # some builds of Pillow lack a few


def encoded_bytes(reference: Any, folder: str | Path, kind: str = "image") -> bytes:
    """The encoded file that a reference stands for, as `open_image` lists them; also of sounds and clips.

    Raises:
        Bad: it cannot be found or may not be read.
    """
    if isinstance(reference, dict):
        reference = reference.get("bytes") or reference.get("path")
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return bytes(reference)
    if not isinstance(reference, (str, os.PathLike)) or not str(reference):
        raise Bad(f"unreadable {kind}", f"a {type(reference).__name__} is no {kind}")
    text = os.fspath(reference)
    if text.startswith("data:") or (len(text) > 64 and text.startswith(_BASE64_STARTS)):
        try:
            code = text.partition(",")[2] if text.startswith("data:") else text
            return base64.b64decode("".join(code.split()), validate=True)  # which mail and `base64` of the shell cut into lines
        except binascii.Error as error:
            if text.startswith("data:"):
                raise Bad(f"unreadable {kind}", f"{_name(text)}: not valid base64 ({error})") from error
    if "://" in text[:16]:
        raise Bad(f"{kind} is a URL", f"{_name(text)}: {kind}s are not fetched while training; download them and name the files")
    path = _inside(text, folder, kind)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)
        raise Bad(f"unreadable {kind}", f"{_name(text)}: {reason} in {folder}") from error
    if not data:
        raise Bad(f"unreadable {kind}", f"{_name(text)}: the file is empty")
    return data


def _inside(text: str, folder: str | Path, kind: str) -> Path:
    # Judged by the names alone: a link that the user put into the folder may lead where it likes.
    root = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(root, text))
    if not any(path.startswith(os.path.join(base, "")) for base in (root, os.path.realpath(root))):
        raise Bad(f"{kind} outside of the folder", f"{_name(text)} leaves {folder}; set image_folder to a folder that holds it")
    return Path(path)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float greys: Pillow would clip, not scale
        values = np.asarray(image, np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds numbers that are not finite")
        top = values.max(initial=0)
        scale = 1 / 257 if image.mode.startswith("I;16") or top > 255 else 255 if image.mode == "F" and top <= 1 else 1
        image = Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:  # on white, as image processors lay it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _name(reference: Any) -> str:
    if isinstance(reference, dict):
        reference = reference.get("path") or "bytes"
    text = reference if isinstance(reference, str) else type(reference).__name__
    return text if len(text) <= 80 else text[:60] + "..."
