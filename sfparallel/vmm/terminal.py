"""The user's terminal: what the guest's program is told of it, who may read it, and the modes that a program wants it to have.

The terminal stays as the user has it: it edits lines, echoes, and makes signals of keys. The guest's program has a terminal of
its own (runtime/agent/pty.c), which passes bytes, and tells when a program changes its modes (MODES); the same is done here then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
import termios
import threading
from collections.abc import Iterator
from typing import Any

STDIN, STDOUT, STDERR = range(3)
_VARIABLES = ("TERM", "COLORTERM", "NO_COLOR", "COLUMNS", "LINES")
_IFLAG, _OFLAG, _LFLAG, _CC = 0, 1, 3, 6  # of tcgetattr(3) in Python
_MODES = struct.Struct("<3I2B")
_SIZE = struct.Struct("<BHH")
_NEVER_OURS = 0x10000 | 0x4000  # EXTPROC, IUTF8 (Linux: lflag and iflag): the guest's terminal has them, the user's is not to
_BACKGROUND_S = 0.1
_PIECE_BYTES = 32 << 10


def environment() -> dict[str, str]:
    """What is passed on of the host's environment, because it says what the terminal can do, and is to do."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def streams() -> frozenset[int]:
    """Which of the standard streams are one terminal, the program's. It is the one of standard output, if that is one; a stream
    on another terminal is passed on as a pipe."""
    found = [number for number in (STDOUT, STDERR, STDIN) if os.isatty(number)]
    if not found:
        return frozenset()
    device = os.fstat(found[0]).st_rdev
    return frozenset(number for number in found if number == STDIN or os.fstat(number).st_rdev == device)


def described(numbers: frozenset[int]) -> bytes:
    """The payload of a TERMINAL frame: which descriptors are the terminal, and its size."""
    size = (0, 0)
    for number in numbers:
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(number)
            break
    return _SIZE.pack(sum(1 << number for number in numbers), min(size[1], 0xFFFF), min(size[0], 0xFFFF))


def in_foreground(descriptor: int) -> bool:
    """Whether this process may read a terminal now.

    Process groups cannot be compared here: those of outside are all 0 in the job's PID namespace. But the kernel says it: to a
    thread that blocks SIGTTIN, a read in the background is an error, even one of no bytes (drivers/tty/tty_jobctrl.c).
    """
    with _blocked(signal.SIGTTIN):
        try:
            os.read(descriptor, 0)
        except OSError as error:
            if error.errno == errno.EIO:
                return False
            raise
    return True


@contextlib.contextmanager
def _blocked(*numbers: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Input:
    """Reads standard input, in a thread: it may be a file, which epoll does not take."""

    def __init__(self) -> None:
        self.is_terminal = os.isatty(STDIN)

    def read(self) -> tuple[bytes, bool]:
        """The next piece, empty at an end of file; and whether that was the last one: at a terminal more may follow.

        What is typed while another process group has the terminal is that one's: nothing is read then, nor is it an end of file.
        """
        poll = select.poll()
        poll.register(STDIN, select.POLLIN)
        while not self.is_terminal:
            try:
                data = os.read(STDIN, _PIECE_BYTES)
            except BlockingIOError:  # who shares it has made it so (O_NONBLOCK is of the open file)
                poll.poll()
                continue
            except OSError:
                data = b""
            return data, not data
        with _blocked(signal.SIGTTIN):
            while True:
                events = poll.poll()
                try:
                    data = os.read(STDIN, _PIECE_BYTES)
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno != errno.EIO or _hung_up(events):
                        return b"", True
                    # No event tells when the terminal becomes ours: the shell sends SIGCONT only to who has stopped.
                    threading.Event().wait(_BACKGROUND_S)
                    continue
                return data, not data and _hung_up(events)


def _hung_up(events: list[tuple[int, int]]) -> bool:
    return any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in events)


class Modes:
    """The modes of the terminal behind standard input: the user's own, and what the program wants to be different."""

    def __init__(self) -> None:
        self._users: list[Any] | None = None
        self._first: tuple[int, ...] | None = None
        self._wanted: tuple[int, ...] | None = None
        if os.isatty(STDIN):
            with contextlib.suppress(termios.error):
                self._users = termios.tcgetattr(STDIN)

    def change(self, payload: bytes) -> None:
        """Take what a MODES frame says; the first one says how the guest's terminal begins."""
        if len(payload) != _MODES.size:
            return
        self._wanted = _MODES.unpack(payload)
        self._first = self._first or self._wanted
        self.apply()

    def apply(self) -> None:
        """Give the terminal the modes that the program wants, if it is ours now."""
        if self._users is None or self._wanted is None or self._first is None or not in_foreground(STDIN):
            return
        modes = [*self._users[:_CC], list(self._users[_CC])]
        for place, first, wanted in zip((_IFLAG, _OFLAG, _LFLAG), self._first, self._wanted, strict=False):
            changed = (first ^ wanted) & ~_NEVER_OURS
            modes[place] = modes[place] & ~changed | wanted & changed
        if not modes[_LFLAG] & termios.ICANON:
            modes[_CC][termios.VMIN], modes[_CC][termios.VTIME] = self._wanted[3:]
        self._set(modes)

    def restore(self) -> None:
        """Give the terminal back as it was."""
        if self._users is not None and self._wanted is not None and in_foreground(STDIN):
            self._set(self._users)

    def _set(self, modes: list[Any]) -> None:
        # The terminal may change hands after we looked: then this must not stop us (SIGTTOU).
        with _blocked(signal.SIGTTOU), contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSANOW, modes)
