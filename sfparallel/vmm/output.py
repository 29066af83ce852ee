"""What programs print, on its way to the terminal: the parent's bytes as they are, clones' lines with their rank in front."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

STDOUT, STDERR = 1, 2

_LONGEST_LINE_BYTES = 64 << 10
REDRAWN_EVERY_S = 10.0
"""How often a line that a clone redraws is shown before it ends."""
_MOVES = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b[78DEHMc]|\x08")
"""Control sequences but for SGR (colours), and single ones that move the cursor or reset the terminal."""


@dataclass
class LabelledOutput:
    """One clone's output: lines come out whole, so that ranks do not mix within a line.

    Several ranks share the terminal, and each line has its label: none may go back to what it or another one has written. Of a
    line that is redrawn (carriage returns: progress bars) its last state comes out when it ends, and meanwhile one now and then,
    as a line of its own. Sequences that move the cursor or erase are left out (ECMA-48); colours stay.

    Args:
        label: put before each line; empty: everything passes as it is.
        write: takes a stream (1 or 2) and bytes.
        clock: seconds.
    """

    label: str
    write: Callable[[int, bytes], None]
    clock: Callable[[], float] = time.monotonic
    _partial: dict[int, bytearray] = field(default_factory=dict)
    _shown_at: dict[int, float] = field(default_factory=dict)

    def feed(self, stream: int, data: bytes) -> None:
        """Take what the clone printed; writes the lines that are complete."""
        if not self.label:
            self.write(stream, data)
            return
        partial = self._partial.setdefault(stream, bytearray())
        partial += data
        end = partial.rfind(b"\n") + 1
        if end:
            self._write(stream, [line + b"\n" for line in bytes(partial[: end - 1]).split(b"\n")])
            del partial[:end]
        if b"\r" in partial[:-1]:
            self._redrawn(stream, partial)
        if len(partial) > _LONGEST_LINE_BYTES:
            self._write(stream, [bytes(partial)])
            partial.clear()

    def close(self) -> None:
        """The clone is gone: what is left of its last lines comes out."""
        for stream, partial in self._partial.items():
            if last := _as_it_stands(bytes(partial)):
                self._write(stream, [last + b"\n"])
        self._partial.clear()

    def _redrawn(self, stream: int, partial: bytearray) -> None:
        """A line begins anew: what it showed before is gone, but for once in a while."""
        now = self.clock()
        state = _as_it_stands(bytes(partial))
        partial[: partial.rstrip(b"\r").rfind(b"\r")] = b""
        if state and now - self._shown_at.setdefault(stream, now) >= REDRAWN_EVERY_S:
            self._shown_at[stream] = now
            self._write(stream, [state + b"\n"])

    def _write(self, stream: int, lines: list[bytes]) -> None:
        prefix = self.label.encode()
        self.write(stream, b"".join(prefix + _settled(line) for line in lines))


def _settled(line: bytes) -> bytes:
    """A line as it stands when all of it was written, with its end."""
    body = line.rstrip(b"\r\n")
    return _as_it_stands(body) + line[len(body) :]


def _as_it_stands(body: bytes) -> bytes:
    """What is to be seen of a line that may have been redrawn; empty if it was erased."""
    states = _MOVES.sub(b"", body).rstrip(b"\r").split(b"\r")
    return states[0] if len(states) == 1 else states[-1].rstrip()


class Output:
    """Our standard output and error, written by threads: a reader that stalls must not stall the job.

    Nothing here blocks, and nothing is refused. Whoever writes looks at `full`, and holds its source back until `on_room`.
    Streams that are one file share a thread, so that what is printed keeps its order there.

    Args:
        on_room: called in the event loop when a stream that was full has room again.
        on_error: called in the event loop, once for each stream, when it cannot be written; what follows is dropped. Where a
            reader went away (`| head`) it is a BrokenPipeError.
    """

    def __init__(self, on_room: Callable[[], None], on_error: Callable[[int, OSError], None]) -> None:
        out = _Outlet(on_room, on_error)
        self._outlets = {STDOUT: out, STDERR: out if _are_one_file() else _Outlet(on_room, on_error)}

    def write(self, stream: int, data: bytes) -> None:
        """Take bytes for a stream. May be called in any thread."""
        self._outlets[stream].put(stream, data)

    def full(self, stream: int) -> bool:
        """Whether more waits for this stream's reader than should."""
        return self._outlets[stream].full

    def allow_more(self) -> None:
        """Let as much again be taken as fills a stream, whatever waits already."""
        for outlet in self._outlets.values():
            outlet.allow_more()

    async def written(self) -> None:
        """Wait until all that was taken has been written (or could not be)."""
        await asyncio.gather(*(outlet.written() for outlet in self._outlets.values()))


class _Outlet:
    """A thread that writes, and what waits for it."""

    LIMIT_BYTES = 8 << 20
    PIECE_COST_BYTES = 100  # what a piece costs beside its bytes: a guest may send any number of tiny ones

    def __init__(self, on_room: Callable[[], None], on_error: Callable[[int, OSError], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_room = on_room
        self._on_error = on_error
        self._pieces: queue.SimpleQueue[tuple[int, bytes] | asyncio.Future[None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._limit = self.LIMIT_BYTES
        # A daemon: it may stand in write(2) for ever, and must not keep the process.
        threading.Thread(target=self._write_all, name="output", daemon=True).start()

    @property
    def full(self) -> bool:
        with self._lock:
            return self._waiting >= self._limit

    def put(self, stream: int, data: bytes) -> None:
        with self._lock:
            self._waiting += len(data) + self.PIECE_COST_BYTES
        self._pieces.put((stream, data))

    def allow_more(self) -> None:
        with self._lock:
            self._limit = self._waiting + self.LIMIT_BYTES

    async def written(self) -> None:
        mark = self._loop.create_future()
        self._pieces.put(mark)
        await mark

    def _write_all(self) -> None:
        broken: set[int] = set()
        # The loop may be closed by now: then nobody waits for an answer.
        with contextlib.suppress(RuntimeError):
            while True:
                piece = self._pieces.get()
                if isinstance(piece, asyncio.Future):
                    self._loop.call_soon_threadsafe(_resolve, piece)
                    continue
                stream, data = piece
                if stream not in broken and not self._write(stream, data):
                    broken.add(stream)
                self._taken(len(data) + self.PIECE_COST_BYTES)

    def _write(self, stream: int, data: bytes) -> bool:
        """Write to a descriptor; returns whether it is worth going on."""
        view = memoryview(data)
        try:
            while view:
                try:
                    view = view[os.write(stream, view) :]
                except BlockingIOError:  # who shares this stream has made it so (O_NONBLOCK is of the open file)
                    _wait_for(stream, select.POLLOUT)
        except OSError as error:
            self._loop.call_soon_threadsafe(self._on_error, stream, error)
            return False
        return True

    def _taken(self, size: int) -> None:
        with self._lock:
            was_full = self._waiting >= self._limit
            self._waiting -= size
            room = was_full and self._waiting < self._limit
            self._limit = max(self.LIMIT_BYTES, min(self._limit, self._waiting + self.LIMIT_BYTES))
        if room:
            self._loop.call_soon_threadsafe(self._on_room)


def _wait_for(descriptor: int, event: int) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    poll.poll()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _are_one_file() -> bool:
    try:
        return os.path.sameopenfile(STDOUT, STDERR)
    except OSError:  # one of them is closed; writing to it will tell
        return False
