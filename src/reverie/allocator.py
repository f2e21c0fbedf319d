"""Freed memory, given back to the system.

The C library keeps what was freed between blocks that are still in use: after a stage that learns that is gigabytes, which the next stage
would add its own to, since its tensors have other sizes. Giving it back takes less than a tenth of a second for a gigabyte and changes no result.
"""

import ctypes
from functools import cache


def give_back() -> None:
    """Gives freed memory back, where the C library can (glibc)."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> "ctypes._NamedFuncPointer | None":
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    return trim
