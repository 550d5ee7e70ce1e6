"""Clips: from whatever a row holds to frames, evenly taken."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data.media import MAX_PIXELS, encoded_bytes
from aligner.data.samples import Bad
from aligner.types import UserError


def load_frames(reference: Any, folder: str | Path, count: int | None = None, fps: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decode a clip and take some of its frames.

    Args:
        reference: a path (relative to `folder`), encoded bytes, or {"bytes", "path"}.
        folder: where paths are looked up; paths that leave it are refused.
        count: so many frames, evenly from the first on; a shorter clip gives all it has.
        fps: or so many a second. Without either all frames.

    Returns:
        (uint8 [F,H,W,3], seconds [F] float64 from the start of the clip).

    Raises:
        Bad: it cannot be found, decoded, or may not be read.
        UserError: PyAV is missing.
    """
    try:
        import av
    except ImportError:
        raise UserError("video needs the package av; pip install aligner[video].") from None
    data = encoded_bytes(reference, folder, "video")
    try:
        times = _times(av, data)
        wanted = sample(times, count, fps)
        frames = []
        with av.open(io.BytesIO(data)) as container:
            place = 0
            for number, frame in enumerate(container.decode(video=0)):
                if frame.width * frame.height > MAX_PIXELS:
                    raise Bad("unreadable video", f"frames of {frame.width} x {frame.height} are more than {MAX_PIXELS} pixels")
                while place < len(wanted) and wanted[place] == number:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    place += 1
                if place == len(wanted):
                    break
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise Bad("unreadable video", str(error)) from error
    return np.stack(frames), times[wanted]


def _times(av: Any, data: bytes) -> np.ndarray:
    """When each frame is shown; counted, as what files say of their length is often wrong."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        found = [frame.time if frame.time is not None else number / rate for number, frame in enumerate(container.decode(stream))]
    if not found:
        raise Bad("unreadable video", "it holds no frame")
    return np.array(found) - found[0]


def sample(times: np.ndarray, count: int | None = None, fps: float | None = None) -> np.ndarray:
    """Numbers of the frames to take of those shown at `times` [n]: [F] int64, ascending; as Hugging Face's video processors take them."""
    if count is not None and fps is not None:
        raise ValueError("a number of frames and frames a second are both given")
    total = len(times)
    if fps is not None:
        seconds = times[-1] * total / max(1, total - 1)  # the last frame is shown as long as the others
        count = max(1, int(seconds * fps + 1e-6))
    count = total if count is None else min(count, total)
    return np.arange(count) * total // count
