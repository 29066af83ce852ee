"""Which message goes to which receive: the rules of MPI as a state machine without I/O.

An `Engine` is one process's view. Its user posts sends and receives; whoever moves bytes (`transport`) takes what the engine
pushes to its `Wire`, and tells it what arrives. Messages between two processes arrive in the order in which they were pushed.

* A message is matched by context (the communicator), source and tag; of several that match, the first that was sent; of several
  receives that match, the first that was posted (MPI 4.0, 3.5).
* A small message is sent at once (EAGER) as long as the peer's unexpected messages do not exceed a window. Each one that is
  received gives its share of the window back (`credit` in whatever is sent next). All others announce themselves (RTS), and are
  sent (DATA) when the peer has a place for them (CTS): so a flood costs memory where it comes from.
* Two processes that send each other something large before they receive do not block for ever: while a process is blocked in a
  send (`blocked_in_send`) it takes in announced messages that nobody waits for, at least one, up to `PULL_BYTES`.
* A process that is lost fails what depends on it: sends to it, receives from it, receives from any source in a communicator that
  it belongs to, and everything collective there. One that ends in peace fails sends to it and receives from it; the last of a
  communicator's other members that does fails receives from any source, too.
* A process that sends what no engine sends is to be taken for lost (`ProtocolError`): it cannot crash this one, nor take what
  goes to others.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from sfparallel.errors import ProtocolError
from sfparallel.runtime.mpi.constants import ANY_SOURCE, ANY_TAG
from sfparallel.runtime.mpi.errors import CODES, MPIException
from sfparallel.runtime.mpi.operations import SYNC as SYNC
from sfparallel.runtime.mpi.operations import Arrival as Arrival
from sfparallel.runtime.mpi.operations import Buffer as Buffer
from sfparallel.runtime.mpi.operations import RecvOp as RecvOp
from sfparallel.runtime.mpi.operations import SendOp as SendOp

EAGER_BYTES = 64 << 10
"""Larger messages wait for their receive. Below it, a round trip costs more than a copy."""

WINDOW_BYTES = 1 << 20
"""What a peer may have sent to us that we did not receive yet; `OVERHEAD_BYTES` on top of the payload of each message."""

OVERHEAD_BYTES = 256

PULL_BYTES = 256 << 20
"""Memory for large messages that are taken in because this process is blocked in a send."""

HELD_BYTES = 256 << 20
"""What one peer's small messages that nobody has received may take here. A peer that keeps to its window is far from it; urgent
ones do not count there, but of those this holds hundreds of thousands."""

MOST_ANNOUNCED = 1 << 20
"""Messages that one process's peers have announced and not sent."""

HEADER = struct.Struct("<BBHiQIIQ")
"""kind, flags, unused, tag, context, number, credit, length of the payload."""

EAGER, RTS, CTS, DATA, ACK, CREDIT = range(1, 7)
CONTROL = 16
"""Kinds from here on are not the engine's: they go to `on_control`."""

PARTS = 2
"""Flag: the payload is a pickle and its buffers (see `pickling`)."""


class Wire(Protocol):
    """Moves bytes to peers."""

    def push(self, peer: int, header: bytes, frames: Sequence[Buffer], op: SendOp | None) -> None:
        """Send; `op.on_the_way()` when the last byte has left and `frames` may change."""


