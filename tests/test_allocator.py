"""Memory that the C library holds and nobody uses goes back to the system."""

import ctypes
from pathlib import Path

import pytest

from aligner.allocator import give_back


def resident() -> float:
    """MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_give_back():
    pieces = [bytes(100_000) for _ in range(2000)]  # 190 MiB, in pieces that the C library keeps for the next to ask
    last = pieces.pop()
    del pieces
    before = resident()
    give_back()
    assert resident() < before - 150
    assert len(last) == 100_000
