"""Keeps a library from leaving a thread with a signal stack that handlers crash on.

OpenVINO 2026.4 gives the thread that compiles a model an alternate signal stack of the least size that the kernel takes (11,568 bytes here), and
leaves it there. Python runs its handlers on alternate stacks where there are some: after a model was compiled, Ctrl-C ended the process with a
segmentation fault in every second run or so. The normal stack has room.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """The thread has the signal stack that it had before; elsewhere than on Linux nothing is done."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
