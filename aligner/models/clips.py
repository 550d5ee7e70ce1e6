"""Frames of a video as pixels, of the values that a checkpoint's video processor gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from aligner.types import UserError


def square(frames: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Frames as CLIP's towers take them: shrunk so that the shorter side fits, the middle cut out.

    Args:
        frames: uint8 [F,H,W,3].
        settings: of the processor: `size` (`shortest_edge`, or `height` and `width`), `crop_size`, and what `pixels` reads.

    Returns:
        float32 [F,3,h,w].
    """
    size, (height, width) = settings["size"], frames.shape[1:3]
    if "shortest_edge" in size:
        edge, shorter = size["shortest_edge"], min(height, width)
        height, width = (edge if side == shorter else int(edge * side / shorter) for side in (height, width))
    else:
        height, width = size["height"], size["width"]
    made = pixels(frames, (height, width), settings)
    if not settings.get("do_center_crop", False):
        return made
    cut = settings["crop_size"]["height"], settings["crop_size"]["width"]
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    return made[:, :, top : top + cut[0], left : left + cut[1]]


def fitted(size: tuple[int, int], unit: int, least: int, most: int, frames: int = 1, groups_of: int = 1) -> tuple[int, int]:
    """The (height, width) in whole units that is nearest to a size, where so many frames hold from `least` to `most` pixels together.

    Args:
        size: (height, width).
        unit: side of what a token stands for, in pixels.
        least, most: pixels.
        frames: how many share them.
        groups_of: frames come in groups of so many.
    """
    rounded = [round(side / unit) * unit for side in size]
    total = math.prod(rounded) * round(frames / groups_of) * groups_of
    if total > most:
        shrink = math.sqrt(frames * math.prod(size) / most)
        rounded = [max(unit, math.floor(side / shrink / unit) * unit) for side in size]
    elif total < least:
        grow = math.sqrt(least / (frames * math.prod(size)))
        rounded = [math.ceil(side * grow / unit) * unit for side in size]
    return rounded[0], rounded[1]


def patches(values: np.ndarray, side: int, merge: int, times: int) -> np.ndarray:
    """Pixels cut into patches that span some frames, neighbours that are merged one after another.

    Args:
        values: float32 [F,3,H,W]; the last frame is repeated where F is no multiple of `times`.
        side: of a patch; H and W are multiples of side * merge.
        merge: so many patches in each direction make a token.
        times: frames of a patch.

    Returns:
        [patches, 3 * times * side^2].
    """
    values = np.concatenate([values, *[values[-1:]] * (-len(values) % times)])
    frames, channels, height, width = values.shape
    unit = side * merge
    cut = values.reshape(frames // times, times, channels, height // unit, merge, side, width // unit, merge, side)
    return cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * times * side**2)


def pixels(frames: np.ndarray, size: tuple[int, int], settings: Mapping[str, Any]) -> np.ndarray:
    """Frames resized to (height, width), scaled and normalised.

    Args:
        frames: uint8 [F,H,W,3].
        size: (height, width) of the result.
        settings: of the processor: `resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std`.

    Returns:
        float32 [F,3,height,width].

    Raises:
        UserError: the processor does not resize.
    """
    from PIL import Image

    if not settings.get("do_resize", True):
        raise UserError("do_resize is false in the settings of the checkpoint's video processor; frames as they are do not fit a tower")
    resized = [Image.fromarray(frame).resize(size[::-1], Image.Resampling(int(settings["resample"]))) for frame in frames]
    values = np.stack([np.asarray(frame) for frame in resized]).astype(np.float32)
    if settings.get("do_rescale", True):
        values *= np.float32(settings["rescale_factor"])
    if settings.get("do_normalize", True):
        values = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return values.transpose(0, 3, 1, 2)
