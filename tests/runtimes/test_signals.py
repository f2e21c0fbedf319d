"""A library may give the thread a signal stack; it does not stay."""

import ctypes
import sys

import pytest

from reverie.runtimes._signals import _Stack, signal_stack_kept


@pytest.mark.skipif(sys.platform != "linux", reason="alternate signal stacks are kept on Linux")
def test_the_signal_stack_is_what_it_was():
    library, room = ctypes.CDLL(None), ctypes.create_string_buffer(2**16)

    def stack():
        found = _Stack()
        assert library.sigaltstack(None, ctypes.byref(found)) == 0
        return found.pointer, found.flags, found.size

    before = stack()
    with signal_stack_kept():
        assert library.sigaltstack(ctypes.byref(_Stack(ctypes.addressof(room), 0, len(room))), None) == 0
        assert stack() == (ctypes.addressof(room), 0, len(room))
    assert stack() == before
