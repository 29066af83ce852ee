"""What the serial console of a guest prints, and its QEMU: a file of which only the end is kept."""

from __future__ import annotations

import contextlib
import os

from sfparallel.text import printable
from sfparallel.vmm.qmp import reopened

TAIL_BYTES = 4096
KEPT_BYTES = 64 << 10
LIMIT_BYTES = 1 << 20
"""Of the file. It is looked at every `PERIOD_S`: meanwhile it can grow by what a serial port takes in that time."""

PERIOD_S = 1.0


class Console:
    """A console's file. QEMU appends to it and never waits for anybody, which a pipe or socket could make it do.

    Args:
        descriptor: of the file, open for reading; owned by this object.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._kept = b""

    def tail(self) -> str:
        """The end of what was printed."""
        try:
            tail = self._end(TAIL_BYTES)
        except OSError:
            tail = self._kept[-TAIL_BYTES:]
        return printable(tail.decode(errors="replace").replace("\r", "")).strip()

    def trim(self) -> None:
        """Keep the file small. What is printed between the two steps of this is lost; the end of a panic comes once."""
        try:
            if os.fstat(self._descriptor).st_blocks * 512 <= LIMIT_BYTES:
                return
            self._kept = self._end(KEPT_BYTES)
            # Our descriptor is for reading only. QEMU's writes go to the end, wherever that is (O_APPEND).
            with reopened(self._descriptor, os.O_WRONLY) as writable:
                os.ftruncate(writable, 0)
        except OSError:
            return  # it is tried again

    def close(self) -> None:
        """The end of it can still be asked for; the number of the descriptor will soon be another file's."""
        with contextlib.suppress(OSError):
            self._kept = self._end(TAIL_BYTES)
        os.close(self._descriptor)
        self._descriptor = -1

    def _end(self, size: int) -> bytes:
        length = os.fstat(self._descriptor).st_size
        # Without O_APPEND (a libvirt daemon's file) there is a hole where the file was cut.
        new = os.pread(self._descriptor, size, max(0, length - size)).lstrip(b"\0")
        return (self._kept + new)[-size:]
