"""What rows show beside text, by kind: how it stands in the text, whether it can be read, and the arrays that the model gets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aligner.data import media as files
from aligner.data import video
from aligner.models import pictures
from aligner.types import Media, Model

Found = Sequence[tuple[str, Any]]  # (kind, reference), as `aligner.data.samples.media_of` gives them


def looking_in(model: Model, folder: str | Path | None, frames: int | None = None) -> Model:
    """The model, with the folder to look for files in, and the number of frames that are taken of a video (None: as it is)."""
    if model.media is None:
        return model
    frames = model.media.frames if frames is None else frames
    return dataclasses.replace(model, media=dataclasses.replace(model.media, folder=folder, frames=frames))


def shown(found: Found, assets: Any, media: Media | None) -> list[pictures.Shown]:
    """How each of these stands in the text. Files are opened only where sizes matter."""
    images = sum(kind == "image" for kind, _ in found)

    def one(kind: str, reference: Any) -> pictures.Shown:
        if kind == "video":
            return media.show_clip(video.load_clip(reference, media.folder, media.frames, pixels=False), assets.video_settings)
        if media.show is None:
            return pictures.Shown(1, (media.features,))
        return media.show(files.image_size(reference, media.folder), assets, images)

    return [one(*medium) for medium in found]


def check(kind: str, reference: Any, folder: str | Path) -> bytes:
    """Know cheaply that a file can be read. Returns sha256 of its bytes. Raises Bad where it cannot."""
    if kind == "video":  # `shown` has decoded it
        return hashlib.sha256(files.encoded_bytes(reference, folder, kind)).digest()
    return files.check_image(reference, folder)


def load(found: Found, model: Model) -> list[pictures.Picture]:
    """Read the media of an example, in their order, as the checkpoint's processors make them for the model.

    Raises:
        Bad: a file cannot be read.
    """
    media = model.media
    images = [files.open_image(reference, media.folder) for kind, reference in found if kind == "image"]
    ready = iter(files.read_pictures(images, media, model.assets.processor.image_processor) if images else ())
    clip = lambda reference: _picture(video.load_clip(reference, media.folder, media.frames), model)
    return [clip(reference) if kind == "video" else next(ready) for kind, reference in found]


def probe(kind: str, model: Model) -> tuple[pictures.Shown, pictures.Picture]:
    """What a small, wide, black one of a kind becomes, to see that the files of a checkpoint fit each other."""
    size = model.media.height, 2 * model.media.width
    if kind == "video":
        clip = pictures.Clip(np.zeros(1), 1.0, size, np.zeros((1, *size, 3), np.uint8))
        return model.media.show_clip(clip, model.assets.video_settings), _picture(clip, model)
    found = [(kind, Image.new("RGB", size[::-1]))]
    return shown(found, model.assets, model.media)[0], load(found, model)[0]


def _picture(clip: pictures.Clip, model: Model) -> pictures.Picture:
    [picture] = pictures.read(model.media, model.media.process_clip(clip, model.assets.video_settings))
    return picture
