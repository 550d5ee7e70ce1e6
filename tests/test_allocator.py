"""Memory that the C library holds and nobody uses goes back to the system."""

import ctypes

import pytest

from aligner.allocator import give_back
from benchmarks.machine import resident_mib


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_give_back():
    pieces = [b"x" * 100_000 for _ in range(2000)]  # 190 MiB, written to, as fresh zeros are not
    kept = pieces[::50]  # so that the C library finds no end of its heap to give up by itself
    del pieces
    before = resident_mib()
    give_back()
    assert resident_mib() < before - 150
    assert len(kept) == 40
