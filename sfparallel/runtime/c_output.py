"""What C code of this process has buffered of standard output and error.

C's stdout is not Python's: `printf` of an extension waits in a buffer of libc, which leaves when the process exits. Clones do not
exit, and a fork would multiply what waits in the parent. C++'s streams write to these buffers too, if not told otherwise.
Fortran needs nothing: libgfortran writes what is printed to units 0 and 6 at once, also without a line's end (seen with gfortran
12).

Only these two streams are flushed, not all (`fflush(NULL)`): that waits for the lock of every stream, also of a stdin that
another thread reads from, until somebody types a line.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

# struct _IO_FILE of glibc on 64-bit machines, in words. It has been so since 1999, because programs have it in their own memory.
_WORDS = 27
_WRITE_BASE, _WRITE_PTR, _MODE = 4, 5, 24
_WIDE = 1
"""The mode of a stream that wide characters were written to; those wait in another buffer."""


class COutput:
    """Flushes the two streams. Where nothing waits it costs little, because clones come by here for each answer: a call through
    ctypes takes a clone 1.5 ms under emulation, a look at what there is to do 0.2 (measured)."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.streams = [_Stream(libc, name) for name in ("stdout", "stderr")]

    def flush(self) -> None:
        """Have all of it written; who reads it may have gone."""
        for stream in self.streams:
            words = stream.words
            if words is None or words[_WRITE_PTR] != words[_WRITE_BASE] or words[_MODE] & 0xffffffff == _WIDE:
                stream.flush()


class _Stream:
    """One of C's streams.

    Attributes:
        words: its struct, to be looked at before it is flushed; None if this is not the libc that has it so.
        flush: writes what it has buffered.
    """

    def __init__(self, libc: ctypes.CDLL, name: str) -> None:
        address = ctypes.c_void_p.in_dll(libc, name).value or 0
        fflush = libc["fflush"]
        fflush.argtypes = [ctypes.c_void_p]
        self.flush: Callable[[], object] = functools.partial(fflush, address)
        self.words: memoryview | None = None
        if ctypes.sizeof(ctypes.c_void_p) == 8 and hasattr(libc, "gnu_get_libc_version"):
            words = memoryview((ctypes.c_uint64 * _WORDS).from_address(address)).cast("B").cast("Q")
            pending = libc["__fpending"]
            pending.argtypes, pending.restype = [ctypes.c_void_p], ctypes.c_size_t
            if words[_MODE] & 0xffffffff == _WIDE or pending(address) == words[_WRITE_PTR] - words[_WRITE_BASE]:
                self.words = words


C_OUTPUT = COutput()
