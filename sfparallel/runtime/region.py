"""One parallel region: fork clones, have each work on its keys, gather the answers, see the clones off.

The same code serves `sf.parallel` (rank k works on key k) and `sf.parallel_map` (keys are item indexes, handed out on demand);
who works on what is `schedule.Schedule`'s business. A `Region` object exists before the fork, so each clone finds it in its
memory: no function, argument or item is ever sent, only keys and results.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import socket
import threading
import time
from typing import Any

import zmq

from sfparallel.errors import (
    CapacityError,
    CloneLost,
    CollectConflict,
    NetworkError,
    RankError,
    RegionError,
    RegionTimeout,
    SfError,
    StateError,
)
from sfparallel.runtime import lowlevel
from sfparallel.runtime.clone_messages import BadMessage, Kind, Message, decode_answer
from sfparallel.runtime.collect import unwanted
from sfparallel.runtime.connection import park
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Answer, End, Lost, Sibling
from sfparallel.runtime.link import ParentLink
from sfparallel.runtime.payload import UsersCode, load_error, loads, message_of
from sfparallel.runtime.progress import Progress
from sfparallel.runtime.wakeup import SignalAlarm
from sfparallel.runtime.work import OnError, Work
from sfparallel.runtime.worker import Place, die, live
from sfparallel.text import no_answer

JOIN_LIMIT_S = 10.0
"""A clone that has been released ends at once; one that does not in this time is killed."""

LOSS_GRACE_S = 0.25
"""So long the last answers of a lost clone are waited for: they come over the network, and the news of its loss does not."""

LAST_LOOK_S = 0.5
"""So long, at most, a region whose time is up takes what has arrived by then."""

COMMUNICATOR_PORTS = range(10_083, 32_768)
"""Below Linux's ephemeral ports, so that no clone's outgoing connection can sit on the one that is chosen."""


class State(enum.Enum):
    PLANNED = "planned"
    FORKED = "forked"
    ENDED = "ended"


class Alarm:
    """Wakes a thread that polls, from any other thread, for as long as it is open (eventfd(2))."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __enter__(self) -> Alarm:
        return self

    def __exit__(self, *_: object) -> None:
        # The lock keeps a late `ring` from writing to whatever gets the descriptor's number next.
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def reset(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)


class Cancelled(Exception):
    """The region was cancelled from another thread (internal: becomes the future's cancellation)."""


