"""The line between a region's parent and its clones: messages over ZeroMQ on the clone network.

The parent binds a ROUTER before the fork. Next to it, in the same context, lies a DEALER that is not connected yet: in a clone
the context and its I/O thread go on (they are memory of the VM like everything else), so that only `connect` is left to do
there. The clone's copy of the ROUTER listens on an address that it does not have any more: nobody can reach it, so it is left
alone (closing it would wake two more threads on the way to the user's function).

The answer of a rank that is small goes another way, if the supervisor takes it: with the clone's exit, over the line by which it
was made (`pack_answer`). A TCP connection and its handshake are most of what a clone does for a trivial function otherwise.

A message is [header (msgpack map), payload frames...]. Who sent it is not believed but checked: ZeroMQ tells the address of the
peer, and the clone network lets nobody send from another's.
"""

from __future__ import annotations

import enum
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import zmq

from sfparallel import wire
from sfparallel.errors import ProtocolError
from sfparallel.runtime.here import HERE
from sfparallel.runtime.payload import IN_BAND_BYTES, Buffer

HANDSHAKE_MS = 300_000
"""Many clones on few emulated cores may take long to get through the handshake; the default of 30 s is too short."""

BACKLOG = 4096


class Kind(enum.StrEnum):
    """Kinds of messages; up to BACK from clone to parent, the others from parent to clone."""

    RESULT = "result"
    ERROR = "error"
    COMM = "comm"
    WHO_LEFT = "who left"
    DONE = "done"
    UNFIT = "unfit"
    READY = "ready"
    BACK = "back"
    KEYS = "keys"
    LOST = "lost"
    LEFT = "left"
    RELEASE = "release"


@dataclass(frozen=True)
class Message:
    """One message; `header` holds at least kind and rank, `frames` the payload."""

    kind: Kind
    rank: int
    header: dict[str, Any]
    frames: list[memoryview]


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


def unpack_answer(rank: int, data: bytes) -> Message:
    """What `pack_answer` packed.

    Raises:
        ProtocolError: it is something else.
    """
    header = wire.unpack(data)
    try:
        kind, pickled = Kind(header["kind"]), header["pickle"]
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"the answer of rank {rank} is none: {error!r}") from error
    return Message(kind, rank, header, [memoryview(pickled)] if pickled else [])


class ParentLink:
    """The parent's end, and the other end as it lies ready for the clones.

    Args:
        address: this VM's address on the clone network.
    """

    def __init__(self, address: str) -> None:
        context = HERE.zmq_context()
        self.router: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        try:
            for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SNDHWM, 0), (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
                                  (zmq.BACKLOG, BACKLOG)):
                self.router.setsockopt(option, value)
            self.router.bind(f"tcp://{address}:*")
            self.endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
            set_up_dealer(self.dealer)
        except BaseException:
            self.close()
            raise
        self._addresses: dict[int, str] = {}
        self._routes: dict[int, bytes] = {}
        self._peers: dict[bytes, str] = {}
        """Addresses by route."""

    def expect(self, addresses: Sequence[str]) -> None:
        """Say which address each rank has."""
        self._addresses = dict(enumerate(addresses))

    def admit(self, rank: int, address: str) -> None:
        """One more is expected."""
        self._addresses[rank] = address

    def forget(self, rank: int) -> None:
        """Take nothing more from this rank."""
        self._addresses.pop(rank, None)
        self._routes.pop(rank, None)

    def receive(self) -> Message | None:
        """The next message that is what it claims to be, or None when there is none now."""
        router = self.router
        # Asked first, because an exception (zmq.Again) costs more than a message.
        while int(router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            route = router.recv()
            parts: list[Any] = []
            if router.getsockopt(zmq.RCVMORE):
                if route in self._peers:
                    parts.append(router.recv())
                else:
                    # Only frames tell the peer's address; it is the same as long as the connection lasts, and so is the route.
                    header = router.recv(copy=False)
                    self._peers[route] = str(header.get("Peer-Address"))
                    parts.append(header.bytes)
                if router.getsockopt(zmq.RCVMORE):
                    parts += router.recv_multipart(copy=False)
            try:
                return self._check(route, parts)
            except ProtocolError as error:
                warnings.warn(f"message on the gather socket dropped: {error}", RuntimeWarning, stacklevel=2)
        return None

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
        self.router.close(linger=0)
        self.dealer.close(linger=0)

    def _check(self, route: bytes, parts: list[Any]) -> Message:
        if not parts:
            raise ProtocolError("it has no header")
        header = wire.unpack(parts[0])
        rank = header.get("rank")
        if not isinstance(rank, int) or rank not in self._addresses:
            raise ProtocolError(f"no such rank: {rank!r}")
        peer = self._peers[route]
        if peer != self._addresses[rank]:
            raise ProtocolError(f"it claims to come from rank {rank} ({self._addresses[rank]}) but came from {peer}")
        try:
            kind = Kind(header.get("kind", ""))
        except ValueError:
            raise ProtocolError(f"unknown kind {header.get('kind')!r}") from None
        self._routes[rank] = route
        pickled = header.get("pickle")
        frames = [part.buffer for part in parts[1:]] if pickled is None else [memoryview(pickled)]
        return Message(kind, rank, header, frames)


def set_up_dealer(dealer: zmq.Socket[bytes]) -> None:
    """Options of a clone's end, to be set before it connects."""
    for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SNDHWM, 0), (zmq.HANDSHAKE_IVL, HANDSHAKE_MS)):
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
        # A VM has one address. To name it would have ZeroMQ list all interfaces, which is dear in a clone; only processes on one
        # host (the tests' stand-in for a fork) need to.
        self._endpoint = f"tcp://{address}:0;{endpoint.removeprefix('tcp://')}" if address else endpoint
        self._connected = False

    def connect(self) -> None:
        """Connect now; otherwise the first message does. Nothing is received before."""
        if not self._connected:
            self._connected = True
            self.dealer.connect(self._endpoint)

    def send(self, kind: Kind, frames: Sequence[Buffer] = (), **fields: Any) -> None:
        self.connect()
        header = {"kind": kind.value, "rank": self.rank, **fields}
        if len(frames) == 1 and len(frames[0]) < IN_BAND_BYTES:
            self.dealer.send(wire.pack(header | {"pickle": bytes(frames[0])}))
        else:
            self.dealer.send_multipart([wire.pack(header), *frames], copy=False)

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
