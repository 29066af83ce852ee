"""A process backend for development (`sfrun --local`): clones are made with `os.fork`, on the host, without any VM.

The same calls with the same meaning, as far as processes can have it. What they cannot: clones share the kernel, the network and
the files of the host, so nothing is isolated, and what a clone writes stays. Threads of the program do not go on in a clone, and
its subprocesses stay the parent's. No figure of speed or memory from here says anything about clones of VMs.

This module is the program's side; `sfparallel.vmm.local_job` is the supervisor, which shows what clones print, and ends all that
was started when the job ends. Each process has the loopback address that follows from its process id (127.0.0.0/8 is all ours,
and the kernel gives it to whoever binds it), so that the origin of messages is checked as between VMs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import time
import traceback
from dataclasses import dataclass, field
from typing import NoReturn

from sfparallel import wire
from sfparallel.bootstrap import orders
from sfparallel.errors import StateError, VMError
from sfparallel.runtime.hypervisor import Answer, Batch, End, Fork, Grant, Hello, Lost, Moment, Sibling
from sfparallel.runtime.local_seed import Keeper, Seed

ANSWER_BYTES = 64 << 10
MOST_CLONES = 1024
"""In one fork. A job of VMs asks the host's memory; here a mistaken n would take all of the host's processes."""
_PACKET_BYTES = 1 << 20
_ENTROPY_BYTES = 96
_EXIT_SOFTWARE = 70  # sysexits.h


def address_of(pid: int) -> str:
    """The loopback address of a process; process ids have 22 bits at most (PID_MAX_LIMIT)."""
    return f"127.{pid >> 16 & 255}.{pid >> 8 & 255}.{pid & 255}"


class Terminal:
    """The line to the supervisor.

    Args:
        control: a SEQPACKET socket; all processes of the job share this end, so only the supervisor answers, by descriptors that
            come with a request.
        labels: whether the rank is put before each line.
    """

    def __init__(self, control: socket.socket, *, labels: bool) -> None:
        self._control = control
        self._labels = labels

    def take_over(self, number: int, owner: int) -> None:
        """In a clone: have the supervisor show what it prints from now on, and end it with its owner.

        Args:
            number: what its lines are labelled with.
            owner: process id of the one that forked it.
        """
        ends = []
        for stream in (1, 2):
            ours, theirs = os.pipe()
            os.dup2(theirs, stream)
            os.close(theirs)
            ends.append(ours)
        ends.append(os.pidfd_open(os.getpid()))
        label = f"[{number}] " if self._labels else ""
        message = wire.pack({"clone": os.getpid(), "owner": owner, "label": label})
        socket.send_fds(self._control, [message], ends)
        for end in ends:
            os.close(end)

    def settle(self) -> None:
        """Wait until all has been shown that clones printed which are gone."""
        ours, theirs = os.pipe()
        try:
            socket.send_fds(self._control, [wire.pack({"settle": True})], [theirs])
        finally:
            os.close(theirs)
        with open(ours, "rb") as end:
            end.read()  # ends when the supervisor closes its descriptor


@dataclass
class LocalJob:
    """What all lines of one process share; corrected in a clone.

    Attributes:
        default_n, seed: as given to `sfrun`.
        world: the program's first clones are ranks of a whole program, the first of which keeps the standard input.
        seeds: checkpoints by number, None for those that were dropped.
    """

    address: str
    role: str = "parent"
    name: str = "local"
    default_n: int | None = None
    seed: int | None = None
    answer_bytes: int = ANSWER_BYTES
    shares_files: bool = True
    world: bool = False
    terminal: Terminal | None = None
    seeds: dict[int, Seed | None] = field(default_factory=dict)


class _Cradle:
    """Memory that the processes of one fork share: who they are, and what they said at their exit."""

    def __init__(self, clones: int) -> None:
        self._clones = clones
        self._words = memoryview(mmap.mmap(-1, 8 * clones)).cast("I")
        self._filled = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)

    def fill(self, pids: list[int]) -> None:
        """In the parent: tell all clones who they are."""
        for place, pid in enumerate(pids):
            self._words[place] = pid
        os.eventfd_write(self._filled, self._clones)
        os.close(self._filled)

    def wait(self, parent: int) -> list[int]:
        """In a clone: the process ids of all. When the parent dies before it said so, the clone ends too."""
        try:
            pidfd = os.pidfd_open(parent)
        except ProcessLookupError:
            os._exit(_EXIT_SOFTWARE)
        poll = select.poll()
        for fd in (pidfd, self._filled):
            poll.register(fd, select.POLLIN)
        if all(fd != self._filled for fd, _ in poll.poll()):
            os._exit(_EXIT_SOFTWARE)
        os.eventfd_read(self._filled)
        os.close(pidfd)
        os.close(self._filled)
        return list(self._words[:self._clones])

    def say(self, rank: int, status: int) -> None:
        self._words[self._clones + rank - 1] = status + 1

    def said(self, rank: int) -> int | None:
        """The status that the clone gave to `exit`, or None."""
        return self._words[self._clones + rank - 1] - 1 if self._words[self._clones + rank - 1] else None


@dataclass
class _Child:
    """A clone of this process, or of a seed of it, which then knows how it ended."""

    ticket: int
    rank: int
    pid: int
    pidfd: int
    cradle: _Cradle | None
    seed: Seed | None = None
    alive: bool = True
    code: int = 0
    said: int | None = None
    answered: bool = False

    def learn(self) -> None:
        """Once it has ended: what its process ended with, and the status that it gave to `exit`."""
        if self.seed is not None:
            self.code, self.said = self.seed.ending(self.pid)
            return
        # The program itself may wait for all its children, or have the kernel do so (SIGCHLD ignored).
        with contextlib.suppress(ChildProcessError):
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert self.cradle is not None
        self.said = self.cradle.said(self.rank)


class LocalLine:
    """A `Hypervisor` that forks the calling process."""

    keeps_threads = False

    def __init__(self, job: LocalJob) -> None:
        self._job = job
        self._tickets = 0
        self._granted: dict[int, int] = {}
        self._children: list[_Child] = []
        self._epoll = select.epoll()
        # Clones write packets to the second end, which they all share.
        self._mailbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._epoll.register(self._mailbox[0], select.EPOLLIN)
        self._upwards: socket.socket | None = None
        self._own: tuple[int, int, _Cradle] | None = None

    def hello(self) -> Hello:
        job = self._job
        return Hello(role=job.role, address=job.address, default_n=job.default_n, seed=job.seed, job=job.name,
                     answer_bytes=job.answer_bytes, shares_files=job.shares_files)

    def request_ticket(self, n: int) -> Grant:
        self._tickets += 1
        granted = self._granted[self._tickets] = min(n, MOST_CLONES)
        return Grant(self._tickets, granted)

    def host_of(self, rank: int) -> str:
        """The host that runs a clone; there is only one."""
        return ""

    def clone(self, ticket: int, clones: int, context: bytes, within_s: float | None = None) -> Fork:
        cradle, parent = _Cradle(clones), os.getpid()
        born: list[_Child] = []
        for rank in range(1, clones + 1):
            try:
                pid = os.fork()
            except OSError as error:
                for child in born:
                    self._end(child)
                raise VMError(f"cannot fork clone {rank} of {clones}: {error.strerror}",
                              hint="use a smaller n, or raise the limit of processes (ulimit -u)") from error
            if pid == 0:
                return self._become(ticket, rank, parent, cradle, labels_from=0 if context else 1)
            born.append(self._adopt(_Child(ticket, rank, pid, os.pidfd_open(pid), cradle)))
        pids = [child.pid for child in born]
        cradle.fill(pids)
        return Fork(0, self._job.address, "", self._siblings(pids))

    def checkpoint(self, within_s: float | None = None) -> Moment:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            raise VMError(f"cannot keep a copy of this process: {error.strerror}",
                          hint="raise the limit of processes (ulimit -u)") from error
        if pid == 0:
            try:
                if os.fork():
                    os._exit(0)  # so that it is not this process's child, whose end the program would have to wait for
                ours.close()
                sprout = Keeper(theirs, parent, _Cradle).keep()
            except BaseException:
                traceback.print_exc()
                os._exit(_EXIT_SOFTWARE)
            fork = self._become(sprout.ticket, sprout.rank, parent, sprout.cradle, labels_from=sprout.first)
            return Moment(0, sprout.batch, fork)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        theirs.close()
        seeds = self._job.seeds
        number = len(seeds) + 1
        seeds[number] = Seed(ours)
        return Moment(number, 0, Fork(0, self._job.address, "", ()))

    def create(self, ticket: int, checkpoint: int, first: int = 1, within_s: float | None = None) -> Batch:
        seed = self._job.seeds.get(checkpoint)
        if seed is None:
            raise StateError(f"there is no checkpoint {checkpoint} here", hint="make one with checkpoint_parent")
        batch, born = seed.order(ticket, self._granted[ticket], first)
        for rank, (pid, pidfd) in enumerate(born.items(), 1):
            self._adopt(_Child(ticket, rank, pid, pidfd, None, seed))
        return Batch(batch, self._siblings(list(born)))

    def drop(self, checkpoint: int) -> None:
        seed = self._job.seeds.get(checkpoint)
        if seed is not None:
            self._job.seeds[checkpoint] = None
            seed.close()

    def exit(self, status: int, answer: bytes = b"", *, ran_ns: int = 0) -> NoReturn:
        assert self._own is not None and self._upwards is not None, "only a clone can call exit"
        ticket, rank, cradle = self._own
        if answer:
            self._upwards.send(wire.pack({"from": [ticket, rank], "answer": answer}))
        cradle.say(rank, status)
        os._exit(status)

    def abort(self, status: int, cause: str) -> None:
        assert self._own is not None and self._upwards is not None, "only a clone has a parent to tell"
        self._upwards.send(wire.pack({"from": self._own[:2], "abort": status, "cause": cause}))

    def signal(self, ticket: int, ranks: list[int] | None, number: int) -> None:
        for child in self._of(ticket, ranks):
            if child.alive:
                signal.pidfd_send_signal(child.pidfd, number)

    def join(self, ticket: int, timeout_s: float | None) -> dict[int, int | None] | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for child in self._of(ticket):
            if child.alive:
                poll = select.poll()
                poll.register(child.pidfd, select.POLLIN)
                if not poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
                    return None
                self._reap(child)
        self._settle()
        ended = {child.rank: child.said for child in self._of(ticket)}
        self._forget(ticket)
        return ended

    def kill(self, ticket: int, ranks: list[int] | None) -> None:
        for child in self._of(ticket, ranks):
            if child.alive:
                self._end(child)
        self._settle()
        if ranks is None:
            self._forget(ticket)

    def report(self, ticket: int, first_s: float, last_s: float) -> None:
        """There is no --stats here."""

    def fileno(self) -> int:
        return self._epoll.fileno()

    def events(self) -> list[Lost | Answer]:
        events: list[Lost | Answer] = []
        ended = {fd for fd, _ in self._epoll.poll(0)}
        # After that look at who has ended, so that nothing is missed which they sent before.
        while packet := self._next_packet():
            message = wire.unpack(packet)
            ticket, rank = message["from"]
            if "abort" in message:
                events.append(Lost(ticket, rank, message["cause"], end=End.ABORTED, status=message["abort"]))
            else:
                events.append(Answer(ticket, rank, message["answer"]))
                for child in self._of(ticket, [rank]):
                    child.answered = True
        for child in self._children:
            if child.alive and child.pidfd in ended:
                self._reap(child)
                if child.said is None:
                    events.append(Lost(child.ticket, child.rank, _cause(child.code), self.host_of(child.rank), "", End.EXITED,
                                       child.code))
                elif not child.answered:
                    cause = f"it called exit({child.said}) before it answered"
                    events.append(Lost(child.ticket, child.rank, cause, self.host_of(child.rank), "", End.QUIT, child.said))
        return events

    def close(self) -> None:
        for child in self._children:
            if child.alive:
                self._end(child)
        self._hang_up()

    @property
    def alive(self) -> int:
        """Clones of this line that are still there."""
        return sum(child.alive for child in self._children)

    def _adopt(self, child: _Child) -> _Child:
        self._epoll.register(child.pidfd, select.EPOLLIN)
        self._children.append(child)
        return child

    def _next_packet(self) -> bytes:
        try:
            return self._mailbox[0].recv(_PACKET_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def _siblings(self, pids: list[int]) -> tuple[Sibling, ...]:
        return tuple(Sibling(rank, address_of(pid), self.host_of(rank)) for rank, pid in enumerate(pids, 1))

    def _become(self, ticket: int, rank: int, parent: int, cradle: _Cradle, *, labels_from: int) -> Fork:
        """First thing in a clone. Nothing may escape from here: it would run the parent's program a second time."""
        try:
            former, job = self._job.address, self._job
            keeps_stdin = job.world and job.role == "parent" and rank == 1
            # Ctrl-C and job control are the parent's.
            os.setsid()
            if not keeps_stdin:
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                os.close(null)
            if job.terminal is not None:
                job.terminal.take_over(rank - 1 + labels_from, parent)
            pids = cradle.wait(parent)
            job.address, job.role = address_of(os.getpid()), "clone"
            upwards = self._mailbox[1].dup()
            self._hang_up()
            for seed in job.seeds.values():
                if seed is not None:
                    seed.line.close()
            job.seeds = {}
            self.__init__(job)  # type: ignore[misc]
            # Its own clones answer to it; it answers to its parent.
            self._upwards, self._own = upwards, (ticket, rank, cradle)
            return Fork(rank, job.address, former, self._siblings(pids), os.urandom(_ENTROPY_BYTES))
        except BaseException:
            traceback.print_exc()
            os._exit(_EXIT_SOFTWARE)

    def _hang_up(self) -> None:
        self._epoll.close()
        for child in self._children:
            if child.alive:
                os.close(child.pidfd)
        self._children = []
        for end in (*self._mailbox, self._upwards):
            if end is not None:
                end.close()

    def _of(self, ticket: int, ranks: list[int] | None = None) -> list[_Child]:
        return [child for child in self._children if child.ticket == ticket and (ranks is None or child.rank in ranks)]

    def _forget(self, ticket: int) -> None:
        self._children = [child for child in self._children if child.ticket != ticket]
        self._granted.pop(ticket, None)

    def _end(self, child: _Child) -> None:
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        self._reap(child)

    def _reap(self, child: _Child) -> None:
        child.learn()
        child.alive = False
        self._epoll.unregister(child.pidfd)  # to close it is not enough: later clones have copies of it
        os.close(child.pidfd)

    def _settle(self) -> None:
        if self._job.terminal is not None:
            self._job.terminal.settle()


def _cause(code: int) -> str:
    if code < 0:
        return f"its process was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"its program exited with status {code} before it answered"


# ---- in the process that `sfrun --local` has started ----


def _started_job() -> LocalJob:
    terminal = Terminal(socket.socket(fileno=int(orders["control"])), labels=orders["labels"] == "1")
    seed = int(orders["seed"]) if "seed" in orders else None
    return LocalJob(address_of(os.getpid()), name=orders["job"], default_n=int(orders["n"]), seed=seed, terminal=terminal,
                    world="ranks" in orders)


# Made by the import, and therefore once, whatever threads ask for it.
_JOB = _started_job() if "control" in orders else None


def connect() -> LocalLine:
    """A new line of this process."""
    assert _JOB is not None
    return LocalLine(_JOB)
