"""A test double of the supervisor: forks the calling process with `os.fork` instead of its VM.

Good for fast tests of a region's logic, and for nothing else: its "clones" share the host's kernel, files and network. They get
addresses 127.1.x.y, so that the check of a message's origin is the real one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from sfparallel import wire
from sfparallel.errors import CapacityError
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Answer, Fork, Grant, Hello, Lost, Sibling

_NO_STATUS = 255


class Shared:
    """State that all processes of a test share: the last address given out."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def take_addresses(self, count: int) -> list[str]:
        (last,) = struct.unpack("Q", self._memory[:])
        self._memory[:] = struct.pack("Q", last + count)
        return [f"127.1.{(last + k) >> 8}.{(last + k) & 255}" for k in range(1, count + 1)]


@dataclass
class _Child:
    ticket: int
    rank: int
    pid: int
    pidfd: int
    said_exit: mmap.mmap
    status: int | None = None


@dataclass
class ForkDouble:
    """One line to the double.

    Attributes:
        capacity: clones that "fit".
        default_n: as if `sfrun -n` were given.
        seed: as if the job had a seed.
    """

    shared: Shared
    capacity: int = 64
    default_n: int | None = None
    seed: int | None = None
    address: str = "127.0.0.1"
    role: str = "parent"
    reports: list[tuple[float, float]] = field(default_factory=list)
    keeps_threads: bool = False
    answer_bytes: int = 0

    def __post_init__(self) -> None:
        self._tickets: dict[int, int] = {}
        self._children: list[_Child] = []
        self._epoll = select.epoll()
        self._said_exit: mmap.mmap | None = None
        # A packet is [ticket, rank, answer]; both ends are in all processes of the family.
        self._answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._upwards = self._answers[1]
        self._ticket_rank = (0, 0)
        self._epoll.register(self._answers[0], select.EPOLLIN)

    def hello(self) -> Hello:
        return Hello(role=self.role, address=self.address, default_n=self.default_n, seed=self.seed, job="double",
                     answer_bytes=self.answer_bytes)

    def request_ticket(self, n: int) -> Grant:
        if not self.capacity:
            raise CapacityError("no clone fits", fits=0)
        number = len(self._tickets) + 1
        self._tickets[number] = min(n, self.capacity)
        return Grant(number, self._tickets[number])

    def clone(self, ticket: int, clones: int, context: bytes) -> Fork:
        addresses = self.shared.take_addresses(clones)
        siblings = tuple(Sibling(rank, address, f"host{rank % 2}") for rank, address in enumerate(addresses, 1))
        for sibling in siblings:
            said_exit = mmap.mmap(-1, 1)
            said_exit[0] = _NO_STATUS
            pid = os.fork()
            if pid == 0:
                return self._become(ticket, sibling, siblings, said_exit)
            child = _Child(ticket, sibling.rank, pid, os.pidfd_open(pid), said_exit)
            self._children.append(child)
            self._epoll.register(child.pidfd, select.EPOLLIN)
        return Fork(0, self.address, "", siblings)

    def exit(self, status: int, answer: bytes = b"", *, ran_ns: int = 0) -> NoReturn:
        assert self._said_exit is not None
        assert len(answer) <= self.answer_bytes
        if answer:
            self._upwards.send(wire.pack({"from": self._ticket_rank, "data": answer}))
        self._said_exit[0] = status
        os._exit(status)

    def join(self, ticket: int, timeout_s: float | None) -> dict[int, int] | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for child in self._of(ticket):
            if child.status is None:
                poll = select.poll()
                poll.register(child.pidfd, select.POLLIN)
                if not poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
                    return None
                self._reap(child)
        return {child.rank: child.status or 0 for child in self._of(ticket)}

    def kill(self, ticket: int, ranks: list[int] | None) -> None:
        for child in self._of(ticket):
            if child.status is None and (ranks is None or child.rank in ranks):
                os.kill(child.pid, signal.SIGKILL)
                self._reap(child)

    def report(self, ticket: int, first_s: float, last_s: float) -> None:
        self.reports.append((first_s, last_s))

    def fileno(self) -> int:
        return self._epoll.fileno()

    def events(self) -> list[Lost | Answer]:
        events: list[Lost | Answer] = []
        ready = {fd for fd, _ in self._epoll.poll(0)}
        with contextlib.suppress(BlockingIOError):
            while packet := self._answers[0].recv(1 << 20, socket.MSG_DONTWAIT):
                message = wire.unpack(packet)
                ticket, rank = message["from"]
                events.append(Answer(ticket, rank, message["data"]))
        for child in self._children:
            if child.status is None and child.pidfd in ready:
                self._reap(child)
                if child.said_exit[0] == _NO_STATUS:
                    cause = f"wait status {child.status}"
                    events.append(Lost(child.ticket, child.rank, cause, f"host{child.rank % 2}", "last words"))
        return events

    def close(self) -> None:
        for ticket in self._tickets:
            self.kill(ticket, None)
        self._epoll.close()
        for end in self._answers:
            end.close()

    @property
    def alive(self) -> int:
        """Clones that are still there."""
        return sum(child.status is None for child in self._children)

    def _become(self, ticket: int, sibling: Sibling, siblings: tuple[Sibling, ...], said_exit: mmap.mmap) -> Fork:
        parent, self.address, self.role = self.address, sibling.address, "clone"
        self._said_exit = said_exit
        self._tickets, self._children, self._epoll = {}, [], select.epoll()
        # Its own clones answer to it; it answers to its parent.
        self._ticket_rank, self._upwards = (ticket, sibling.rank), self._answers[1]
        self._answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._epoll.register(self._answers[0], select.EPOLLIN)
        return Fork(sibling.rank, sibling.address, parent, siblings, os.urandom(96))

    def _of(self, ticket: int) -> list[_Child]:
        return [child for child in self._children if child.ticket == ticket]

    def _reap(self, child: _Child) -> None:
        child.status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        self._epoll.unregister(child.pidfd)
        os.close(child.pidfd)
        child.said_exit.flush()


