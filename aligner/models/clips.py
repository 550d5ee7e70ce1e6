"""Frames of a video as pixels, of the values that a checkpoint's video processor gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


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


def pixels(frames: np.ndarray, size: tuple[int, int], settings: Mapping[str, Any]) -> np.ndarray:
    """Frames resized to (height, width), scaled and normalised.

    Args:
        frames: uint8 [F,H,W,3].
        size: (height, width) of the result.
        settings: of the processor: `resample`, `rescale_factor`, `image_mean`, `image_std`.

    Returns:
        float32 [F,3,height,width].
    """
    from PIL import Image

    resized = [Image.fromarray(frame).resize(size[::-1], Image.Resampling(int(settings["resample"]))) for frame in frames]
    values = np.stack([np.asarray(frame) for frame in resized]).astype(np.float32) * np.float32(settings["rescale_factor"])
    normal = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return normal.transpose(0, 3, 1, 2)
