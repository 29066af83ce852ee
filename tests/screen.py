"""A terminal with a user in front of it: a pseudo-terminal in which a program, or a shell with job control, runs."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import HANG_S

PATIENCE_S = HANG_S


class Screen:
    """A program on a terminal of its own.

    Args:
        argv: its command line.
        redirected: descriptors that are files of these names and not the terminal.
    """

    def __init__(self, argv: Sequence[str], folder: Path, *, size: tuple[int, int] = (101, 37), term: str = "xterm",
                 redirected: dict[int, str] | None = None) -> None:  # fmt: skip
        self.shown = b""
        self._seen = 0
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                for number, name in (redirected or {}).items():
                    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
                environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
                os.execvpe(argv[0], list(argv), {**environment, "TERM": term})
            finally:
                os._exit(127)
        self.resize(*size)

    def resize(self, columns: int, lines: int) -> None:
        """Another size of the window."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: nobody has the terminal any more
            return False
        self.shown += data
        return bool(data)

    def until(self, text: str, timeout_s: float = PATIENCE_S) -> str:
        """What is shown from the last such call's end to `text`, which must come."""
        deadline = time.monotonic() + timeout_s
        wanted = text.encode()
        while (at := self.shown.find(wanted, self._seen)) < 0:
            assert self._read(max(0.0, deadline - time.monotonic())), f"no {text!r} in {self.shown[self._seen:][-2000:]!r}"
        start, self._seen = self._seen, at + len(wanted)
        return self.shown[start : self._seen].decode(errors="replace")

    def rest(self) -> str:
        """What is shown until everybody has left the terminal."""
        while self._read(PATIENCE_S):
            pass
        start, self._seen = self._seen, len(self.shown)
        return self.shown[start:].decode(errors="replace")

    def quiet_for(self, seconds: float) -> str:
        """What is shown in the next seconds."""
        deadline = time.monotonic() + seconds
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        start, self._seen = self._seen, len(self.shown)
        return self.shown[start:].decode(errors="replace")

    def wait(self) -> int:
        """The exit code of the program."""
        self.rest()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)

    def edits_lines(self) -> bool:
        return bool(termios.tcgetattr(self.master)[3] & termios.ICANON)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)
