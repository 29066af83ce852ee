"""One process among the ranks: an engine, its transport when there is one, and waiting.

Bytes move while some thread is in here. Of several threads that wait, one polls; the others are woken when something has moved.
What is known of losses comes by two ways: a connection that ends, and notices of the parent (which is told by the hypervisor).
The cause is in the notice, so that a connection's end only counts when no notice has come within `GRACE_S`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Collection, Sequence
from typing import Protocol

import zmq

from sfparallel import wire
from sfparallel.errors import ProtocolError, StateError
from sfparallel.runtime.emulation import widen_tlb
from sfparallel.runtime.keywords import LONGEST_WAIT_S
from sfparallel.runtime.link import CloneLink, Kind
from sfparallel.runtime.mpi.errors import MPIException, PeerLost
from sfparallel.runtime.mpi.matching import CONTROL, HEADER, Buffer, Engine, SendOp
from sfparallel.runtime.mpi.transport import Transport

GRACE_S = 0.5
"""How long after a rank's loss its last message is waited for: the notice comes by another way, through the parent."""

PATIENCE_S = 1.0
"""After waiting so long in one call, ask the parent who has ended."""

FLUSH_S = 30.0
"""How long the end of a program waits for its messages to be received."""

SPINS, SPIN_S, BREATH_S = 20, 1e-4, 1e-3
"""After this many unsuccessful polls in quick succession, each further poll of a program waits up to this time for an event."""

LOOK_S, MOST_SKIPPED = 2e-3, 127
"""A waiting thread polls this long before it sleeps: falling asleep and waking up take a guest longer than a message. When
nothing had come by then, the next 1, 3, 7 ... waits sleep at once: others may need the processor for what is waited for."""

MOST_IN_A_ROW = 16
"""Who waits for one peer, and only hears that one, looks at all others again after so many waits."""

MOST_TOLD, MOST_CONTEXTS = 1 << 16, 1 << 16
"""Of so many communicators others may tell where they are in them; and so many contexts has one of them at most."""

ASK, TOOK_PART, REVOKE = CONTROL, CONTROL + 1, CONTROL + 2
"""Control messages: which collective call of a context are you in; I am in this one; a context is revoked."""


_CLOSED = (0.0, "closed its connection", False)
"""Of a rank that is gone without a word: from when on it counts as lost, why, and whether it left in peace."""


class Waitable(Protocol):
    """Something that is done at some time."""

    @property
    def done(self) -> bool:
        """Whether it is."""


class Task(Protocol):
    """Something that goes on when what it waits for is done."""

    def advance(self) -> bool:
        """Go on as far as possible; True when it has ended."""


