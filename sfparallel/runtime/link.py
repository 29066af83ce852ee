"""The line between a region's parent and its clones: messages over ZeroMQ on the clone network.

The parent has a ROUTER and a listening socket before the fork. Next to it, in the same context, lies a DEALER that is not
connected yet: in a clone the context and its I/O thread go on (they are memory of the VM like everything else), so that only
`connect` is left to do there. The clone's copy of the listening socket has an address that the clone has no longer: nobody can
reach it, so it is left alone (closing it would wake two more threads on the way to the user's function).

The ROUTER gets the listening socket when the region looks for answers, and not before: ZeroMQ would accept connections of which
nobody here is told, and read from them without a bound. Until then they wait in the kernel, which holds little of each.

The answer of a rank that is small goes another way, if the supervisor takes it: with the clone's exit, over the line by which it
was made (`pack_answer`). A TCP connection and its handshake are most of what a clone does for a trivial function otherwise.

A message is [header (msgpack map), payload frames...], and read by `clone_messages`; from a clone, if it is large, it comes in
pieces (`parts`). Who sent it is not believed but checked: ZeroMQ tells the address of the peer, and the clone network lets nobody
send from another's.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import zmq

from sfparallel import wire
from sfparallel.errors import ProtocolError
from sfparallel.runtime.clone_messages import BadMessage, Kind, Message, claims, decode
from sfparallel.runtime.here import HERE
from sfparallel.runtime.inflow import LOOK_S, Inflow
from sfparallel.runtime.keywords import LONGEST_WAIT_S
from sfparallel.runtime.parts import PIECE_BYTES, Incoming, pieces
from sfparallel.runtime.payload import IN_BAND_BYTES, Buffer
from sfparallel.runtime.strangers import Strangers

__all__ = ["CloneLink", "Kind", "Order", "ParentLink", "pack_answer", "set_up_dealer"]

HANDSHAKE_MS = 300_000
"""Many clones on few emulated cores may take long to get through the handshake; the default of 30 s is too short. A clone itself
has no limit: its parent may look for answers much later."""

BACKLOG = 4096

UNREAD = 8
"""So many messages of one connection wait in this process, or pieces of large ones; the rest waits where it comes from."""

TURN = 64
"""So many messages are taken before whoever takes them looks at all else again."""

MOST_CALLS = 64
"""Connections that one address may make: a rank makes one, and new ones if that breaks. Each takes a descriptor of ours."""

MOST_NOTICES = 64
"""A rank says that it has to do with others, and asks who has left, once in its life; nobody needs to so often."""

_NUMBERS = itertools.count()


class Order(NamedTuple):
    """What a clone is told to do: `keys` of work, and for each the frames that come with it (none where it has all in memory)."""

    kind: Kind
    keys: list[int]
    inputs: list[list[Buffer]]
    rank: int | None
    """What the parent calls this clone, where the fork did not say."""


def pack_answer(kind: Kind, pickled: bytes, fields: dict[str, Any]) -> bytes:
    """A whole answer as one piece, for the way through the supervisor."""
    return wire.pack({"kind": kind, "pickle": pickled, **fields})


def as_bytes(address: str) -> Any:
    """An address as PyZMQ takes it. PyZMQ 26.4 (Debian 13) frees an address that is text before libzmq reads it: with
    PYTHONDEVMODE=1, which overwrites what is freed, none is valid. Its annotations know text only."""
    return address.encode()


class ParentLink:
    """The parent's end, and the other end as it lies ready for the clones.

    Args:
        address: this VM's address on the clone network.
    """

    def __init__(self, address: str) -> None:
        context = HERE.zmq_context()
        self._calls: zmq.Socket[bytes] | None = None
        """Readable when somebody has connected."""
        self._listener = socket.create_server((address, 0), backlog=BACKLOG)
        self._listener.setblocking(False)
        self._port = int(self._listener.getsockname()[1])
        self.endpoint = f"tcp://{address}:{self._port}"
        self.router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        try:
            for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, UNREAD), (zmq.SNDHWM, 0), (zmq.HANDSHAKE_IVL, HANDSHAKE_MS)):
                self.router.setsockopt(option, value)
            set_up_dealer(self.dealer)
        except BaseException:
            self.close()
            raise
        self._inflow = Inflow(self._port)
        self._incoming: dict[tuple[bytes, str], Incoming | None] = {}
        """What comes in pieces, by connection; None where they are of a rank that was forgotten, and not wanted."""
        self._called: Counter[str] = Counter()
        self.drained = False
        """Whether the last `take` left nothing behind."""
        self._ranks: dict[str, int] = {}
        """By address."""
        self._addresses: dict[int, str] = {}
        self._former: dict[int, str] = {}
        """Addresses of ranks of which nothing more is taken."""
        self._left_behind: set[str] = set()
        """The same addresses."""
        self._routes: dict[int, bytes] = {}
        self._notices: Counter[int] = Counter()
        self._strangers = Strangers("message on the gather socket")

    def expect(self, addresses: Sequence[str]) -> None:
        """Say which address each rank has."""
        for rank, address in enumerate(addresses):
            self.admit(rank, address)

    def admit(self, rank: int, address: str) -> None:
        """One more is expected."""
        self._addresses[rank] = address
        self._ranks[address] = rank
        self._called.pop(address, None)

    def watch(self, poller: zmq.Poller) -> None:
        """Have a poller look out for messages and connections. Not before the fork: nobody connects then, and it takes time."""
        self.listen()
        poller.register(self._calls, zmq.POLLIN)
        poller.register(self.router, zmq.POLLIN)

    def listen(self) -> None:
        """Accept connections from now on, and be told of each."""
        if self._calls is not None:
            return
        self._calls = calls = HERE.zmq_context().socket(zmq.PAIR)
        # Without a limit: with one, ZeroMQ's I/O thread would stand still until somebody reads.
        calls.setsockopt(zmq.RCVHWM, 0)
        calls.setsockopt(zmq.LINGER, 0)
        name = f"inproc://calls-{next(_NUMBERS)}"
        self.router.monitor(as_bytes(name), zmq.EVENT_ACCEPTED)
        calls.connect(as_bytes(name))
        self.router.setsockopt(zmq.USE_FD, self._listener.fileno())
        self.router.bind(as_bytes(self.endpoint))
        self._listener.detach()  # it is ZeroMQ's now

    def forget(self, rank: int) -> None:
        """Take nothing more from this rank."""
        address = self._addresses.pop(rank, None)
        if address is None:
            return
        self._former[rank] = address
        self._left_behind.add(address)
        self._routes.pop(rank, None)
        self._incoming = {line: None if line[1] == address else coming for line, coming in self._incoming.items()}
        if self._ranks.get(address) == rank:  # it may belong to another one by now
            del self._ranks[address]

    def take(self, most: int = TURN) -> Iterator[Message | BadMessage]:
        """What has come from ranks, as far as it came in the first `most` messages; whoever wants more asks again.

        Others may be at this socket, too: their messages are dropped, and count as any.
        """
        router = self.router
        self.drained = False
        if self._calls is not None:
            yield from self._take_calls(self._calls)
        for address, count in self._inflow.overfull():
            if (rank := self._ranks.get(address)) is not None:
                yield BadMessage(rank, f"{count >> 20} MiB that are not a whole message")
        for _ in range(most):
            # Asked first, because an exception (zmq.Again) costs more than a message.
            if not int(router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self.drained = True
                return
            message = self._next()
            if message is not None:
                yield message

    def poll_ms(self, wait_s: float | None) -> int | None:
        """For a poller, how long to wait for messages at most, of `wait_s` (None: for ever): what never becomes one has to be
        noticed, too."""
        if self._inflow:
            wait_s = LOOK_S if wait_s is None else min(wait_s, LOOK_S)
        return None if wait_s is None else int(min(wait_s, LONGEST_WAIT_S) * 1000) + 1

    def send(self, rank: int, kind: Kind, **fields: Any) -> bool:
        """Send to a rank that was heard before; False if it was not (ZeroMQ cannot reach it then)."""
        route = self._routes.get(rank)
        if route is None:
            return False
        self.router.send_multipart([route, wire.pack({"kind": kind.value, **fields})])
        return True

    def send_work(self, rank: int, keys: Sequence[int], inputs: Sequence[Sequence[Buffer]], name: int) -> bool:
        """Send keys to a rank, with what belongs to each: the pickle in the header, its large buffers as frames behind it.
        `name` is what people know the rank by."""
        route = self._routes.get(rank)
        if route is None:
            return False
        pickles = [bytes(frames[0]) for frames in inputs]
        counts = [len(frames) - 1 for frames in inputs]
        beside = [frame for frames in inputs for frame in frames[1:]]
        header = wire.pack({"kind": Kind.KEYS.value, "keys": keys, "pickles": pickles, "counts": counts, "name": name})
        self.router.send_multipart([route, header, *beside], copy=not beside)
        return True

    def close(self) -> None:
        if self._calls is not None:
            self.router.disable_monitor()
            self._calls.close(linger=0)
        self._listener.close()
        self.router.close(linger=0)
        self.dealer.close(linger=0)

    def _take_calls(self, calls: zmq.Socket[bytes]) -> Iterator[BadMessage]:
        """Take note of connections, and cut those off that are too many: they would use up this process's descriptors."""
        while int(calls.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event, _ = calls.recv_multipart()
            fd = struct.unpack("=HI", event)[1]
            try:
                sock = socket.socket(fileno=fd)
            except OSError:
                continue  # it is closed already
            try:
                # By now the descriptor may be another one's.
                rank = self._count_call(sock, fd) if sock.getsockname()[1:] == (self._port,) else None
            except OSError:
                continue
            finally:
                sock.detach()  # it is ZeroMQ's
            if rank is not None:
                yield BadMessage(rank, f"more than {MOST_CALLS} connections")

    def _count_call(self, sock: socket.socket, fd: int) -> int | None:
        """Cut a connection off that is too much; the rank that has made it, the first time."""
        peer = sock.getpeername()
        address = peer[0]
        self._called[address] += 1
        if self._called[address] <= MOST_CALLS:
            self._inflow.opened(peer, fd)
            return None
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # ZeroMQ finds the end of the stream, and closes it
        return self._ranks.get(address) if self._called[address] == MOST_CALLS + 1 else None

    def _next(self) -> Message | BadMessage | None:
        """Take one message; None if nobody sent it who belongs here."""
        router = self.router
        route = router.recv()
        parts: list[Any] = []
        address = ""
        if router.getsockopt(zmq.RCVMORE):
            # Only frames tell the peer's address. It is asked for each time: a peer may give its connection any name (ZMTP's
            # routing id), so that a name of today may have been somebody else's yesterday.
            first = router.recv(copy=False)
            address = _peer(first)
            parts.append(first.buffer)
            if router.getsockopt(zmq.RCVMORE):
                parts += [frame.buffer for frame in router.recv_multipart(copy=False)]
            for part in parts:
                self._inflow.took(address, len(part))
        line = route, address
        rank = self._ranks.get(address)
        if rank is None:
            if address not in self._left_behind:
                self._strangers.note(f"it came from {address}" if address else
                                     "its sender has no address: it speaks another version of ZeroMQ's protocol, or none")
            else:
                self._incoming[line] = None
            return None
        coming = self._incoming.get(line)
        if coming is not None:
            if failed := self._feed(coming, parts):
                return BadMessage(rank, failed)
            if not coming.complete:
                return None
            del self._incoming[line]
            parts = coming.parts
        message = decode(rank, [bytes(part) for part in parts[:1]] + parts[1:])
        if isinstance(message, BadMessage):
            if line not in self._incoming and self._former.get(claims(parts)) != address:
                return message
            # Its predecessor at that address had said something before it went; pieces may follow.
            self._incoming[line] = None
            return None
        if message.kind is Kind.PARTS:
            try:
                promised = sum(each.missing for each in self._incoming.values() if each is not None)
                self._incoming[line] = Incoming(message.parts, message.nbytes, promised)
            except ProtocolError as error:
                return BadMessage(rank, error.message)
            return None
        return self._counted(message, route)

    def _feed(self, coming: Incoming, parts: Sequence[memoryview]) -> str:
        """Take a piece; what is wrong with it."""
        if len(parts) != 1:
            return f"{len(parts)} frames where a piece of a message was expected"
        try:
            coming.feed(parts[0])
        except ProtocolError as error:
            return error.message
        return ""

    def _counted(self, message: Message, route: bytes) -> Message | BadMessage:
        rank = message.rank
        self._routes[rank] = route
        if message.kind is Kind.COMM or message.kind is Kind.WHO_LEFT:
            self._notices[rank] += 1
            if self._notices[rank] > MOST_NOTICES:
                return BadMessage(rank, f"more than {MOST_NOTICES} messages {message.kind.value!r}")
        return message


def _peer(frame: zmq.Frame) -> str:
    """The address that a frame came from. ZeroMQ knows none for connections of ZMTP 1.0 and 2.0, for which libzmq makes no
    metadata (zmq_msg_gets(3): EINVAL); and to 1.0 it goes down for most bytes that are no ZMTP at all."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return ""


def set_up_dealer(dealer: zmq.Socket[bytes]) -> None:
    """Options of a clone's end, to be set before it connects."""
    for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SNDHWM, 0), (zmq.HANDSHAKE_IVL, 0)):
        dealer.setsockopt(option, value)


