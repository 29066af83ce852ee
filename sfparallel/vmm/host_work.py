"""What VMs ask of the host's files, and who does it: the job's loop, or a thread where the loop would have to wait for a server.

A file system whose server is gone makes whoever asks it wait for ever, in the kernel, where nothing can interrupt it. A thread
that hangs so is left behind, and goes with its process; signals, time limits and other VMs go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sfparallel.errors import ProtocolError
from sfparallel.vmm.vm import Vm

log = logging.getLogger(__name__)

MOST_WAITING_BYTES = 4 << 20
"""Of one VM. A kernel has 64 read-aheads under way per folder, and a request of some 100 bytes for each thread that waits for a
file; a copy-back has 16 pieces of 64 KiB under way."""

MOST_THREADS_OF_VM = 8
"""For requests of one VM: as many of its files may hang before its other files wait too."""

MOST_THREADS = 1024
"""Of a job. Those that hang for a VM that is gone are among them."""

SLOW_S = 10.0
MOST_TOLD = 20

_PIECE_COST_BYTES = 100
_IDLE_THREADS = 8


class Way(enum.Enum):
    """How a piece of work is done."""

    HERE = enum.auto()
    """In the loop: a thread for each would cost several times as much as the work itself."""
    ASIDE = enum.auto()
    """In a thread, beside others of the same VM."""
    IN_ORDER = enum.auto()
    """In a thread, one after the other of the same VM."""


_MOST_AT_ONCE = {Way.ASIDE: MOST_THREADS_OF_VM, Way.IN_ORDER: 1}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some work for a VM.

    Attributes:
        size: of what it holds in memory.
        do: the work.
        take: called in the loop with what `do` has returned, unless the VM is gone.
        where: which file it is about, for people. It asks nobody.
        after: called where `do` was. What it returns is called when the outcome is on its way, in a thread only: what may take
            long and must not keep the VM.
    """

    size: int
    do: Callable[[], Any]
    take: Callable[[Any], None]
    where: Callable[[], str]
    after: Callable[[], Callable[[], None] | None] = lambda: None


@dataclass(eq=False, slots=True)
class _Line:
    """What a VM waits for."""

    vm: Vm
    way: Way
    waiting: deque[Piece] = field(default_factory=deque)
    size: int = 0
    busy: int = 0


@dataclass(eq=False, slots=True)
class _UnderWay:
    """A piece that a thread is at."""

    piece: Piece
    line: _Line
    since: float
    told: bool = False


@dataclass(frozen=True, slots=True)
class _Failure:
    """The outcome of a piece with a mistake of ours in it."""

    cause: str


class _Thread:
    """Does one piece after the other."""

    def __init__(self) -> None:
        """Raises RuntimeError: the kernel makes no more threads."""
        self._pieces: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="files", daemon=True).start()

    def do(self, piece: Callable[[], None] | None) -> None:
        """None ends it."""
        self._pieces.put(piece)

    def _run(self) -> None:
        while piece := self._pieces.get():
            piece()
            del piece  # or this thread would keep what it holds until the next one