class Engine:
    """One process.

    Args:
        me: number of this process in the world.
        wire: takes what shall be sent.
        on_control: called with (peer, kind, tag, context, number, payload) for kinds that are not the engine's.
    """

    def __init__(self, me: int, wire: Wire, on_control: Callable[[int, int, int, int, int, bytes], None] | None = None) -> None:
        self.me = me
        self.most_held_bytes = HELD_BYTES
        self.blocked_in_send = 0
        self.dead: dict[int, MPIException] = {}
        """Lost processes, and what is raised for them."""
        self.left: dict[int, MPIException] = {}
        """Processes that have ended in peace, likewise."""
        self.revoked: set[int] = set()
        """Contexts that nobody may use any more."""
        self._wire = wire
        self._on_control = on_control
        self._posted: dict[int, deque[RecvOp]] = {}
        self._unexpected: dict[int, deque[Arrival]] = {}
        self._announced: dict[int, SendOp] = {}
        self._to_be_acknowledged: dict[int, SendOp] = {}
        self._incoming: dict[tuple[int, int], RecvOp | Arrival] = {}
        self._heralded: set[tuple[int, int]] = set()
        """Announced messages that have not begun to come."""
        self._asked: dict[tuple[int, int], int] = {}
        """Lengths of those that were asked for, and have not begun to come."""
        self._held: dict[int, int] = {}
        """Bytes of each peer's small messages that nobody has received."""
        self._landing: dict[tuple[int, int], memoryview] = {}
        self._window: dict[int, int] = {}
        self._owed: dict[int, int] = {}
        self._pulled_bytes = 0
        self._number = 0

    # What this process wants

    def send(self, dest: int, ctx: int, tag: int, frames: Sequence[Buffer], nbytes: int, flags: int = 0,
             members: Collection[int] = (), collective: bool = False, urgent: bool = False) -> SendOp:
        """Post a send. `frames` must not change until it is done. A small one that is urgent does not care about the window."""
        op = SendOp(dest, ctx, tag, frames, nbytes, flags)
        if collective or members:
            op.members, op.collective = members, collective
        if (self.dead or self.left or self.revoked) and (reason := self._why_not(ctx, dest, members, collective)):
            op.fail(reason)
        elif dest == self.me:
            self._send_to_self(op)
        else:
            cost = nbytes + OVERHEAD_BYTES
            window = self._window.get(dest, WINDOW_BYTES)
            number = 0
            at_once = nbytes <= EAGER_BYTES and (cost <= window or urgent)
            if not at_once or flags & SYNC:
                self._number = number = (self._number + 1) & 0xFFFFFFFF
                if flags & SYNC:
                    self._to_be_acknowledged[number] = op
            if at_once:
                self._window[dest] = window - cost
                credit = self._owed.pop(dest, 0) if self._owed else 0
                self._wire.push(dest, HEADER.pack(EAGER, flags, 0, tag, ctx, number, credit, nbytes), frames, op)
            else:
                self._announced[number] = op
                self._push(dest, RTS, flags, tag, ctx, number, nbytes)
        return op

    def recv(self, ctx: int, source: int, tag: int, buffer: memoryview | None = None, members: Collection[int] = (),
             collective: bool = False) -> RecvOp:
        """Post a receive.

        Args:
            source: a process, or ANY_SOURCE.
            tag: a tag, or ANY_TAG.
            members: processes whose loss fails it if it is collective, or from ANY_SOURCE.
        """
        op = RecvOp(ctx, source, tag, buffer)
        if collective or members:
            op.members, op.collective = members, collective
        if collective and self.dead and (reason := self._why_not(ctx, source, members, collective)):
            # At once, though messages of thousands of calls may be here, if this rank is behind: it will not get to the end.
            op.fail(reason)
            return op
        queue = self._unexpected.get(ctx)
        arrival = self._find(queue, source, tag) if queue else None
        if arrival is not None and queue is not None:
            queue.remove(arrival)
            self._take(op, arrival)
        elif (self.dead or self.left or self.revoked) and (reason := self._why_not(ctx, source, members, collective)):
            op.fail(reason)
        else:
            self._posted.setdefault(ctx, deque()).append(op)
        return op

    def probe(self, ctx: int, source: int, tag: int) -> Arrival | None:
        """The message that a receive would get now."""
        queue = self._unexpected.get(ctx)
        return self._find(queue, source, tag) if queue else None

    def holds(self, ctx: int, arrival: Arrival) -> bool:
        """Whether nobody has received a probed message since."""
        return any(each is arrival for each in self._unexpected.get(ctx, ()))

    def extract(self, ctx: int, arrival: Arrival) -> None:
        """Take a probed message out: no other receive gets it any more (matched probe)."""
        self._unexpected[ctx].remove(arrival)

    def recv_extracted(self, ctx: int, arrival: Arrival, buffer: memoryview | None = None) -> RecvOp:
        """Receive a message that was taken out."""
        op = RecvOp(ctx, arrival.peer, arrival.tag, buffer)
        if arrival.payload is None and (gone := self.dead.get(arrival.peer) or self.left.get(arrival.peer)):
            op.fail(gone)  # only its announcement has come
        else:
            self._take(op, arrival)
        return op

    def cancel(self, op: RecvOp | SendOp) -> bool:
        """Withdraw a receive that is not matched yet; sends cannot be withdrawn."""
        if isinstance(op, SendOp) or op.matched or op.done:
            return False
        self._posted[op.ctx].remove(op)
        op.cancelled = op.done = True
        return True

    def withdraw(self, op: RecvOp) -> bool:
        """Give a receive up: a message that is on its way to it stays for the next one. False if it is done, or must be awaited
        because its buffer is being written to."""
        if op.done or not op.matched:
            return self.cancel(op)
        for key, target in self._incoming.items():
            if target is op:
                if op.buffer is not None and key in self._landing:
                    return False
                arrival = self._incoming[key] = Arrival(key[0], op.tag, op.flags & ~SYNC, key[1], op.nbytes, None)
                arrival.pulled = True
                self._pulled_bytes += op.nbytes
            elif isinstance(target, Arrival) and target.op is op:
                arrival, target.op = target, None
                arrival.flags &= ~SYNC
            else:
                continue
            self._unexpected.setdefault(op.ctx, deque()).appendleft(arrival)
            op.cancelled = op.done = True
            return True
        return False

    def pull(self) -> None:
        """While this process is blocked in a send: take in what is announced."""
        for ctx, queue in self._unexpected.items():
            for arrival in queue:
                if arrival.payload is None and not arrival.pulled and not self._pull(ctx, arrival):
                    return

    def why_blocked(self, ctx: int, source: int, members: Collection[int]) -> MPIException | None:
        """Why a message of that kind will never come, if so."""
        return self._why_not(ctx, source, members, False) if self.dead or self.left or self.revoked else None

    @property
    def is_flushed(self) -> bool:
        """Whether nothing that was announced waits for its receive."""
        return not self._announced

    # What arrives

    def on_header(self, peer: int, kind: int, flags: int, tag: int, ctx: int, number: int, credit: int,
                  payload: memoryview) -> None:
        """Something other than RTS and DATA has arrived. `payload` is only valid during the call.

        Raises:
            ProtocolError: no engine sends that (so for all that arrives).
        """
        if kind == EAGER:
            self.on_eager(peer, flags, tag, ctx, number, credit, payload)
            return
        if credit:
            self._window[peer] = min(WINDOW_BYTES, self._window.get(peer, WINDOW_BYTES) + credit)
        if kind == CTS:
            op = self._announced.get(number)
            if op is None:
                return  # it has failed since
            if op.dest != peer:
                raise ProtocolError("a request for another rank's message")
            del self._announced[number]
            if not op.error:
                self._push(peer, DATA, 0, 0, 0, number, op.nbytes, op.frames, op)
        elif kind == ACK:
            op = self._to_be_acknowledged.get(number)
            if op is not None:
                if op.dest != peer:
                    raise ProtocolError("an acknowledgement of another rank's message")
                del self._to_be_acknowledged[number]
                op.awaits_ack = False
                if not op.awaits_wire:
                    op.done = True
        elif kind >= CONTROL and self._on_control is not None:
            self._on_control(peer, kind, tag, ctx, number, bytes(payload))
        elif kind != CREDIT:
            raise ProtocolError(f"a message of unknown kind {kind}")

    def on_eager(self, peer: int, flags: int, tag: int, ctx: int, number: int, credit: int, payload: memoryview) -> None:
        """A small message has arrived, as a whole. `payload` is only valid during the call."""
        if credit:
            self._window[peer] = min(WINDOW_BYTES, self._window.get(peer, WINDOW_BYTES) + credit)
        op: RecvOp | None = None
        if posted := self._posted.get(ctx):
            op = posted[0]
            if (op.source == peer or op.source == ANY_SOURCE) and (op.tag == tag or op.tag == ANY_TAG):
                posted.popleft()
            else:
                op = self._match(ctx, peer, tag)
        nbytes = len(payload)
        if op is None:
            if ctx in self.revoked:
                self._return_window(peer, nbytes)
            else:
                self._held[peer] = held = self._held.get(peer, 0) + nbytes + OVERHEAD_BYTES
                if held > self.most_held_bytes:
                    raise ProtocolError("far more messages than were received")
                arrival = Arrival(peer, tag, flags, number, nbytes, bytes(payload))
                self._unexpected.setdefault(ctx, deque()).append(arrival)
            return
        op.source, op.tag, op.flags, op.nbytes, op.matched = peer, tag, flags, nbytes, True
        # What `_return_window` and `_deliver` do, for most messages without a call.
        self._owed[peer] = owed = self._owed.get(peer, 0) + nbytes + OVERHEAD_BYTES
        if owed >= WINDOW_BYTES // 2:
            self._push(peer, CREDIT, 0, 0, 0, 0)
        if flags & SYNC:
            self._push(peer, ACK, 0, 0, 0, number)
        if op.buffer is None:
            op.payload = bytes(payload)
            op.done = True
        else:
            self._deliver(op, payload)

    def on_rts(self, peer: int, flags: int, tag: int, ctx: int, number: int, credit: int, nbytes: int) -> None:
        """A message is announced; `nbytes` is its length."""
        if credit:
            self._window[peer] = min(WINDOW_BYTES, self._window.get(peer, WINDOW_BYTES) + credit)
        if (peer, number) in self._heralded or len(self._heralded) >= MOST_ANNOUNCED:
            raise ProtocolError("the announcement of a message twice, or of too many")
        arrival = Arrival(peer, tag, flags, number, nbytes, None)
        if ctx not in self.revoked:
            self._heralded.add((peer, number))
        op = self._match(ctx, peer, tag)
        if op is not None:
            self._take(op, arrival)
        elif ctx not in self.revoked:
            self._unexpected.setdefault(ctx, deque()).append(arrival)
            if self.blocked_in_send:
                self._pull(ctx, arrival)

    def landing(self, peer: int, number: int, nbytes: int) -> memoryview:
        """Where the payload of DATA shall go; `on_data` when it is complete."""
        if self._asked.pop((peer, number), None) != nbytes:
            raise ProtocolError(f"{nbytes} bytes that were not requested")
        self._heralded.discard((peer, number))
        target = self._incoming.get((peer, number))
        if isinstance(target, RecvOp) and target.buffer is not None and nbytes <= len(target.buffer):
            place = target.buffer[:nbytes]
        else:
            # Not a bytearray: that one is filled with zeros first, which touches all of its pages for nothing.
            try:
                place = np.empty(nbytes, np.uint8).data
            except (MemoryError, ValueError):
                raise ProtocolError(f"a message of {nbytes} bytes, for which there is no memory") from None
        self._landing[peer, number] = place
        return place

    def on_data(self, peer: int, number: int) -> None:
        """The payload of DATA is complete."""
        place = self._landing.pop((peer, number))
        target = self._incoming.pop((peer, number), None)
        if isinstance(target, RecvOp):
            self._deliver(target, place)
        elif target is not None:
            target.payload = place
            if target.op is not None:
                self._pulled_bytes -= target.nbytes
                self._deliver(target.op, place)

    def on_left(self, peer: int, error: MPIException) -> None:
        """A process has ended in peace: it did its part of everything collective, but nothing more comes from it directly."""
        self.left[peer] = error
        self._fail(peer, error)

    def on_lost(self, peer: int, error: MPIException) -> None:
        """A process is lost: fail what depends on it, now and from now on."""
        self.dead[peer] = error
        self._fail(peer, error)

    def _fail(self, peer: int, error: MPIException) -> None:
        for queue in self._posted.values():
            for op in [op for op in queue if self._depends(op, op.source, peer)]:
                queue.remove(op)
                op.fail(error)
        for sends in (self._announced, self._to_be_acknowledged):
            for number, send in list(sends.items()):
                if self._depends(send, send.dest, peer):
                    del sends[number]
                    send.fail(error)
        for key, target in list(self._incoming.items()):
            if key[0] == peer or (isinstance(target, RecvOp) and self._depends(target, key[0], peer)):
                self._drop_incoming(key, error)
        for ctx, arrivals in self._unexpected.items():
            # What is only announced will never come.
            self._unexpected[ctx] = deque(each for each in arrivals if each.peer != peer or each.payload is not None)

    def retire(self, ctx: int) -> None:
        """A context is not used any more: keep nothing for it."""
        if not self._posted.get(ctx, True):
            del self._posted[ctx]
        self._drop_unexpected(ctx)

    def revoke(self, ctx: int, error: MPIException) -> None:
        """Fail everything in a context, now and from now on."""
        self.revoked.add(ctx)
        self._drop_unexpected(ctx)
        for key, target in list(self._incoming.items()):
            # The sender may have dropped what it had announced.
            receiver = target if isinstance(target, RecvOp) else target.op
            if receiver is not None and receiver.ctx == ctx:
                self._drop_incoming(key, error)
        for op in self._posted.pop(ctx, ()):
            op.fail(error)
        for sends in (self._announced, self._to_be_acknowledged):
            for number, send in list(sends.items()):
                if send.ctx == ctx:
                    del sends[number]
                    send.fail(error)

    # How it works

    def _drop_unexpected(self, ctx: int) -> None:
        """Nobody will receive what has arrived in a context."""
        for arrival in self._unexpected.pop(ctx, ()):
            if arrival.pulled:
                self._pulled_bytes -= arrival.nbytes
                self._incoming.pop((arrival.peer, arrival.number), None)
            elif arrival.payload is None:
                self._heralded.discard((arrival.peer, arrival.number))
            elif arrival.peer != self.me:
                self._no_longer_held(arrival)

    def _drop_incoming(self, key: tuple[int, int], error: MPIException) -> None:
        """What was asked for will not come, or is of no use any more."""
        target = self._incoming.pop(key)
        receiver: RecvOp | None
        if isinstance(target, RecvOp):
            receiver = target
        else:
            receiver = target.op
            self._pulled_bytes -= target.nbytes
        if receiver is not None:
            receiver.fail(error)

    @staticmethod
    def _find(queue: deque[Arrival], source: int, tag: int) -> Arrival | None:
        for arrival in queue:
            if (source in (arrival.peer, ANY_SOURCE)) and (tag in (arrival.tag, ANY_TAG)):
                return arrival
        return None

    def _match(self, ctx: int, peer: int, tag: int) -> RecvOp | None:
        queue = self._posted.get(ctx)
        if queue:
            for op in queue:
                if (op.source == peer or op.source == ANY_SOURCE) and (op.tag == tag or op.tag == ANY_TAG):
                    queue.remove(op)
                    return op
        return None

    def _take(self, op: RecvOp, arrival: Arrival) -> None:
        op.source, op.tag, op.flags, op.nbytes, op.matched = arrival.peer, arrival.tag, arrival.flags, arrival.nbytes, True
        peer, own = arrival.peer, arrival.peer == self.me
        if arrival.flags & SYNC:
            if own:
                self._to_be_acknowledged.pop(arrival.number).done = True
            else:
                self._push(peer, ACK, 0, 0, 0, arrival.number)
        if arrival.payload is not None:
            if arrival.pulled:
                self._pulled_bytes -= arrival.nbytes
            elif not own:
                self._no_longer_held(arrival)
            self._deliver(op, arrival.payload)
        elif arrival.pulled:
            arrival.op = op
        else:
            self._incoming[peer, arrival.number] = op
            self._asked[peer, arrival.number] = arrival.nbytes
            self._push(peer, CTS, 0, 0, 0, arrival.number)

    def _deliver(self, op: RecvOp, payload: Buffer) -> None:
        if op.buffer is None:
            op.payload = payload
        elif op.nbytes > len(op.buffer):
            detail = f"{op.nbytes} bytes from rank {op.source} of COMM_WORLD, for a buffer of {len(op.buffer)}"
            op.error = MPIException(CODES["ERR_TRUNCATE"], detail)
        elif op.nbytes and not (isinstance(payload, memoryview) and payload.obj is op.buffer.obj):
            op.buffer[:op.nbytes] = payload
        op.done = True

    def _send_to_self(self, op: SendOp) -> None:
        payload = b"".join(op.frames)
        receiver = self._match(op.ctx, self.me, op.tag)
        if receiver is not None:
            receiver.source, receiver.tag, receiver.flags = self.me, op.tag, op.flags
            receiver.nbytes, receiver.matched, op.awaits_ack = len(payload), True, False
            self._deliver(receiver, payload)
        else:
            self._number = number = (self._number + 1) & 0xFFFFFFFF
            arrival = Arrival(self.me, op.tag, op.flags, number, len(payload), payload)
            self._unexpected.setdefault(op.ctx, deque()).append(arrival)
            if op.flags & SYNC:
                self._to_be_acknowledged[number] = op
        op.on_the_way()

    def _pull(self, ctx: int, arrival: Arrival) -> bool:
        if self._pulled_bytes and self._pulled_bytes + arrival.nbytes > PULL_BYTES:
            return False
        arrival.pulled = True
        self._pulled_bytes += arrival.nbytes
        self._incoming[arrival.peer, arrival.number] = arrival
        self._asked[arrival.peer, arrival.number] = arrival.nbytes
        self._push(arrival.peer, CTS, 0, 0, 0, arrival.number)
        return True

    def _no_longer_held(self, arrival: Arrival) -> None:
        """A small message is received, or never will be."""
        self._held[arrival.peer] -= arrival.nbytes + OVERHEAD_BYTES
        self._return_window(arrival.peer, arrival.nbytes)

    def _return_window(self, peer: int, nbytes: int) -> None:
        self._owed[peer] = owed = self._owed.get(peer, 0) + nbytes + OVERHEAD_BYTES
        if owed >= WINDOW_BYTES // 2:
            self._push(peer, CREDIT, 0, 0, 0, 0)

    def _push(self, peer: int, kind: int, flags: int, tag: int, ctx: int, number: int, nbytes: int = 0,
              frames: Sequence[Buffer] = (), op: SendOp | None = None) -> None:
        credit = self._owed.pop(peer, 0) if self._owed else 0
        self._wire.push(peer, HEADER.pack(kind, flags, 0, tag, ctx, number, credit, nbytes), frames, op)

    def _depends(self, op: RecvOp | SendOp, partner: int, peer: int) -> bool:
        if partner == peer:
            return True
        if peer not in op.members:
            return False
        any_source = partner == ANY_SOURCE
        return (peer in self.dead and (op.collective or any_source)) or (any_source and self._deserted(op.members) is not None)

    def _deserted(self, members: Collection[int]) -> MPIException | None:
        """What to say when all other members are gone, and so nothing more can come."""
        others = [rank for rank in members if rank != self.me]
        if not others or any(rank not in self.left and rank not in self.dead for rank in others):
            return None
        return self.dead.get(others[0]) or self.left[others[0]]

    def _why_not(self, ctx: int, partner: int, members: Collection[int], collective: bool) -> MPIException | None:
        if ctx in self.revoked:
            return MPIException(CODES["ERR_REVOKED"])
        if partner in self.dead or partner in self.left:
            return self.dead.get(partner) or self.left[partner]
        if collective or partner == ANY_SOURCE:
            for rank, error in self.dead.items():
                if rank in members:
                    return error
        if partner == ANY_SOURCE and self.left:
            return self._deserted(members)
        return None
