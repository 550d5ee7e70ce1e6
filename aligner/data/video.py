"""Clips: from whatever a row holds to frames, evenly taken."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from aligner.data.media import MAX_PIXELS, encoded_bytes
from aligner.data.samples import Bad
from aligner.models.pictures import Clip
from aligner.types import UserError


def load_clip(reference: Any, folder: str | Path, count: int | None = None, fps: float | None = None, pixels: bool = True) -> Clip:
    """Decode a clip and take some of its frames, turned as the file says, as a telephone held upright writes it.

    Args:
        reference: a path (relative to `folder`), encoded bytes, or {"bytes", "path"}.
        folder: where paths are looked up; paths that leave it are refused.
        count: so many frames, evenly from the first on; a shorter clip gives all it has.
        fps: or so many a second. Without either all frames.
        pixels: False asks for their size and times alone.

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
        times, size = _look(av, data)
        seconds = times[-1] * len(times) / max(1, len(times) - 1)  # the last frame is shown as long as the others
        wanted = sample(len(times), count if fps is None else max(1, int(seconds * fps + 1e-6)))
        if not pixels:
            return Clip(times[wanted], seconds, size)
        frames = []
        with av.open(io.BytesIO(data)) as container:
            place = 0
            for number, frame in enumerate(container.decode(video=0)):
                while place < len(wanted) and wanted[place] == number:
                    frames.append(np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame)))
                    place += 1
                if place == len(wanted):
                    break
        return Clip(times[wanted], seconds, size, np.stack(frames))
    except (av.FFmpegError, ValueError) as error:
        # its message also names the file, which it knows only as bytes
        raise Bad("unreadable video", getattr(error, "strerror", None) or str(error)) from error


def _look(av: Any, data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    """(when each frame is shown, (height, width)); counted, as what files say of their length is often wrong."""
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise Bad("unreadable video", "it holds no pictures")
        stream = container.streams.video[0]
        rate, found, size = float(stream.average_rate or 25), [], (0, 0)
        for number, frame in enumerate(container.decode(stream)):
            size = (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)
            if frame.width * frame.height > MAX_PIXELS:
                raise Bad("unreadable video", f"frames of {frame.width} x {frame.height} are more than {MAX_PIXELS} pixels")
            found.append(frame.time if frame.time is not None else number / rate)
    if not found:
        raise Bad("unreadable video", "it holds no frame")
    return np.array(found) - found[0], size


def _turns(frame: Any) -> int:
    """Quarter turns to the left after which a frame stands upright; FFmpeg gives them in degrees, and does not turn it itself."""
    return round(frame.rotation / 90)


def sample(total: int, count: int | None = None) -> np.ndarray:
    """Numbers of `count` frames out of `total`: [F] int64, ascending; as most of Hugging Face's video processors take them."""
    count = total if count is None else min(count, total)
    return np.arange(count) * total // count
