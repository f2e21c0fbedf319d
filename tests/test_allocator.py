"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest

from reverie import allocator


def resident():
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_freed_is_given_back():
    if allocator._trim() is None:
        pytest.skip("the C library has no malloc_trim")
    # Blocks so small that the C library keeps them, since some between them stay.
    blocks = [bytes(100_000) for _ in range(2000)]
    kept, full = blocks[::100], resident()
    del blocks
    held = resident()
    allocator.give_back()
    assert full - held < 50_000_000 < 100_000_000 < full - resident()
    assert len(kept) == 20


def test_a_library_that_cannot_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    allocator._trim.cache_clear()
    allocator.give_back()
    allocator._trim.cache_clear()
