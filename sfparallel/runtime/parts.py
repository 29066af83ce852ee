"""Large messages of a clone to its region's parent: in pieces, each a message of its own.

ZeroMQ's limits count whole messages (`ZMQ_RCVHWM`), or are of one frame (`ZMQ_MAXMSGSIZE`): what belongs to one message is
kept until its last frame is here, however much that is. So nothing large is one message. It is announced (Kind.PARTS: how many
parts, how many bytes), then comes as a stream of pieces: the lengths of the parts, then the parts. So ZeroMQ's queue has a
bound, and the parent knows what is to come before it takes memory for it; what fills a queue all the same is sent by no rank
of ours (`inflow`).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sfparallel.errors import ProtocolError

PIECE_BYTES = 256 << 10
"""Of one message. More would be faster by little; the queue of one connection holds `link.UNREAD` of them."""

MAX_FRAMES = 1 << 17
"""Large buffers and collected files of one message. Frames may be of any size: so may results."""

_LENGTH = struct.Struct("<Q")
_JOINED_BYTES = 32 << 10
"""Smaller parts (of collected files) share a piece."""

Buffer = bytes | bytearray | memoryview


def pieces(parts: Sequence[Buffer]) -> Iterator[Any]:
    """The stream of a message: pieces of at most `PIECE_BYTES`; large parts are referred to, not copied."""
    joined = bytearray(b"".join(_LENGTH.pack(len(part)) for part in parts))
    for part in parts:
        view = memoryview(part)
        if len(joined) + len(view) <= PIECE_BYTES and len(view) <= _JOINED_BYTES:
            joined += view
            continue
        yield from _cut(memoryview(bytes(joined)))
        joined.clear()
        if len(view) <= _JOINED_BYTES:
            joined += view
        else:
            yield from _cut(view)
    yield from _cut(memoryview(bytes(joined)))


def _cut(view: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(view), PIECE_BYTES):
        yield view[at:at + PIECE_BYTES]


class Incoming:
    """A message that comes in pieces.

    Args:
        count, nbytes: as they were announced: of its parts.
        promised: bytes that others may still fill.

    Raises:
        ProtocolError: there is no memory for it.
    """

    def __init__(self, count: int, nbytes: int, promised: int = 0) -> None:
        if not count:
            raise ProtocolError("the announcement of a message without parts")
        if nbytes > PIECE_BYTES and nbytes > (free := max(0, _spare_bytes() - promised)):
            raise ProtocolError(f"a result of {nbytes >> 20} MiB, for which there is no memory here ({free >> 20} MiB are free)")
        self.complete = False
        self.missing = nbytes
        """Bytes of parts that have not come."""
        self.parts: list[memoryview] = []
        self._count = count
        self._lengths = bytearray()
        self._sizes: Iterator[int] = iter(())
        self._at = 0
        """Where in the last part the next piece goes."""

    def feed(self, piece: memoryview) -> None:
        """Take the next piece.

        Raises:
            ProtocolError: it is not what was announced.
        """
        if not piece:
            raise ProtocolError("an empty piece of a message")
        if (lacking := _LENGTH.size * self._count - len(self._lengths)) > 0:
            self._lengths += piece[:lacking]
            piece = piece[lacking:]
            if len(self._lengths) < _LENGTH.size * self._count:
                return
            sizes = [size for size, in _LENGTH.iter_unpack(self._lengths)]
            if sum(sizes) != self.missing:
                raise ProtocolError(f"{len(sizes)} parts of a message that have {sum(sizes)} bytes, not {self.missing}")
            self._sizes = iter(sizes)
            self._next_part()
        while piece:
            if not self.missing:
                raise ProtocolError("more than it had announced")
            part = self.parts[-1]
            count = min(len(part) - self._at, len(piece))
            part[self._at:self._at + count] = piece[:count]
            self._at += count
            self.missing -= count
            piece = piece[count:]
            self._next_part()
        self.complete = not self.missing

    def _next_part(self) -> None:
        """Make room for the next part that has bytes, when the last one is full. Not before: memory is taken as it is filled."""
        while not self.parts or self._at == len(self.parts[-1]):
            size = next(self._sizes, None)
            if size is None:
                return
            self.parts.append(_room(size))
            self._at = 0


def _room(size: int) -> memoryview:
    if size < PIECE_BYTES:
        return memoryview(bytearray(size))
    try:
        # Not a bytearray: that one is filled with zeros first. Private, so that a process which the program forks has a copy.
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (OSError, OverflowError, ValueError):
        raise ProtocolError(f"a part of a result of {size >> 20} MiB, for which there is no memory here") from None


def _spare_bytes() -> int:
    """What results may take. The rest is for the program, which goes on with them: if they took all, the kernel would end it."""
    free = free_bytes()
    return free - free // 16


def free_bytes() -> int:
    """Memory that this machine has left, by the kernel's estimate, and its swap."""
    found: dict[str, Any] = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return sum(int(found[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))
