"""Moves an engine's messages over TCP connections between ranks. No thread: bytes move while somebody is inside an MPI call.

Each rank listens on one port of its own address; a connection is made when the first message goes to a peer, and used in both
directions. When two ranks call each other at the same time there are two connections: each side then keeps sending on the one
that it had first, so that nothing overtakes anything. The first thing on a new connection is HELLO with the caller's rank, which
is believed only if the connection comes from that rank's address (the clone network lets nobody send from another's).

Why not ZeroMQ: it hands each message to a thread and back, which on the one processor of a clone are two context switches more
(see ARCHITECTURE.md, "Deviations").
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from sfparallel.errors import ProtocolError
from sfparallel.runtime.mpi.matching import DATA, EAGER, HEADER, RTS, Buffer, Engine, SendOp
from sfparallel.runtime.strangers import Strangers

HELLO = 255
BYE = 254
"""What a rank says when it will not send any more: everything before it has arrived."""

BUFFER_BYTES = 256 << 10
SMALL_BYTES = 16 << 10
"""Up to here one copy costs less than a scattered write."""

RETRY_S = 0.02
"""A peer may not listen yet when it is called first."""

WHOLE_BYTES = 1 << 20
"""Messages that are taken as a whole are shorter: all but DATA, which has a place to go to."""

MOST_CALLS = 8
"""Connections that one address may have made at a time. A rank makes one, and another one if it has lost that."""

MOST_QUEUED = 1 << 16
"""Messages of the engine's own that wait for a peer which does not read."""

IOV_MAX = 512
_SO_BUSY_POLL = 46
DONTWAIT = socket.MSG_DONTWAIT
BUSY_POLL_US = 2000
"""How long `hear` has the kernel look out for a message by itself before it sleeps (socket(7), SO_BUSY_POLL): no interrupt, and
fewer steps from the network card to here."""

HEAR_S = 0.001
"""How long `hear` sleeps after that; the kernel rounds it up to its tick (SO_RCVTIMEO)."""

HEADER_BYTES = HEADER.size


