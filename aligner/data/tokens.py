"""Encoded rows on disk: the census tokenises every row once and writes it here; batches read it back."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aligner.arrays import checksum
from aligner.data.templates import Encoded


def pack(encoded: Encoded) -> bytes:
    """An example without media as bytes."""
    values = json.dumps(encoded.values).encode()
    lengths = [len(answer) for answer in encoded.answers]
    head = np.array([len(encoded.prompt), len(lengths), encoded.scored is not None, *lengths], np.int32)
    arrays = [head, encoded.prompt, *encoded.answers]
    masks = [mask.astype(np.uint8) for mask in encoded.scored or ()]
    data = b"".join(array.tobytes() for array in (*arrays, *masks)) + values
    return checksum(data) + data


def unpack(data: bytes) -> Encoded | None:
    """The example that `pack` made bytes of; None where they are not those bytes any more."""
    noted, data = data[:4], data[4:]
    if checksum(data) != noted:
        return None
    prompt, count, masked = np.frombuffer(data, np.int32, 3).tolist()
    lengths = np.frombuffer(data, np.int32, count, offset=12)
    edges = np.cumsum([0, prompt, *lengths])
    place = 4 * (3 + count)
    tokens = np.frombuffer(data, np.int32, int(edges[-1]), offset=place)
    place += tokens.nbytes
    pieces = [tokens[a:b] for a, b in itertools.pairwise(edges)]
    scored = None
    if masked:
        bits = np.frombuffer(data, bool, int(lengths.sum()), offset=place)
        place += len(bits)
        scored = tuple(bits[a - prompt : b - prompt] for a, b in itertools.pairwise(edges[1:]))
    return Encoded(pieces[0], tuple(pieces[1:]), (), scored, json.loads(data[place:]))


def reader(path: Path, ends: np.ndarray) -> Callable[[int], Encoded | None]:
    """Place -> the example written there, None where none was (it has media) or it is damaged: make it from its row again.

    Read by position, not mapped: pages of a mapped file count as this process's memory.

    Args:
        path: of the file.
        ends: [N] int64, where in it each example ends; one that begins where it ends was not written.
    """
    file = path.open("rb", buffering=0)

    def read(place: int) -> Encoded | None:
        start = int(ends[place - 1]) if place else 0
        size = int(ends[place]) - start
        return unpack(os.pread(file.fileno(), size, start)) if size else None

    return read
