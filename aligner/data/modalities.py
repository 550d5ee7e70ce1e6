"""What rows show beside text, by kind: how it stands in the text, whether it can be read, and the arrays that the model gets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aligner.data import audio, video
from aligner.data import media as files
from aligner.data.samples import Bad
from aligner.models import pictures
from aligner.types import Media, Model

Found = Sequence[tuple[str, Any]]  # (kind, reference), as `aligner.data.samples.media_of` gives them


def looking_in(model: Model, folder: str | Path | None, frames: int | None = None) -> Model:
    """The model, with the folder to look for files in, and the number of frames that are taken of a video (None: as it is)."""
    if model.media is None:
        return model
    frames = model.media.frames if frames is None else frames
    return dataclasses.replace(model, media=dataclasses.replace(model.media, folder=folder, frames=frames))


def processor(model: Model) -> Any:
    """The checkpoint's own processor of what the model takes, for its settings; None where there is none."""
    return getattr(model.assets.processor, "feature_extractor" if model.media.kind == "audio" else "image_processor", None)


def shown(found: Found, assets: Any, media: Media | None) -> list[pictures.Shown]:
    """How each of these stands in the text. Files are opened only where sizes matter.

    Raises:
        Bad: a file cannot be read, or there is too much or too little of it for the model.
    """
    images = sum(kind == "image" for kind, _ in found)

    def one(kind: str, reference: Any) -> pictures.Shown:
        if kind == "video":
            return media.show_clip(video.load_clip(reference, media.folder, media.frames, pixels=False), assets)
        if kind == "audio":
            return hear(audio.load_audio(reference, media.folder))
        if media.show is None:
            return pictures.Shown(1, (media.features,))
        return media.show(files.image_size(reference, media.folder), assets, images)

    def taken(kind: str, reference: Any) -> pictures.Shown:
        try:
            return one(kind, reference)
        except ValueError as error:  # the processor's, of a strip of pixels, say
            raise Bad(f"the model takes no such {kind}", str(error)) from error

    def hear(samples: np.ndarray) -> pictures.Shown:
        made = media.show((audio.frames(samples, assets.processor.feature_extractor), media.width), assets, len(found))
        if not sum(made.runs):
            raise Bad("audio too short", f"{len(samples) / audio.RATE:.3f} seconds have no feature")
        return made

    return [taken(*medium) for medium in found]


def check(kind: str, reference: Any, folder: str | Path) -> bytes:
    """Know cheaply that a file can be read. Returns sha256 of its bytes. Raises Bad where it cannot."""
    if kind == "image":
        return files.check_image(reference, folder)
    # `shown` has decoded the others
    if isinstance(reference, dict) and reference.get("array") is not None:
        return hashlib.sha256(audio.load_audio(reference, folder).tobytes()).digest()
    return hashlib.sha256(files.encoded_bytes(reference, folder, kind)).digest()


def load(found: Found, model: Model) -> list[pictures.Picture]:
    """Read the media of an example, in their order, as the checkpoint's processors make them for the model.

    Raises:
        Bad: a file cannot be read.
    """
    media = model.media
    images = [files.open_image(reference, media.folder) for kind, reference in found if kind == "image"]
    read = files.read_pictures(images, media, model.assets.processor.image_processor) if images else []
    if len(images) == len(found):
        return read  # of some families several an image, its tiles; such families take nothing but images
    ready = iter(read)
    clip = lambda reference: _picture(video.load_clip(reference, media.folder, media.frames), model)

    def sound(reference: Any) -> pictures.Picture:
        [picture] = pictures.read(media, audio.features(audio.load_audio(reference, media.folder), processor(model)))
        return picture

    makers = {"image": lambda reference: next(ready), "video": clip, "audio": sound}
    return [makers[kind](reference) for kind, reference in found]


def probe(kind: str, model: Model) -> tuple[pictures.Shown, pictures.Picture]:
    """What a small, wide, black or silent one of a kind becomes, to see that the files of a checkpoint fit each other."""
    size = model.media.height, 2 * model.media.width
    if kind == "video":
        clip = pictures.Clip(np.zeros(1), 1.0, size, np.zeros((1, *size, 3), np.uint8))
        return model.media.show_clip(clip, model.assets), _picture(clip, model)
    silence = {"array": np.zeros(audio.RATE), "sampling_rate": audio.RATE}
    found = [(kind, silence if kind == "audio" else Image.new("RGB", size[::-1]))]
    return shown(found, model.assets, model.media)[0], load(found, model)[0]


def _picture(clip: pictures.Clip, model: Model) -> pictures.Picture:
    [picture] = pictures.read(model.media, model.media.process_clip(clip, model.assets))
    return picture