class Line:
    """One TCP connection.

    Attributes:
        peer: who is at the other end; -1 until it has said so.
        writing: there is more to send than the socket takes.
    """

    __slots__ = ("_fill", "_landing", "_landing_at", "_number", "_transport", "caller", "connecting", "peer", "queue", "sock",
                 "writing")

    def __init__(self, transport: Transport, sock: socket.socket, peer: int, connecting: bool) -> None:
        self._transport = transport
        self.sock = sock
        self.peer = peer
        self.caller = ""
        """Whose call it is: its address; empty for a call of ours."""
        self.connecting = connecting
        self.queue: deque[tuple[list[memoryview], SendOp | None]] = deque()
        self._fill = bytearray()
        self._landing: memoryview | None = None
        self._landing_at = 0
        self._number = 0
        self.writing = False

    def write(self, header: bytes, frames: Sequence[Buffer], op: SendOp | None) -> None:
        """Send now what the socket takes, and the rest when it takes more."""
        if not self.connecting and not self.queue:
            try:
                if len(frames) == 1 and len(frames[0]) <= SMALL_BYTES:
                    whole = header + frames[0]
                    total = len(whole)
                    sent = self.sock.send(whole, DONTWAIT)
                else:
                    total = HEADER_BYTES + sum(map(len, frames))
                    sent = self.sock.sendmsg((header, *frames[:IOV_MAX]), (), DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                # Kept: it fails when the peer counts as lost.
                self.queue.append((_rest([header, *frames], 0), op))
                self._transport.broken(self, error)
                return
            except BaseException:
                self._transport.broken(self, None)
                raise
            if sent == total:
                if op is not None:
                    op.on_the_way()
                return
            self.queue.append((_rest([header, *frames], sent), op))
        else:
            self.queue.append((_rest([header, *frames], 0), op))
            if op is None and len(self.queue) > MOST_QUEUED:
                self._transport.wrong(self, "requests without end, and does not read the answers")
                return
        self._want_to_write(not self.connecting)

    def flush(self) -> None:
        """Write what the socket takes."""
        queue = self.queue
        while queue:
            views, op = queue[0]
            try:
                sent = self.sock.sendmsg(views[:IOV_MAX], (), DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self._transport.broken(self, error)
                return
            except BaseException:
                self._transport.broken(self, None)
                raise
            rest = _rest(views, sent)
            if rest:
                queue[0] = (rest, op)
            else:
                queue.popleft()
                if op is not None:
                    op.on_the_way()
        self._want_to_write(False)

    def read(self) -> None:
        """Take what the socket has."""
        transport = self._transport
        transport.heard[self.peer] = self
        try:
            if self._landing is not None:
                self._read_landing(self._landing)
                return
            if self._fill:
                chunk = self.sock.recv(BUFFER_BYTES, DONTWAIT)
                self._fill += chunk
                if chunk:
                    used = self._parse(memoryview(self._fill))
                    self._fill = self._fill[used:]
                count = len(chunk)
            else:
                count = self.sock.recv_into(transport.buffer, 0, DONTWAIT)
                if count:
                    view = transport.view[:count]
                    used = self._parse(view)
                    if used < count:
                        self._fill = bytearray(view[used:])
        except BlockingIOError:
            return
        except OSError as error:
            transport.broken(self, error)
            return
        except ProtocolError as error:
            transport.wrong(self, str(error))
            return
        except BaseException:  # a signal's handler: nobody knows how much has been taken
            transport.broken(self, None)
            raise
        if not count:
            transport.broken(self, None)

    def _read_landing(self, landing: memoryview) -> None:
        # Several times: data that is read at once leaves its place in the socket's buffer to what comes next.
        for _ in range(8):
            count = self.sock.recv_into(landing[self._landing_at:], 0, DONTWAIT)
            if not count:
                self._transport.broken(self, None)
                return
            self._landing_at += count
            if self._landing_at == len(landing):
                self._landing = None
                self._transport.engine.on_data(self.peer, self._number)
                return

    def _parse(self, view: memoryview) -> int:
        """Hand over the messages in `view`; how many bytes were used."""
        at, end = 0, len(view)
        engine = self._transport.engine
        while end - at >= HEADER_BYTES:
            kind, flags, _, tag, ctx, number, credit, nbytes = HEADER.unpack_from(view, at)
            start = at + HEADER_BYTES
            if self.peer < 0 and (kind != HELLO or nbytes):
                self._transport.refuse(self, "a connection does not identify its rank")
                return end
            if kind == DATA and self.peer >= 0:
                landing = engine.landing(self.peer, number, nbytes)
                here = min(end - start, nbytes)
                landing[:here] = view[start:start + here]
                at = start + here
                if here == nbytes:
                    engine.on_data(self.peer, number)
                else:
                    self._landing, self._landing_at, self._number = landing, here, number
            elif kind == RTS and self.peer >= 0:
                engine.on_rts(self.peer, flags, tag, ctx, number, credit, nbytes)
                at = start
            else:
                if nbytes > WHOLE_BYTES:
                    raise ProtocolError(f"a message {kind} of {nbytes} bytes")
                at = start + nbytes
                if at > end:
                    return start - HEADER_BYTES
                if kind == EAGER and self.peer >= 0:
                    engine.on_eager(self.peer, flags, tag, ctx, number, credit, view[start:at])
                    continue
                if kind < BYE:
                    engine.on_header(self.peer, kind, flags, tag, ctx, number, credit, view[start:at])
                elif not self._transport.on_line_message(self, kind, number):
                    return end
        return at

    def _want_to_write(self, wanted: bool) -> None:
        if wanted != self.writing:
            self.writing = wanted
            self._transport.writers += 1 if wanted else -1
            self._transport.epoll.modify(self.sock, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))


def _wait_for_long(sock: socket.socket) -> None:
    """Let calls without DONTWAIT wait, as `Transport.hear` wants it."""
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(HEAR_S * 1e6)))
    with contextlib.suppress(OSError):  # only root may ask for more than the host's administrator allows
        sock.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, BUSY_POLL_US)


def _rest(frames: Sequence[Buffer], sent: int) -> list[memoryview]:
    """Views of what is left of `frames` after `sent` bytes."""
    rest = []
    for frame in frames:
        size = len(frame)
        if sent >= size:
            sent -= size
        else:
            rest.append(memoryview(frame)[sent:])
            sent = 0
    return rest