class CloneLink:
    """A clone's end.

    Args:
        dealer: what `ParentLink` laid ready, not connected yet.
        rank: this clone's rank in the region.
        address: the address to send from, or empty: the VM's own.
        endpoint: where the parent listens.
    """

    def __init__(self, dealer: zmq.Socket[bytes], rank: int, address: str, endpoint: str) -> None:
        self.dealer = dealer
        self.rank = rank
        self.lost: dict[int, str] = {}
        """Ranks that will not take part any more, and why."""
        self.left: set[int] = set()
        """Ranks that have returned."""
        self._inbox: list[Order] = []
        # A VM has one address. To name it would have ZeroMQ list all interfaces, which is slow in a clone; only processes on one
        # host (the tests' stand-in for a fork) need to.
        self._endpoint = f"tcp://{address}:0;{endpoint.removeprefix('tcp://')}" if address else endpoint
        self._connected = False

    def connect(self) -> None:
        """Connect now; otherwise the first message does. Nothing is received before."""
        if not self._connected:
            self._connected = True
            self.dealer.connect(as_bytes(self._endpoint))

    def send(self, kind: Kind, frames: Sequence[Buffer] = (), **fields: Any) -> None:
        self.connect()
        header = {"kind": kind.value, "rank": self.rank, **fields}
        if len(frames) == 1 and len(frames[0]) < IN_BAND_BYTES:
            header["pickle"], frames = bytes(frames[0]), ()
        packed = wire.pack(header)
        if not frames and len(packed) <= PIECE_BYTES:
            self.dealer.send(packed)
            return
        parts = [packed, *frames]
        nbytes = sum(map(len, parts))
        self.dealer.send(wire.pack({"kind": Kind.PARTS.value, "rank": self.rank, "count": len(parts), "nbytes": nbytes}))
        for piece in pieces(parts):
            self.dealer.send(piece, copy=len(piece) < IN_BAND_BYTES)

    def receive(self) -> Order:
        """Wait for new keys, or the release."""
        while not self._inbox:
            self._take(self.dealer.recv())
        return self._inbox.pop(0)

    def look(self) -> None:
        """Take what has arrived, without waiting; notices of lost ranks go to `lost`."""
        while True:
            try:
                self._take(self.dealer.recv(zmq.DONTWAIT))
            except zmq.Again:
                return

    def _take(self, header: bytes) -> None:
        message = wire.unpack(header)
        if message["kind"] == Kind.LOST:
            self.lost[message["lost"]] = message["cause"]
        elif message["kind"] == Kind.LEFT:
            self.left.update(message["ranks"])
        else:
            self._inbox.append(Order(Kind(message["kind"]), message.get("keys", []), self._inputs(message), message.get("name")))

    def _inputs(self, header: dict[str, Any]) -> list[list[Buffer]]:
        """The rest of a message, put together with its header; large buffers stay where ZeroMQ has put them."""
        pickles = header.get("pickles", [])
        if not self.dealer.getsockopt(zmq.RCVMORE):
            return [[pickled] for pickled in pickles]
        beside = iter(self.dealer.recv_multipart(copy=False))
        return [[pickled, *(frame.buffer for frame in itertools.islice(beside, count))]
                for pickled, count in zip(pickles, header["counts"], strict=True)]
