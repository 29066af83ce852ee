"""Checkpoints under `sfrun --local`: a process that is kept as it is, and forks clones of itself when it is told to.

The kernel tells the end of a process to its parent only, which here is the seed; so the seed tells it to the program.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from sfparallel import wire
from sfparallel.errors import VMError

_PACKET_BYTES = 1 << 20
_DESCRIPTORS = 253
"""The kernel's limit for one message (SCM_MAX_FD, unix(7))."""


class Ending(NamedTuple):
    """How a clone ended: exit code of its process, and the status that it gave to `exit` (None if it did not)."""

    code: int
    said: int | None


class Sprout(NamedTuple):
    """In a clone: what it is.

    Attributes:
        batch: which order it was made by, from 1.
        ticket: number of the ticket of that order.
        rank: 1..m within it.
        first: its label, if it were the first of its batch.
        cradle: memory that the processes of the batch share.
    """

    batch: int
    ticket: int
    rank: int
    first: int
    cradle: Any


@dataclass
class Seed:
    """The program's side of one seed; used by several threads.

    Attributes:
        line: the program's end of the line to it.
    """

    line: socket.socket
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _endings: dict[int, Ending] = field(default_factory=dict, repr=False)
    _living: set[int] = field(default_factory=set, repr=False)
    _closed: bool = False

    def order(self, ticket: int, clones: int, first: int) -> tuple[int, dict[int, int]]:
        """Have clones made.

        Returns:
            number of the batch; pidfds by process ids, in the order of ranks.

        Raises:
            VMError: that failed.
        """
        with self._lock:
            self.line.send(wire.pack({"ticket": ticket, "clones": clones, "first": first}))
            born: dict[int, int] = {}
            while len(born) < clones:
                reply, descriptors = self._receive()
                if "error" in reply:
                    raise VMError(reply["error"], hint="use fewer clones, or raise the limit of processes (ulimit -u)")
                born |= dict(zip(reply.get("born", ()), descriptors, strict=True))
            self._living.update(born)
            return reply["batch"], born

    def ending(self, pid: int) -> Ending:
        """How a clone ended that is known to have ended."""
        with self._lock:
            while pid not in self._endings:
                self._receive()
            self._living.discard(pid)
            self._close_if_done()
            return self._endings.pop(pid)

    def close(self) -> None:
        """Give no more orders. The process ends with its last clone."""
        with self._lock:
            self.line.shutdown(socket.SHUT_WR)
            self._closed = True
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._closed and not self._living:
            self.line.close()

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        data, descriptors, _flags, _address = socket.recv_fds(self.line, _PACKET_BYTES, _DESCRIPTORS)
        if not data:
            raise VMError("the process that was kept as a checkpoint is gone")
        message = wire.unpack(data)
        if "ended" in message:
            self._endings[message["ended"]] = Ending(message["code"], message["said"])
        return message, descriptors


class Keeper:
    """The seed's side: `keep` returns in the clones only.

    Args:
        line: its end of the line to the program.
        owner: the program's process id.
        make_cradle: number of clones -> what they share; `fill`, `said` as `local._Cradle` has them.
    """

    def __init__(self, line: socket.socket, owner: int, make_cradle: Callable[[int], Any]) -> None:
        self._line = line
        self._make_cradle = make_cradle
        self._batches = 0
        self._children: dict[int, tuple[int, int, Any]] = {}
        """pidfd -> pid, rank, cradle."""
        self._poll = select.poll()
        self._owner = os.pidfd_open(owner)
        for fd in (self._owner, line.fileno()):
            self._poll.register(fd, select.POLLIN)

    def keep(self) -> Sprout:
        """Wait for orders."""
        os.setsid()
        ordered = True
        while ordered or self._children:
            for fd, _ in self._poll.poll():
                if fd == self._owner:
                    self._leave()
                elif fd in self._children:
                    self._on_end(fd)
                elif order := self._line.recv(_PACKET_BYTES):
                    sprout = self._fork(wire.unpack(order))
                    if sprout is not None:
                        return sprout
                else:  # no more orders; but clones that were made go on
                    ordered = False
                    self._poll.unregister(self._line)
        self._leave()

    @staticmethod
    def _leave() -> NoReturn:
        os._exit(0)

    def _fork(self, order: dict[str, Any]) -> Sprout | None:
        self._batches += 1
        cradle = self._make_cradle(order["clones"])
        born: dict[int, int] = {}
        for rank in range(1, order["clones"] + 1):
            try:
                pid = os.fork()
            except OSError as error:
                for other, pidfd in born.items():
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                    os.close(pidfd)
                self._line.send(wire.pack({"error": f"cannot fork clone {rank} of {order['clones']}: {error.strerror}"}))
                return None
            if pid == 0:
                self._line.close()
                for fd in (self._owner, *self._children, *born.values()):
                    os.close(fd)
                return Sprout(self._batches, order["ticket"], rank, order["first"], cradle)
            born[pid] = os.pidfd_open(pid)
        for rank, (pid, pidfd) in enumerate(born.items(), 1):
            self._children[pidfd] = pid, rank, cradle
            self._poll.register(pidfd, select.POLLIN)
        pids = list(born)
        for start in range(0, len(pids), _DESCRIPTORS):
            some = pids[start:start + _DESCRIPTORS]
            message = wire.pack({"batch": self._batches, "born": some})
            socket.send_fds(self._line, [message], [born[pid] for pid in some])
        cradle.fill(list(born))
        return None

    def _on_end(self, pidfd: int) -> None:
        pid, rank, cradle = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # the program does not want to know any more
            self._line.send(wire.pack({"ended": pid, "code": code, "said": cradle.said(rank)}))
