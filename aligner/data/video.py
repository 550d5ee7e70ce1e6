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

_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"sidx", b"styp", b"free", b"skip", b"wide", b"uuid", b"mfra")  # at a file's top


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
    if len(data) < 0.99 * (said := told_size(data)):
        raise Bad("unreadable video", f"it is cut short: {len(data)} of the {said} bytes that its headers say are there")
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


def told_size(data: bytes) -> int:
    """How many bytes a file says it has; 0 where it does not say, as what was written to a pipe. FFmpeg decodes one that is cut as far as
    it goes, and does not tell.

    MP4 and QuickTime say it by their boxes, AVI by its first chunk, Matroska and WebM by their segment.
    """
    if data[:4] == b"RIFF":
        size = int.from_bytes(data[4:8], "little")
        return 8 + size if size < 0x7FFF0000 else 0
    if data[:4] == b"\x1aE\xdf\xa3":
        end, size = _element(data, 4)  # the header, which a segment follows
        end, size = _element(data, end + size + 4)
        return end + size if size else 0
    at = 0
    while data[at + 4 : at + 8] in _BOXES:
        size = int.from_bytes(data[at : at + 4], "big")
        size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
        if size < 8:  # 0 is up to the end, wherever that is
            break
        at += size
    return at


def _element(data: bytes, at: int) -> tuple[int, int]:
    """(where an element's content begins, its length), from where its length is written; 0 is unknown (RFC 8794, 4)."""
    width = 9 - (data[at] if at < len(data) else 0).bit_length()
    whole = (1 << 7 * width) - 1
    size = int.from_bytes(data[at : at + width], "big") & whole
    return at + width, 0 if size == whole else size


def _look(av: Any, data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    """(when each frame is shown, (height, width)); counted, as what files say of their length is often wrong."""
    with av.open(io.BytesIO(data)) as container:
        if not container.streams.video:
            raise Bad("unreadable video", "it holds no pictures")
        stream = container.streams.video[0]
        rate, found, size = float(stream.average_rate or 25), [], (0, 0)
        for number, frame in enumerate(container.decode(stream)):
            before, size = size, (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)
            if found and size != before:  # as where two recordings were put one behind the other
                raise Bad("unreadable video", f"its frames change from {before[1]} x {before[0]} to {size[1]} x {size[0]} pixels")
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