class Region:
    """Runs some `Work` once: `fork`, then `gather`. `cancel` may come from any thread."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._state = State.PLANNED
        self._generation = HERE.generation
        self._cancelled = False
        self._started = time.monotonic()
        self._first_s: float | None = None
        self._results: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._out: dict[int, str] = {}
        """Ranks that will not answer in collective calls any more, and why."""
        self._in_comm: set[int] = set()
        self._left: list[int] = []
        """Ranks that have returned."""
        self._curious: set[int] = set()
        """Ranks that want to know of these."""
        self._losses: list[tuple[float, Lost]] = []
        """Clones that are lost, and when what they had in hand is given up, the first of them first."""
        self._clones: tuple[Sibling, ...] = ()
        self._resources = contextlib.ExitStack()

    def fork(self) -> None:
        """Fork. Returns in the parent only; clones work and end in here. When it raises, nothing is left.

        Raises:
            CapacityError: the host cannot hold so many clones.
            OutsideVMError: this is not a VM of sfparallel.
            RegionTimeout: there was not enough time to make them.
        """
        self._require(State.PLANNED)
        HERE.park_if_ghost()
        self._generation = HERE.generation
        with contextlib.ExitStack() as stack:
            with HERE.interrupts_deferred():
                self._ticket = lowlevel.request_ticket(self._work.ranks)
                stack.callback(self._kill_all)
                ranks = self._admitted(self._ticket.granted)
                self._schedule = self._work.plan(ranks)
                hello = HERE.hello(self._ticket.hypervisor)
                self._started += lowlevel.prepare(self._ticket.hypervisor)  # a time limit is for what every call does
                self._link = bind_link(hello.address)
                stack.callback(self._link.close)
                self._port = free_port(hello.address)
                self._alarm = stack.enter_context(Alarm())
                stack.enter_context(HERE.wakes(self))
                try:
                    fork = lowlevel.fork(self._ticket, self._work.name, self._left_s())
                except RegionTimeout as error:
                    raise self._timed_out() from error
                except BaseException:
                    if HERE.generation != self._generation:
                        die()
                    raise
            if fork.rank:
                keys = self._schedule.in_hand(fork.rank - 1)
                live(self._work, Place(self._ticket.hypervisor, self._ticket.renewal, self._link, fork, self._port, fork.rank - 1,
                                       keys, hello.answer_bytes))
            self._clones = fork.clones
            self._link.expect([clone.address for clone in fork.clones])
            self._state = State.FORKED
            self._resources = stack.pop_all()

    def _left_s(self) -> float | None:
        """What is left of the time limit of the call, if it has one."""
        return None if self._work.timeout_s is None else max(0.0, self._started + self._work.timeout_s - time.monotonic())

    def gather(self) -> list[Any]:
        """Wait for the answers, in the order of the keys. However it ends, the clones are gone.

        Raises:
            RankError: some keys failed (`on_error="gather"`).
            RegionTimeout: not all answers came in time.
            CloneLost: a clone died (`on_error="raise"`).
            CollectConflict: two ranks, or items, wrote the same collected file.
            Cancelled: `cancel` was called.
        """
        self._require(State.FORKED)
        self._state = State.ENDED
        # On any error, KeyboardInterrupt and cancellation included, the clones are killed as the stack unwinds.
        with self._resources:
            progress = Progress(self._work.name, len(self._schedule), self._work.progress)
            try:
                with SignalAlarm() as signals:
                    failed = self._gather(progress, signals)
            finally:
                progress.close()
            now = time.monotonic() - self._started
            self._ticket.hypervisor.report(self._ticket.number, now if self._first_s is None else self._first_s, now)
            self._end_clones()
            if failed is not None:
                raise self._with_results(failed)
        return self._conclude()

    def cancel(self) -> None:
        """Have `gather` kill the clones and raise `Cancelled`."""
        self._cancelled = True
        self.wake()

    def wake(self) -> None:
        """Have `gather`, in whatever thread it waits, look around."""
        self._alarm.ring()

    def _admitted(self, granted: int) -> int:
        if granted < self._work.ranks and (self._work.all_ranks or not granted):
            raise CapacityError(f"{self._work.ranks} clones do not fit on this host now; {granted} would", fits=granted,
                                hint="use a smaller n, or give each VM less memory (sfrun --memory)")
        return granted

    def _gather(self, progress: Progress, signals: SignalAlarm) -> BaseException | None:
        """Take answers until there are enough of them; the error that ends the region, if any."""
        deadline = None if self._work.timeout_s is None else self._started + self._work.timeout_s
        poller = zmq.Poller()
        with HERE.interrupts_deferred():  # a socket that is made meanwhile would belong to nobody
            self._link.watch(poller)
        poller.register(self._ticket.hypervisor.fileno(), zmq.POLLIN)
        poller.register(self._alarm.fileno(), zmq.POLLIN)
        poller.register(signals.fileno(), zmq.POLLIN)
        done = 0
        late = False
        while True:
            self._take_news()
            while done < len(self._results) + len(self._errors):
                done += 1
                progress.advance()
            if self._errors and self._work.on_error is OnError.RAISE:
                return next(iter(self._errors.values()))
            if done == len(self._schedule):
                return None
            until = deadline
            if deadline is not None and deadline <= (now := time.monotonic()):
                # Not before all has been taken that was here in time: who has answered is not missing.
                if late and (self._link.drained or now >= deadline + LAST_LOOK_S):
                    return self._timed_out()
                late = True
                continue
            if self._losses:
                until = min(self._losses[0][0], deadline or math.inf)
            poller.poll(self._link.poll_ms(None if until is None else max(0.0, until - time.monotonic())))
            signals.reset()
            self._look_around()

    def _take_news(self) -> None:
        """Take what has come from the supervisor, and a limited number of messages: whatever is sent, all else has its turn."""
        # Events first: what a clone said before it died is here by then.
        events = self._ticket.hypervisor.events()
        for message in self._link.take():
            self._on_message(message)
        for event in events:
            self._on_event(event)
        now = time.monotonic()
        while self._losses and self._losses[0][0] <= now - (0.0 if self._link.drained else LOSS_GRACE_S):
            self._on_lost(self._losses.pop(0)[1])

    def _look_around(self) -> None:
        if HERE.generation != self._generation:
            park()  # another thread forked the VM while this one gathered; this is the clone, where nobody will answer
        self._alarm.reset()
        if self._cancelled:
            raise Cancelled

    def _on_event(self, event: Lost | Answer) -> None:
        if event.ticket != self._ticket.number or not 0 < event.rank <= len(self._clones):
            return  # of an earlier region on the same line
        rank, now = event.rank - 1, time.monotonic()
        if isinstance(event, Lost):
            # An answer over the network takes another way than this.
            grace_s = LOSS_GRACE_S if self._work.per_item or event.end is End.QUIT else 0.0
            self._losses.append((now + grace_s, event))
            self._losses.sort(key=lambda loss: loss[0])
        elif self._work.per_item:
            self._on_message(BadMessage(rank, "an answer with its exit, which only ranks of a region send"))
        else:
            self._on_message(decode_answer(rank, event.data))

    def _on_message(self, message: Message | BadMessage) -> None:
        if isinstance(message, BadMessage):
            self._on_bad(message)
            return
        rank = message.rank
        if message.kind is Kind.COMM:
            self._in_comm.add(rank)
            for lost, cause in self._out.items():
                self._link.send(rank, Kind.LOST, lost=lost, cause=cause)
            return
        if message.kind is Kind.WHO_LEFT:
            self._curious.add(rank)
            self._link.send(rank, Kind.LEFT, ranks=self._left)
            return
        key = message.key
        if message.kind not in (Kind.RESULT, Kind.ERROR):
            self._on_bad(BadMessage(rank, f"a message {message.kind.value!r}, which a rank of a region never sends"))
            return
        if message.files and (path := unwanted(self._work.collector, message.files)) is not None:
            self._on_bad(BadMessage(rank, f"the file {path[:100]!r}, which collect= does not match"))
            return
        if not self._schedule.answered(rank, key):
            self._on_bad(BadMessage(rank, f"an answer for {key}, which it did not have"))
            return
        if self._first_s is None:
            self._first_s = time.monotonic() - self._started
        if message.kind is Kind.RESULT:
            self._on_result(message, key)
            if not self._work.per_item:
                self._tell_left(rank)
        elif message.kind is Kind.ERROR:
            self._errors[key] = load_error(message.error, message.frames, self._where(rank, key))
            if not self._work.per_item:
                self._tell_out(rank, f"raised {message.error['type'][:200]}")
        keys = [] if self._is_doomed(rank) else self._schedule.refill(rank)
        if keys:
            self._link.send(rank, Kind.KEYS, keys=keys)
        elif not self._work.per_item and rank not in self._in_comm:
            self._link.send(rank, Kind.RELEASE)

    def _on_result(self, message: Message, key: int) -> None:
        where = self._where(message.rank, key)
        try:
            self._results[key] = loads(message.frames, where)
            if self._work.collector is not None:
                self._work.collector.receive(key, message.files, message.contents)
        except Exception as error:  # whatever a result's own __setstate__ raises is this key's error, not the region's
            self._results.pop(key, None)
            error.add_note(f"in the result of {where}")
            self._errors[key] = error

    def _on_bad(self, bad: BadMessage) -> None:
        """A rank has sent what no rank sends: it is lost, and with it what it was at. Nobody knows what it would send next."""
        rank = bad.rank
        if not self._schedule.is_alive(rank):
            return
        self._link.forget(rank)
        self._ticket.hypervisor.kill(self._ticket.number, [rank + 1])
        self._on_lost(Lost(self._ticket.number, rank + 1, f"it sent {bad.why}, and was killed", self._clones[rank].host))

    def _on_lost(self, event: Lost) -> None:
        rank = event.rank - 1
        if not self._schedule.is_alive(rank):
            return
        key = self._schedule.lose(rank)
        if key is None and not self._work.per_item:
            return  # it had answered
        self._tell_out(rank, f"was lost: {event.cause}")
        if key is not None:
            self._errors[key] = self._lost_error(event, rank, f"{self._where(rank, key)} was lost: {event.cause}")
        for idle in self._schedule.idle():
            if not self._is_doomed(idle) and (keys := self._schedule.refill(idle)):
                self._link.send(idle, Kind.KEYS, keys=keys)
        for orphan in self._schedule.abandon():
            text = f"item {orphan} was not computed: the last clone, rank {rank}, was lost: {event.cause}"
            self._errors[orphan] = self._lost_error(event, rank, text)

    def _is_doomed(self, rank: int) -> bool:
        return any(event.rank - 1 == rank for _, event in self._losses)

    @staticmethod
    def _lost_error(event: Lost, rank: int, message: str) -> CloneLost:
        return CloneLost(message, rank=rank, cause=event.cause, host=event.host, console=event.console)

    def _tell_out(self, rank: int, cause: str) -> None:
        self._out[rank] = cause
        for other in self._in_comm - self._out.keys():
            self._link.send(other, Kind.LOST, lost=rank, cause=cause)

    def _tell_left(self, rank: int) -> None:
        self._left.append(rank)
        for other in self._curious - {rank}:
            self._link.send(other, Kind.LEFT, ranks=[rank])

    def _timed_out(self) -> RegionTimeout:
        missing = self._schedule.busy()
        return RegionTimeout(f"{self._work.name} took longer than {self._work.timeout_s} s{no_answer(missing)}",
                             missing=missing, hint="the answers that arrived are in .results")

    def _with_results(self, error: BaseException) -> BaseException:
        """Attach what other ranks answered to the exception that hides it."""
        with UsersCode():  # a class with __slots__, or one that takes no attributes
            error.sf_results = dict(self._results)  # type: ignore[attr-defined]
        if isinstance(error, CloneLost | RegionError):
            error.results = dict(self._results)
        return error

    def _conclude(self) -> list[Any]:
        if self._work.collector is not None:
            try:
                self._work.collector.write()
            except (CollectConflict, OSError) as error:
                self._with_results(error)
                raise
        if self._errors and self._work.on_error is OnError.GATHER:
            noun = "items" if self._work.per_item else "ranks"
            keys = sorted(self._errors)
            first = self._errors[keys[0]]
            raise RankError(f"{len(keys)} of {len(self._schedule)} {noun} failed; the first is {noun[:-1]} {keys[0]}: "
                            f"{type(first).__qualname__}: {message_of(first)}", errors={key: self._errors[key] for key in keys},
                            results=self._results) from first
        answers = self._results | self._errors
        return [answers[key] for key in range(len(self._schedule))]

    def _where(self, rank: int, key: int) -> str:
        host = self._clones[rank].host
        where = f"rank {rank} (host {host})" if host else f"rank {rank}"
        return f"item {key}, {where}" if self._work.per_item else where

    def _end_clones(self) -> None:
        """Let those go that have answered, kill the others, and wait until all are gone: then all they printed has been shown."""
        for rank in range(len(self._clones)):
            if self._schedule.is_alive(rank):
                self._link.send(rank, Kind.RELEASE)
        hypervisor, number = self._ticket.hypervisor, self._ticket.number
        if busy := self._schedule.busy():
            hypervisor.kill(number, [rank + 1 for rank in busy])
        if hypervisor.join(number, JOIN_LIMIT_S) is None:
            hypervisor.kill(number, None)
        self._ticket.close()

    def _kill_all(self) -> None:
        """As the last resort of an error that is on its way already: it must not be hidden by another one from here."""
        if self._ticket.state is lowlevel.TicketState.CLOSED:
            return
        try:
            lowlevel.kill(self._ticket)
        except SfError:
            self._ticket.abandon()

    def _require(self, state: State) -> None:
        if self._state is not state:
            raise StateError(f"the region is {self._state.value}; this call needs one that is {state.value}")


def bind_link(address: str) -> ParentLink:
    """The parent's end of the line to its clones."""
    try:
        return ParentLink(address)
    except (OSError, zmq.ZMQError) as error:
        raise NetworkError(f"cannot listen for answers on {address}: {error}") from error


def free_port(address: str) -> int:
    """A port that is free in this VM; since clones are copies of it, it is free in all of them."""
    for port in COMMUNICATOR_PORTS:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((address, port))
            return port
    raise NetworkError(f"no free port on {address} for the communicator")