class HostWork:
    """All of a job; for use in its loop.

    Args:
        tell: shows the user a line.
        most_threads: at most, of all VMs.
    """

    def __init__(self, tell: Callable[[str], None], most_threads: int = MOST_THREADS) -> None:
        self._tell = tell
        self._told = 0
        self._lines: dict[tuple[Vm, Way], _Line] = {}
        self._under_way: set[_UnderWay] = set()
        """Those whose VM is gone, too."""
        self._short: dict[_Line, None] = {}
        """What waits for a thread, in order."""
        self._idle: list[_Thread] = []
        self._most_threads = most_threads
        self._threads = 0
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[None] | None = None

    def is_free(self, vm: Vm) -> bool:
        """Whether what is asked for by a VM now could be done here at once."""
        return not vm.congested and (vm, Way.HERE) not in self._lines and not self._ended

    def add(self, vm: Vm, way: Way, piece: Piece) -> None:
        """Do it when the VM has read earlier answers.

        Raises:
            ProtocolError: more wait than a guest of ours can have under way.
        """
        if self._ended:
            return
        line = self._lines.get((vm, way))
        if not line:
            line = self._lines[vm, way] = _Line(vm, way)
        line.waiting.append(piece)
        line.size += piece.size + _PIECE_COST_BYTES
        if line.size > MOST_WAITING_BYTES:
            congested = vm.congested
            self.forget(vm)
            raise ProtocolError("it requests files and does not read the answers" if congested else
                                "it requests more files at a time than a kernel does")
        self._advance(line)

    def go_on(self, vm: Vm) -> None:
        """The VM has room for answers again."""
        for way in Way:
            line = self._lines.get((vm, way))
            if line:
                self._advance(line)

    def forget(self, vm: Vm) -> None:
        """Do nothing more for it: it is gone."""
        for way in Way:
            line = self._lines.pop((vm, way), None)
            if line:
                line.waiting.clear()
                self._short.pop(line, None)

    def hanging(self, vm: Vm | None = None) -> list[str]:
        """The files that are waited for; by one VM, or all."""
        return [each.piece.where() for each in self._under_way if vm in (None, each.line.vm)]

    async def end(self, limit_s: float) -> list[str]:
        """Take nothing more, and wait a moment for what is under way.

        Returns:
            The files that did not answer.
        """
        self._ended = asyncio.get_running_loop().create_future()
        self._lines.clear()
        self._short.clear()
        if self._under_way:
            await asyncio.wait([self._ended], timeout=limit_s)
        if self._timer:
            self._timer.cancel()
        self._dismiss(0)
        return self.hanging()

    # -- who does what ---------------------------------------------------------------------------------------------

    def _advance(self, line: _Line) -> None:
        while line.waiting and not line.vm.congested:
            if line.way is Way.HERE:
                piece = line.waiting.popleft()
                line.size -= piece.size + _PIECE_COST_BYTES
                piece.take(piece.do())
            elif line.busy >= _MOST_AT_ONCE[line.way]:
                return
            elif thread := self._thread():
                self._short.pop(line, None)
                self._start(thread, line.waiting.popleft(), line)
            else:
                self._short[line] = None
                return
        if not line.waiting and not line.busy:
            self._lines.pop((line.vm, line.way), None)

    def _thread(self) -> _Thread | None:
        if self._idle:
            return self._idle.pop()
        if self._threads >= self._most_threads:
            return None
        try:
            thread = _Thread()
        except RuntimeError:  # a limit of the host (ulimit -u, pids.max); one that comes back does this piece
            if self._threads:
                return None
            raise
        self._threads += 1
        return thread

    def _start(self, thread: _Thread, piece: Piece, line: _Line) -> None:
        under_way = _UnderWay(piece, line, time.monotonic())
        line.busy += 1
        self._under_way.add(under_way)
        loop = asyncio.get_running_loop()

        def do() -> None:
            try:
                outcome: Any = piece.do()
            except Exception as error:  # a mistake of ours: it must not cost more than this VM
                log.exception("a guest's request for host files failed in the supervisor")
                outcome = _Failure(f"the supervisor failed on its request: {error!r:.200}")
            after = piece.after()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._done, under_way, outcome, None if after else thread)
                if after:
                    after()
                    loop.call_soon_threadsafe(self._free, thread)

        thread.do(do)
        if not self._timer:
            self._timer = loop.call_later(SLOW_S, self._look)

    def _done(self, under_way: _UnderWay, outcome: Any, thread: _Thread | None) -> None:
        line, piece = under_way.line, under_way.piece
        line.busy -= 1
        line.size -= piece.size + _PIECE_COST_BYTES
        self._under_way.discard(under_way)
        if thread:
            self._free(thread)
        if self._ended:
            if not self._under_way and not self._ended.done():
                self._ended.set_result(None)
        elif self._lines.get((line.vm, line.way)) is line:
            if isinstance(outcome, _Failure):
                line.vm.end(outcome.cause)
            else:
                piece.take(outcome)
            self._advance(line)

    def _free(self, thread: _Thread) -> None:
        self._idle.append(thread)
        for line in list(self._short):
            if not self._idle:
                break
            del self._short[line]
            self._advance(line)
        self._dismiss(0 if self._ended else _IDLE_THREADS)

    def _dismiss(self, rest: int) -> None:
        """End threads that have nothing to do, but for `rest`."""
        while len(self._idle) > rest:
            self._threads -= 1
            self._idle.pop().do(None)

    def _look(self) -> None:
        """Who waits for a long time is to know for what."""
        self._timer = None
        for each in self._under_way:
            if not each.told and time.monotonic() - each.since >= SLOW_S and self._told < MOST_TOLD:
                each.told = True
                self._told += 1
                self._tell(f"sfrun: the host has not answered for {each.piece.where()} for {SLOW_S:g} s; "
                           f"{each.line.vm.name} waits for it")
        if self._under_way:
            self._timer = asyncio.get_running_loop().call_later(SLOW_S / 2, self._look)