class Transport:
    """All connections of one rank. `step` moves bytes.

    Args:
        rank: this process.
        addresses: of all ranks.
        port: where each rank listens on its address.
        listener: a socket that listens there already, if there is one.
        on_closed: called with a rank whose connection has ended, whether it had said BYE, and why it was ended here, if it was.
    """

    def __init__(self, rank: int, addresses: Sequence[str], port: int, on_closed: Callable[[int, bool, str], None],
                 listener: socket.socket | None = None) -> None:
        self.rank = rank
        self.epoll = select.epoll()
        self.buffer = bytearray(BUFFER_BYTES)
        self.view = memoryview(self.buffer)
        self.engine: Engine
        self._addresses = addresses
        self._known = frozenset(addresses)
        self._port = port
        self._on_closed = on_closed
        self._lines: dict[int, Line] = {}
        self.out: dict[int, Line] = {}
        """On which to send, by peer."""
        self.heard: dict[int, Line] = {}
        """On which something has come last, by peer."""
        self.writers = 0
        """Lines that wait until they can write."""
        self._waiting: dict[int, deque[tuple[list[memoryview], SendOp | None]]] = {}
        """For peers that do not listen yet."""
        self._retry: dict[int, float] = {}
        self._calls: Counter[str] = Counter()
        """Connections that others have made, by address."""
        self._strangers = Strangers("connection of another rank's port")
        self._left: set[int] = set()
        self._gone: set[int] = set()
        self._watched: dict[int, Callable[[], None]] = {}
        self._listener = listener or self._listen()
        self._listener.setblocking(False)
        self.watch(self._listener.fileno(), self._accept)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` in `step` when `fd` is readable."""
        self._watched[fd] = callback
        self.epoll.register(fd, select.EPOLLIN)

    def push(self, peer: int, header: bytes, frames: Sequence[Buffer], op: SendOp | None) -> None:
        """Send to a peer (see `matching.Wire`)."""
        line = self.out.get(peer)
        if line is not None:
            line.write(header, frames, op)
        elif peer in self._gone:
            return  # what the engine itself says to a peer; it knows of the loss, and pushes no more of the program's messages
        elif peer in self._waiting:
            self._waiting[peer].append((_rest([header, *frames], 0), op))
        else:
            self._waiting[peer] = deque([(_rest([header, *frames], 0), op)])
            self._connect(peer)

    def step(self, timeout_s: float | None) -> None:
        """Wait until something can be moved, at most `timeout_s`, and move it."""
        self.handle(self.wait(timeout_s))

    def wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Wait for events; the only part of `step` that blocks and touches nothing."""
        if self._retry:
            pause = max(0.0, min(self._retry.values()) - time.monotonic())
            timeout_s = pause if timeout_s is None else min(timeout_s, pause)
        return self.epoll.poll(timeout_s)

    def hear(self, peer: int) -> bool:
        """Wait some milliseconds at most for what one peer sends, and take it, unless something else has to be done meanwhile.

        The caller knows that no other thread needs this transport.

        Returns:
            False if nothing came in that time.
        """
        line = self.heard.get(peer)
        if line is None or self.writers or self._retry:
            return True
        try:
            # Only a look: were the message taken, nobody would know of it when a signal's handler raises here.
            line.sock.recv_into(self.buffer, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass  # `read` meets it, too
        line.read()
        return True

    def handle(self, events: list[tuple[int, int]]) -> None:
        """Move what can be moved."""
        for fd, event in events:
            line = self._lines.get(fd)
            if line is None:
                watcher = self._watched.get(fd)
                if watcher is not None:
                    watcher()
            elif line.connecting:
                self._connected(line)
            else:
                if event & select.EPOLLOUT:
                    line.flush()
                if event & ~select.EPOLLOUT and line.sock.fileno() >= 0:
                    line.read()
        if self._retry:
            now = time.monotonic()
            for peer in [peer for peer, when in self._retry.items() if when <= now]:
                del self._retry[peer]
                self._connect(peer)

    @property
    def retries(self) -> bool:
        """Whether some peer shall be called again."""
        return bool(self._retry)

    @property
    def is_flushed(self) -> bool:
        """Whether everything is on its way, messages to peers that do not listen yet included."""
        return (not any(line.queue for line in self.out.values())
                and not any(op is not None for queue in self._waiting.values() for _, op in queue))

    def forget(self, peer: int, error: BaseException) -> None:
        """Drop what would go to a lost peer."""
        self._gone.add(peer)
        self._retry.pop(peer, None)
        for queue in (self._waiting.pop(peer, deque()), self.out[peer].queue if peer in self.out else deque()):
            for _, op in queue:
                if op is not None:
                    op.fail(error)
            queue.clear()

    def say_bye(self) -> None:
        """Tell all who are connected, or have called, that nothing more comes from here; others are refused from now on."""
        if self._listener.fileno() >= 0:
            self._accept()
            del self._watched[self._listener.fileno()]
            self.epoll.unregister(self._listener)
            self._listener.close()
        goodbye = HEADER.pack(BYE, 0, 0, 0, 0, self.rank, 0, 0)
        for line in [*self.out.values(), *(line for line in self._lines.values() if line.peer < 0)]:
            line.write(goodbye, (), None)

    def close(self) -> None:
        self._listener.close()
        for line in self._lines.values():
            line.sock.close()
        self.epoll.close()

    # Connections

    def _listen(self) -> socket.socket:
        listener = socket.socket()
        # Connections of an earlier region may still be in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._addresses[self.rank], self._port))
        listener.listen(1024)
        return listener

    def _accept(self) -> None:
        while True:
            try:
                sock, (address, _) = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            # Before anything is kept of it: who makes thousands of connections shall not use up this process's descriptors.
            if address not in self._known or self._calls[address] >= MOST_CALLS:
                sock.close()
                self._strangers.note(f"it comes from {address}")
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _wait_for_long(sock)
            line = Line(self, sock, -1, connecting=False)
            line.caller = address
            self._calls[address] += 1
            self._add(line)

    def _add(self, line: Line) -> None:
        self._lines[line.sock.fileno()] = line
        self.epoll.register(line.sock, select.EPOLLOUT | select.EPOLLIN if line.connecting else select.EPOLLIN)

    def _connect(self, peer: int) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The port is chosen by connect(2), which knows the other end (IP_BIND_ADDRESS_NO_PORT, ip(7)).
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)
        sock.bind((self._addresses[self.rank], 0))
        line = Line(self, sock, peer, connecting=True)
        self._add(line)
        error = sock.connect_ex((self._addresses[peer], self._port))
        if error not in (0, errno.EINPROGRESS):
            self._not_connected(line)

    def _connected(self, line: Line) -> None:
        error = line.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._not_connected(line)
            return
        line.connecting = False
        _wait_for_long(line.sock)
        self.epoll.modify(line.sock, select.EPOLLIN)
        line.write(HEADER.pack(HELLO, 0, 0, 0, 0, self.rank, 0, 0), (), None)
        self._use(line)

    def _not_connected(self, line: Line) -> None:
        self._drop(line)
        if line.peer in self._waiting:
            self._retry[line.peer] = time.monotonic() + RETRY_S

    def _use(self, line: Line) -> None:
        """Send to this peer on this line from now on, unless there is one already."""
        if line.peer in self.out:
            return
        self.out[line.peer] = line
        self._retry.pop(line.peer, None)
        waiting = self._waiting.pop(line.peer, None)
        if waiting:
            line.queue.extend(waiting)
            line.flush()
            if line.queue and line.sock.fileno() >= 0:
                line._want_to_write(True)

    def on_line_message(self, line: Line, kind: int, number: int) -> bool:
        """HELLO or BYE; False if the line is closed now."""
        if kind == BYE:
            self._left.add(line.peer)
            self._on_closed(line.peer, True, "")
            return True
        if line.peer >= 0:
            raise ProtocolError("its rank twice")
        try:
            address = line.sock.getpeername()[0]
        except OSError:
            address = "a connection that is gone"
        if number >= len(self._addresses) or number == self.rank or address != self._addresses[number]:
            self.refuse(line, f"{address} claims to be rank {number}")
            return False
        if number in self._gone:
            self._drop(line)  # it has been told that it counts as lost, by the end of its other connections
            return False
        line.peer = number
        self._use(line)
        return True

    def refuse(self, line: Line, why: str) -> None:
        """Hang up on somebody who is not a rank."""
        self._strangers.note(why)
        self._drop(line)

    def wrong(self, line: Line, why: str) -> None:
        """A peer has sent what no rank sends: nothing more is taken from it, and it counts as lost."""
        peer = line.peer
        if peer < 0:
            self.refuse(line, f"it sends {why}")
            return
        for each in [line, *(each for each in self._lines.values() if each.peer == peer)]:
            self._drop(each)
        if self.out.pop(peer, None) is not None:
            self._waiting.setdefault(peer, deque())  # so that nothing calls it again
        self._on_closed(peer, False, f"sent {why}")

    def knows(self, peer: int) -> bool:
        """Whether there is a connection with this peer."""
        return peer in self.out or any(line.peer == peer and not line.connecting for line in self._lines.values())

    def broken(self, line: Line, error: OSError | None) -> None:
        """A connection has ended."""
        self._drop(line)
        if line.peer >= 0:
            if self.out.get(line.peer) is line:
                # The queue stays: its operations fail when the peer counts as lost.
                self._waiting.setdefault(line.peer, deque()).extend(line.queue)
                del self.out[line.peer]
            self._on_closed(line.peer, line.peer in self._left, "")

    def _drop(self, line: Line) -> None:
        fd = line.sock.fileno()
        if self.heard.get(line.peer) is line:
            del self.heard[line.peer]
        if fd >= 0:
            self.writers -= line.writing
            line.writing = False
            with contextlib.suppress(OSError):
                self.epoll.unregister(fd)
            self._lines.pop(fd, None)
            line.sock.close()
            if line.caller:
                self._calls[line.caller] -= 1
