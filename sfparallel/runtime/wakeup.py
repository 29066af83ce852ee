"""A signal ends every wait.

Python's handlers run between two steps of the interpreter. A signal that arrives after the last step before poll(2) blocks, or
that the kernel delivers to another thread, does not interrupt the call, and its handler waits for the next event, which may never
come. The C part of signal handling writes a byte to the "wakeup" descriptor at once, whatever the interpreter does; who polls
that too misses nothing (docs.python.org, `signal.set_wakeup_fd`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Self


class SignalAlarm:
    """Something to poll that becomes readable when a signal arrives. In a thread other than the main one it never does: handlers
    do not run there.

    A program may have a wakeup descriptor of its own (an event loop has). It gets what arrives meanwhile, and has its place again
    afterwards.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._programs = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._programs = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._programs)
        self.reset()
        os.close(self._read_end)
        os.close(self._write_end)

    def fileno(self) -> int:
        return self._read_end

    def reset(self) -> None:
        """Take what has arrived."""
        with contextlib.suppress(BlockingIOError):
            while numbers := os.read(self._read_end, 1024):
                if self._programs >= 0:
                    with contextlib.suppress(OSError):  # full, or gone: as the interpreter itself does
                        os.write(self._programs, numbers)
