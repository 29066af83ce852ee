"""Whole programs in every clone (`sfrun --spmd`): forked before the program's first line, all of it runs in each rank.

The parent only looks after its clones: it tells ranks who has left, ends the job when one fails, and knows the exit code. A rank
is an ordinary process that ends by itself, so that exit codes, threads, atexit handlers and tracebacks are Python's own. But it
does not go before the others are done: what it sent may still be on its way out of it.

    rank                                            parent
    program ends, atexit handlers   -- DONE -->
                                   <-- RELEASE --   when all are done, or gone
    process ends                   -- (event) -->    Lost with End.EXITED: the exit code
    uncaught exception             -- abort -->      the programs of the others are killed
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from types import TracebackType
from typing import NoReturn

import zmq

from sfparallel.errors import CapacityError, SfError
from sfparallel.runtime import lowlevel
from sfparallel.runtime.clone_messages import BadMessage, Kind, Message
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Answer, End, Lost
from sfparallel.runtime.link import CloneLink, ParentLink
from sfparallel.runtime.region import JOIN_LIMIT_S, bind_link, free_port
from sfparallel.runtime.rng import region_streams
from sfparallel.runtime.wakeup import SignalAlarm
from sfparallel.runtime.worker import clone_link, die, membership
from sfparallel.text import printable

EXIT_LOST = 70
"""Exit code of a job that lost a clone (EX_SOFTWARE of sysexits.h)."""

MOST_AT_ONCE = 4096
"""Messages that are taken in one go: more than all ranks have to say before they end."""

LEAVE_S = 5.0
"""How long a rank that failed may take for its atexit handlers before its program is killed."""

COPY_S = 60.0
"""How long machines whose programs were killed may take to bring their files to the host before they are killed too."""


def enter_world(ranks: int) -> None:
    """Fork. Returns in each clone, as a rank of a world of its own. The parent never does: it ends with the job's exit code.

    This is called while the interpreter imports `site`, from where an exception is a fatal error, or is only printed, and the
    program would be run all the same.
    """
    try:
        world = World(ranks)
        link = world.fork()
        if link is None:
            _end(world.watch())
    except SfError as error:
        print(f"sfrun: {error}", file=sys.stderr)
        _end(EXIT_LOST)
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        _end(EXIT_LOST)
    _Rank(link).begin()


def _end(code: int) -> NoReturn:
    lowlevel.flush_output()
    os._exit(code)


class _Rank:
    """In a clone: how it leaves the world."""

    def __init__(self, link: CloneLink) -> None:
        self._link = link
        self._failed = False
        # A process that the program forks inherits the atexit handler, and so does a clone of this clone.
        self._owner = (os.getpid(), HERE.generation)

    def begin(self) -> None:
        """Have the interpreter call us when the program ends. Nothing was registered before, so our handler is the last."""
        self._print_exception = sys.excepthook
        sys.excepthook = self._excepthook
        self._own_hook = sys.excepthook
        atexit.register(self._leave)

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._owner == (os.getpid(), HERE.generation):
            self._fail(error)
            if isinstance(error, KeyboardInterrupt) and self._link.rank:
                return  # Ctrl-C goes to all ranks: one traceback will do
        self._print_exception(kind, error, trace)

    def _fail(self, error: BaseException) -> None:
        """The program raised: the traceback is still to be printed, but the others need not go on."""
        self._failed = True
        if not isinstance(error, KeyboardInterrupt):
            assert HERE.lifeline is not None
            HERE.lifeline.abort(1, f"raised {type(error).__qualname__}")

    def _leave(self) -> None:
        """Say that the program is done, and wait for the others."""
        if self._failed or self._owner != (os.getpid(), HERE.generation):
            return
        # A hook of the program's own is called in place of ours. The interpreter notes what it is called for.
        error = getattr(sys, "last_value", None)
        if error is not None and sys.excepthook != self._own_hook:
            self._fail(error)
            return
        assert HERE.membership is not None
        HERE.membership.leave()
        lowlevel.flush_output()
        self._link.send(Kind.DONE)
        while self._link.receive().kind is not Kind.RELEASE:
            pass


class World:
    """In the parent: the clones that run the program."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._code = 0
        self._verdict = ""
        self._done_before: int | None = None
        """How many ranks were done when another failed; None while none has."""
        self._running = set(range(ranks))
        """Ranks whose process has not ended."""
        self._done: dict[int, int] = {}
        """Ranks whose program has ended, in that order, and their exit codes, as far as they are known."""
        self._curious: set[int] = set()
        """Ranks that want to know who is done."""
        self._deadlines: list[tuple[float, int | None]] = []
        """When to kill the program of a rank, or (None) all clones."""

    def fork(self) -> CloneLink | None:
        """Fork; returns the line to the parent in a clone, None in the parent.

        Raises:
            CapacityError: the host cannot hold so many clones.
        """
        generation = HERE.generation
        with HERE.interrupts_deferred():
            self._ticket = lowlevel.request_ticket(self._ranks)
            if self._ticket.granted < self._ranks:
                raise CapacityError(f"{self._ranks} clones do not fit on this host now; {self._ticket.granted} would",
                                    fits=self._ticket.granted, hint="use a smaller -n, or give each VM less memory (--memory)")
            hello = HERE.hello(self._ticket.hypervisor)
            self._link: ParentLink = bind_link(hello.address)
            port = free_port(hello.address)
            streams = region_streams(None, hello.seed)
            try:
                fork = lowlevel.fork(self._ticket, "--spmd", whole_program=True)
                if fork.rank:
                    link = clone_link(self._ticket.hypervisor, self._link, fork, fork.rank - 1)
                    lowlevel.assume_identity(self._ticket.renewal, fork.entropy, fork.rank - 1, reads_terminal=fork.rank == 1)
                    HERE.membership = membership(fork, link, port, streams, fork.rank - 1)
                    return link
            except BaseException:
                if HERE.generation != generation:
                    die()  # or the clone would take itself for the parent
                raise
        self._link.expect([clone.address for clone in fork.clones])
        return None

    def watch(self) -> int:
        """Wait until all clones are gone; the exit code of the job."""
        poller = zmq.Poller()
        self._link.watch(poller)
        poller.register(self._ticket.hypervisor.fileno(), zmq.POLLIN)
        with SignalAlarm() as signals:
            poller.register(signals.fileno(), zmq.POLLIN)
            while self._running:
                try:
                    self._step(signals, poller)
                except KeyboardInterrupt:
                    self._interrupt()
        hypervisor, number = self._ticket.hypervisor, self._ticket.number
        if hypervisor.join(number, JOIN_LIMIT_S) is None:
            hypervisor.kill(number, None)
        # Who ended first may be why others failed; what it ended with is known only when its process is gone.
        before = list(self._done.values())[:self._done_before]
        if any(before) or self._done_before is None:
            return next(filter(None, before), 0)
        if self._verdict:
            print(printable(f"sfrun: {self._verdict}"), file=sys.stderr)
        return self._code

    def _step(self, signals: SignalAlarm, poller: zmq.Poller) -> None:
        next_s = min((when for when, _ in self._deadlines), default=None)
        poller.poll(self._link.poll_ms(None if next_s is None else max(0.0, next_s - time.monotonic())))
        signals.reset()
        # A KeyboardInterrupt between two frames of a message would take what follows for the next one.
        with HERE.interrupts_deferred():
            # Events first: what a clone said before it died is here by then.
            events = self._ticket.hypervisor.events()
            for message in self._link.take(MOST_AT_ONCE):
                self._on_message(message)
            for event in events:
                if event.ticket == self._ticket.number:
                    self._on_end(event.rank - 1, event)
            self._keep_deadlines()

    def _on_message(self, message: Message | BadMessage) -> None:
        rank = message.rank
        if isinstance(message, BadMessage):
            self._on_bad(rank, message.why)
            return
        if message.kind is Kind.WHO_LEFT:
            self._curious.add(rank)
            self._link.send(rank, Kind.LEFT, ranks=sorted(self._done))
        elif message.kind is Kind.DONE:
            # Whatever its exit code will be: ranks that wait for it hear that it has left, the others may finish what they do.
            self._leaves(rank)
        elif message.kind is not Kind.COMM:
            self._on_bad(rank, f"a message {message.kind.value!r}, which no rank of a whole program sends")

    def _on_bad(self, rank: int, why: str) -> None:
        """A rank has sent what no rank sends: it is lost."""
        if rank in self._running:
            self._link.forget(rank)
            self._ticket.hypervisor.kill(self._ticket.number, [rank + 1])
            self._on_end(rank, Lost(self._ticket.number, rank + 1, f"it sent {why}, and was killed"))

    def _on_end(self, rank: int, event: Lost | Answer) -> None:
        if isinstance(event, Answer):
            cause = "it sent an answer, which only ranks of regions do"
            event = Lost(event.ticket, event.rank, cause, end=End.QUIT, status=EXIT_LOST)
        match event.end:
            case End.ABORTED:
                self._abort(rank, event.status, f"rank {rank} {event.cause}; the other ranks were ended")
                return
            case End.EXITED if rank in self._done or not event.status:
                code = 128 - event.status if event.status < 0 else event.status
                self._leaves(rank)
                self._done[rank] = code
            case End.EXITED | End.QUIT:
                code = 128 - event.status if event.status < 0 else event.status
                exited = event.end is End.EXITED and event.status > 0
                what = f"exited with status {event.status}" if exited else f"was lost: {event.cause}"
                self._abort(rank, code & 255 or EXIT_LOST, f"rank {rank} {what}; the other ranks were ended")
            case End.DIED:
                console = f"\n{event.console}" if event.console else ""
                self._abort(rank, EXIT_LOST, f"rank {rank} was lost: {event.cause}; the other ranks were ended{console}")
        self._running.discard(rank)
        self._release()

    def _fail(self, code: int, verdict: str) -> None:
        """Note the first failure of a rank whose program had not ended."""
        if self._done_before is None:
            self._code, self._verdict, self._done_before = code, verdict, len(self._done)

    def _abort(self, rank: int, code: int, verdict: str) -> None:
        """End all ranks; the one that failed may tidy up."""
        if self._deadlines:
            return  # that is under way
        self._fail(code, verdict)
        now = time.monotonic()
        self._signal(self._running - self._done.keys() - {rank}, signal.SIGKILL)
        for done in self._running & self._done.keys():
            self._link.send(done, Kind.RELEASE)  # nobody needs it any more, and it ends as it meant to
        self._deadlines = [(now + LEAVE_S, rank), (now + LEAVE_S + COPY_S, None)]

    def _interrupt(self) -> None:
        """Ctrl-C: each rank gets its KeyboardInterrupt."""
        self._fail(128 + signal.SIGINT, "interrupted")
        if not self._deadlines:
            now = time.monotonic()
            self._signal(self._running, signal.SIGINT)
            self._deadlines = [*((now + LEAVE_S, rank) for rank in self._running), (now + LEAVE_S + COPY_S, None)]

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        due = [rank for when, rank in self._deadlines if when <= now]
        self._deadlines = [(when, rank) for when, rank in self._deadlines if when > now]
        self._signal(self._running & set(due), signal.SIGKILL)
        if None in due:
            self._ticket.hypervisor.kill(self._ticket.number, None)
            self._running.clear()

    def _signal(self, ranks: set[int], number: int) -> None:
        if ranks:
            self._ticket.hypervisor.signal(self._ticket.number, [rank + 1 for rank in sorted(ranks)], number)

    def _leaves(self, rank: int) -> None:
        if rank not in self._done:
            self._done[rank] = 0
            for other in self._curious - self._done.keys():
                self._link.send(other, Kind.LEFT, ranks=[rank])
        self._release()

    def _release(self) -> None:
        """Let all go when nobody needs anybody any more."""
        if self._running <= self._done.keys():
            for rank in self._running:
                self._link.send(rank, Kind.RELEASE)