class Endpoint:
    """Where this process sends and receives.

    Args:
        rank: in the world.
        addresses: of all ranks; empty for a world of its own.
        port: where each rank listens on its address.
        link: the line to the parent, by which this rank is told of others that were lost.
        listener: a socket that listens on the port already, if there is one.
    """

    def __init__(self, rank: int = 0, addresses: Sequence[str] = (), port: int = 0, link: CloneLink | None = None,
                 listener: socket.socket | None = None) -> None:
        self.rank = rank
        self.size = len(addresses) or 1
        self.lock = threading.RLock()
        self.engine = Engine(rank, self, self._on_control)
        self.entered: dict[int, int] = {}
        """The last collective call of each context that this process took part in."""
        self.took_part: dict[tuple[int, int], int] = {}
        """The same of others, as far as they were asked."""
        self._addresses = addresses
        self._port = port
        self._link = link
        self._listener = listener
        self._transport: Transport | None = None
        self._tasks: list[Task] = []
        self._changed = threading.Condition(self.lock)
        self._polling = False
        self._sleeping = 0
        self._alarm = -1
        self._doomed: dict[int, tuple[float, str, bool]] = {}
        """Ranks that will count as gone: from when on, why, and whether they left in peace."""
        self._skip, self._skipped = 0, 0
        """How many waits shall sleep at once, and how many it were to be the last time."""
        self._in_a_row = 0
        """Waits that ended with the first message of the one peer that they were for."""
        self._asked_parent = False
        self._asked_at, self._in_vain = 0.0, 0
        """When `poll` ended, and how often it has found nothing since it found something."""

    @property
    def is_open(self) -> bool:
        """Whether the network was used."""
        return self._transport is not None

    # Moving bytes

    def push(self, peer: int, header: bytes, frames: Sequence[Buffer], op: SendOp | None) -> None:
        """The engine's wire."""
        transport = self._transport or self._open()
        line = transport.out.get(peer)
        if line is not None:
            line.write(header, frames, op)
        else:
            transport.push(peer, header, frames, op)
        if self._polling and (transport.retries or self._doomed):
            self.changed()  # the thread that polls may have to wake up earlier than it thought

    def control(self, peer: int, kind: int, ctx: int, number: int, payload: bytes = b"") -> None:
        """Send a control message."""
        if peer == self.rank:
            self._on_control(peer, kind, 0, ctx, number, payload)
        elif peer not in self.engine.dead and peer not in self.engine.left:
            self.push(peer, HEADER.pack(kind, 0, 0, 0, ctx, number, 0, len(payload)), (payload,), None)

    def wait(self, op: Waitable, deadline: float | None = None, source: int = -1) -> bool:
        """Wait until `op` is done; False when time ran out.

        Args:
            source: the one rank that it depends on, if it is known.
        """
        with self.lock:  # to ask whether it is done, too: that may search queues which other threads change
            done = op.done  # which may become true at any time, other than mypy thinks
            if done:
                return True
            transport = self._transport
            if transport is not None and not self._polling:
                if self._skip:
                    self._skip -= 1
                else:
                    alone = source >= 0 and threading.active_count() == 1
                    limit_s = LOOK_S
                    if alone and self._in_a_row < MOST_IN_A_ROW and self.engine.is_flushed:
                        self._in_a_row += 1
                        if not transport.hear(source):
                            limit_s = 0.0
                        if self._doomed or self._tasks:
                            self._move([])
                        if op.done:
                            self._skipped = 0
                            return True
                    if self._look(op, transport, source if alone else -1, deadline, limit_s):
                        return True
            asks = 0.0
            while not op.done:
                now = time.monotonic()
                asks = asks or now + PATIENCE_S
                if deadline is not None and now >= deadline:
                    return False
                if now >= asks:
                    self._ask_parent()
                    asks = float("inf")
                self._round(asks if deadline is None else min(deadline, asks))
        return True

    def poll(self) -> None:
        """Move what can be moved without waiting.

        A program that does nothing but ask (`while not request.Test()`) would keep a processor busy that the rank needs for which
        it waits: there may be more VMs than processors.
        """
        with self.lock:
            if self._polling or (self._transport is None and self.size == 1):
                return
            now = time.monotonic()
            if now - self._asked_at > SPIN_S:
                self._in_vain = 0
            if self._in_vain >= SPINS:
                self._ask_parent()
                self._round(now + BREATH_S)
            else:
                events = (self._transport or self._open()).wait(0)
                self._in_vain = 0 if events else self._in_vain + 1
                self._move(events)
            self._asked_at = time.monotonic()

    def glance(self) -> None:
        """Move what can be moved, for a program that may never have to wait, and would not learn of losses."""
        with self.lock:
            if self._transport is not None and not self._polling:
                self._move(self._transport.wait(0))

    def settle(self, op: Waitable) -> None:
        """Like `poll`, unless `op` is done already."""
        if not op.done:
            self.poll()

    def changed(self) -> None:
        """Wake other threads that wait: something was completed here."""
        if self._sleeping:
            self._changed.notify_all()
        if self._polling and self._alarm >= 0:
            os.eventfd_write(self._alarm, 1)

    def add_task(self, task: Task) -> None:
        """Have a task go on whenever something has moved."""
        if not task.advance():
            self._tasks.append(task)

    def finish(self) -> None:
        """This process will not send any more: get everything on its way, and say so."""
        transport = self._transport
        if transport is not None:
            end = time.monotonic() + FLUSH_S
            with self.lock:
                # As in a blocked send: others may be here, too, and have announced something to this rank.
                self.engine.blocked_in_send += 1
                self.engine.pull()
                if not transport.is_flushed:
                    self._ask_parent()  # who has returned takes nothing any more
                while not (transport.is_flushed and self.engine.is_flushed) and time.monotonic() < end:
                    self._round(end)
                self.engine.blocked_in_send -= 1
                transport.say_bye()
                while not transport.is_flushed and time.monotonic() < end:
                    self._round(end)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
            os.close(self._alarm)

    def _round(self, until: float) -> None:
        """Wait for one thing to happen; with the lock."""
        pause = self._pause(until)
        if self._polling or self.size == 1:
            self._sleeping += 1
            try:
                self._changed.wait(pause)
            finally:
                self._sleeping -= 1
            return
        transport = self._transport or self._open()
        self._polling = True
        try:
            try:  # around the release, too: a signal's handler may raise right behind it
                self.lock.release()
                events = transport.wait(pause)
            finally:
                self.lock.acquire()
                self._polling = False
            self._move(events)
        finally:
            # Also after KeyboardInterrupt: another thread has to poll now.
            if self._sleeping:
                self._changed.notify_all()

    def _look(self, op: Waitable, transport: Transport, source: int, deadline: float | None, limit_s: float) -> bool:
        """Look out for what `op` waits for, for a while; with the lock. Whether it is done."""
        self._in_a_row = 0
        end = time.monotonic() + limit_s
        if deadline is not None:
            end = min(end, deadline)
        lock, poll = self.lock, transport.epoll.poll
        self._polling = True
        try:
            while True:
                try:
                    lock.release()
                    events = poll(0)
                finally:
                    lock.acquire()
                if events or (source >= 0 and limit_s):
                    if events:
                        transport.handle(events)
                    else:
                        transport.hear(source)
                    if self._doomed or self._tasks:
                        self._move([])
                    if op.done:
                        self._skipped = 0
                        return True
                if time.monotonic() >= end:
                    self._skip = self._skipped = min(2 * self._skipped + 1, MOST_SKIPPED)
                    return False
        finally:
            self._polling = False
            if self._sleeping:
                self._changed.notify_all()

    def _pause(self, until: float) -> float | None:
        for when, _, _ in self._doomed.values():
            until = min(until, when)
        return None if until == float("inf") else max(0.0, min(until - time.monotonic(), LONGEST_WAIT_S))

    def _move(self, events: list[tuple[int, int]]) -> None:
        assert self._transport is not None
        self._transport.handle(events)
        if self._doomed:
            self._bury()
        if self._tasks:
            for task in list(self._tasks):  # which may add tasks
                if task.advance():
                    self._tasks.remove(task)

    def _open(self) -> Transport:
        if self._link is None and self.size == 1:
            raise StateError("a world of one process has no transport")
        widen_tlb()
        self._transport = transport = Transport(self.rank, self._addresses, self._port, self._on_closed, self._listener)
        transport.engine = self.engine
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        transport.watch(self._alarm, self._on_alarm)
        if self._link is not None:
            # From now on the parent tells this rank about lost ones, and lets it live until all have answered: what it sent may
            # still be on its way out of this VM.
            self._link.send(Kind.COMM)
            transport.watch(int(self._link.dealer.getsockopt(zmq.FD)), self._on_link)
            self._on_link()
        return transport

    # Losses

    def on_notice(self, rank: int, cause: str, *, in_peace: bool = False) -> None:
        """The parent says that a rank is gone."""
        if rank not in self.engine.dead and (not in_peace or (self._transport is not None and not self._transport.knows(rank))):
            when = self._doomed[rank][0] if rank in self._doomed else time.monotonic() + GRACE_S
            self._doomed[rank] = (when, cause, in_peace)

    def declare_lost(self, rank: int, cause: str) -> None:
        """Count a rank as gone from now on."""
        error = PeerLost(f"rank {rank} {cause}", rank=rank, cause=cause)
        self.engine.on_lost(rank, error)
        if self._transport is not None:
            self._transport.forget(rank, error)

    def _on_alarm(self) -> None:
        os.eventfd_read(self._alarm)

    def _on_link(self) -> None:
        assert self._link is not None
        self._link.look()
        # What `send` of the same socket finds is signalled to nobody (zmq_getsockopt(3), ZMQ_FD), so look at all there is.
        for rank, cause in self._link.lost.items():
            self.on_notice(rank, cause)
        for rank in self._link.left:
            self.on_notice(rank, "has returned", in_peace=True)

    def _on_closed(self, rank: int, in_peace: bool, cause: str) -> None:
        if cause:
            self._doomed[rank] = (time.monotonic(), cause, False)
        elif in_peace:
            # Not at once: it may have given up because of a loss that this rank is about to hear of, too. Of two connections
            # with it, the one without the BYE may be seen to end first.
            if rank not in self.engine.left and self._doomed.get(rank, _CLOSED)[1:] == _CLOSED[1:]:
                self._doomed[rank] = (time.monotonic() + GRACE_S, "has returned", True)
        elif rank not in self.engine.dead and rank not in self._doomed:
            self._doomed[rank] = (time.monotonic() + GRACE_S, *_CLOSED[1:])

    def _declare_left(self, rank: int) -> None:
        error = PeerLost(f"rank {rank} has ended, so this call cannot complete", rank=rank, cause="has returned")
        self.engine.on_left(rank, error)
        if self._transport is not None:
            self._transport.forget(rank, error)

    def _bury(self) -> None:
        now = time.monotonic()
        # Who is lost comes before who has returned, perhaps because of that.
        for rank, (when, cause, in_peace) in sorted(self._doomed.items(), key=lambda item: item[1][2]):
            if when <= now or (not in_peace and any(other[0] <= now for other in self._doomed.values())):
                del self._doomed[rank]
                if in_peace:
                    self._declare_left(rank)
                else:
                    self.declare_lost(rank, cause)

    def _ask_parent(self) -> None:
        if self._link is not None and not self._asked_parent and self._transport is not None:
            self._asked_parent = True
            self._link.send(Kind.WHO_LEFT)
            self._on_link()

    # Control messages

    def who_is_missing(self, ctx: int, number: int, members: Collection[int], limit_s: float) -> list[int]:
        """Which members have not come to a collective call, as far as they say so within a time limit."""
        with self.lock:
            for peer in members:
                if peer != self.rank:
                    self.control(peer, TOOK_PART, ctx, number)
                    self.control(peer, ASK, ctx, number)
            end = time.monotonic() + limit_s
            while (missing := self._absent(ctx, number, members)) and time.monotonic() < end:
                self._round(end)
        return missing

    def retire(self, contexts: Sequence[int]) -> None:
        """A communicator is freed."""
        with self.lock:
            for ctx in contexts:
                self.engine.retire(ctx)
            self.entered.pop(contexts[0], None)
            for key in [key for key in self.took_part if key[1] == contexts[0]]:
                del self.took_part[key]

    def revoke(self, contexts: Sequence[int], members: Collection[int]) -> None:
        """Revoke a communicator's contexts here, and tell its members."""
        if contexts[0] not in self.engine.revoked:
            for ctx in contexts:
                self.engine.revoke(ctx, _revoked())
            order = wire.pack({"contexts": list(contexts), "members": list(members)})
            for peer in members:
                if peer != self.rank:
                    self.control(peer, REVOKE, contexts[0], 0, order)

    def _absent(self, ctx: int, number: int, members: Collection[int]) -> list[int]:
        return [peer for peer in members if peer != self.rank and self.took_part.get((peer, ctx), -1) < number]

    def _on_control(self, peer: int, kind: int, _tag: int, ctx: int, number: int, payload: bytes) -> None:
        if kind == ASK:
            self.control(peer, TOOK_PART, ctx, self.entered.get(ctx, -1) & 0xFFFFFFFF)
        elif kind == TOOK_PART:
            if len(self.took_part) >= MOST_TOLD and (peer, ctx) not in self.took_part:
                raise ProtocolError("about collective calls of far too many communicators")
            self.took_part[peer, ctx] = -1 if number == 0xFFFFFFFF else number
        elif kind == REVOKE:
            # Passed on: the one who revoked may have died half-way.
            self.revoke(*_revocation(payload, peer, self.size))
        else:
            raise ProtocolError(f"a control message of unknown kind {kind}")


def _revocation(payload: bytes, peer: int, size: int) -> tuple[list[int], list[int]]:
    """The contexts and members of a communicator that one of them has revoked.

    Raises:
        ProtocolError: it is none.
    """
    order = wire.unpack(payload)
    contexts, members = order.get("contexts"), order.get("members")
    if not isinstance(contexts, list) or not 0 < len(contexts) <= MOST_CONTEXTS or {type(each) for each in contexts} != {int}:
        raise ProtocolError("the revocation of no communicator")
    if not isinstance(members, list) or peer not in members or {type(each) for each in members} != {int}:
        raise ProtocolError("the revocation of a communicator that is not its own")
    if len(members) > size or any(not 0 <= each < size for each in members):
        raise ProtocolError("the revocation of a communicator that is not its own")
    return contexts, members


def _revoked() -> MPIException:
    from sfparallel.runtime.mpi.errors import ERR_REVOKED
    return MPIException(ERR_REVOKED)
