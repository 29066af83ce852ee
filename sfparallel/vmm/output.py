"""What programs print, on its way to the terminal: the parent's bytes as they are, clones' lines with their rank in front."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

STDOUT, STDERR = 1, 2

_LONGEST_LINE_BYTES = 64 << 10


@dataclass
class LabelledOutput:
    """One clone's output: lines come out whole, so that ranks do not mix within a line.

    Args:
        label: put before each line, or empty.
        write: takes a stream (1 or 2) and bytes.
    """

    label: str
    write: Callable[[int, bytes], None]
    _partial: dict[int, bytearray] = field(default_factory=dict)

    def feed(self, stream: int, data: bytes) -> None:
        """Take what the clone printed; writes the lines that are complete."""
        if not self.label:
            self.write(stream, data)
            return
        partial = self._partial.setdefault(stream, bytearray())
        partial += data
        end = partial.rfind(b"\n") + 1
        if not end and len(partial) > _LONGEST_LINE_BYTES:
            end = len(partial)
        if end:
            self._write(stream, bytes(partial[:end]))
            del partial[:end]

    def close(self) -> None:
        """The clone is gone: what is left of its last lines comes out."""
        for stream, partial in self._partial.items():
            if partial:
                self._write(stream, bytes(partial) + b"\n")
        self._partial.clear()

    def _write(self, stream: int, lines: bytes) -> None:
        prefix = self.label.encode()
        self.write(stream, b"".join(prefix + line for line in lines.splitlines(keepends=True)))


def write_all(fd: int, data: bytes) -> None:
    """Write to our stdout or stderr; a reader that went away (`| head`) ends the output, not the job.

    Raises:
        OSError: the stream is closed, or its device full.
    """
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        return