def start_afresh() -> None:
    """Put the runtime into the state of a program that has just started, in the ZeroMQ context that there is."""
    context = HERE._context
    HERE.__init__()  # type: ignore[misc]
    HERE._context = context


class Doubles:
    """All lines of one test, and how new ones shall be.

    Attributes:
        capacity, default_n, seed: see `ForkDouble`; None for its defaults.
    """

    def __init__(self, answer_bytes: int) -> None:
        self.answer_bytes = answer_bytes
        self.capacity = 64
        self.default_n: int | None = None
        self.seed: int | None = None
        self.lines: list[ForkDouble] = []
        self._shared = Shared()

    def connect(self) -> ForkDouble:
        line = ForkDouble(self._shared, self.capacity, self.default_n, self.seed, answer_bytes=self.answer_bytes)
        self.lines.append(line)
        return line

    @property
    def alive(self) -> int:
        return sum(line.alive for line in self.lines)


@pytest.fixture(name="double", params=[0, 64 << 10], ids=["network", "relayed"])
def double_fixture(request: pytest.FixtureRequest) -> Iterator[Doubles]:
    """The runtime as in a parent VM, on the double: once with all answers over the network, once with small ones handed over at
    exit. Afterwards no clone is left."""
    start_afresh()
    doubles = Doubles(request.param)
    HERE.connect = doubles.connect
    pid = os.getpid()
    yield doubles
    if os.getpid() != pid:
        os._exit(99)  # a clone escaped from its region: the test fails as lost, but the rest of the suite does not run twice
    alive = doubles.alive
    for line in doubles.lines:
        line.close()
    start_afresh()
    assert not alive, f"{alive} clones were left"
