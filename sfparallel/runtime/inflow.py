"""How much of what has come to a ZeroMQ socket nobody has taken, by the address that it comes from.

A message of which the last frame never comes is kept by ZeroMQ as far as it is here, without a bound, and nobody hears of it. So
the bytes of each connection are counted by the kernel (tcp_info, linux/tcp.h), and those of the messages that were taken from it
are subtracted. What a rank of ours may have unread is known (`parts`); an address that has more sends what no rank sends.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios
import time
from collections import Counter
from collections.abc import Iterator

LOOK_S = 0.25
"""How often connections are looked at, while there are any. What comes meanwhile is not bounded, other than by the network."""

MOST_UNREAD_BYTES = 4 << 20
"""Of one address, beside what the kernel's socket holds. A rank has half of it there at most: `link.UNREAD` pieces. In memory it
may be 32 times as much: a frame of no bytes has 2 on the wire, and takes 64."""

_RECEIVED = struct.Struct("@Q")
_RECEIVED_AT = 128
"""Of `tcpi_bytes_received` in tcp_info: of data, without what was sent twice."""

_SHORT_BYTES = 255
"""ZMTP 3: a frame of up to so many bytes has a header of 2, others one of 9 (https://rfc.zeromq.org/spec/37/)."""


class Inflow:
    """Connections to one port of this process, which somebody else owns.

    Args:
        port: its number.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._lines: dict[tuple[str, int], int] = {}
        """Their descriptors, by the other end's address and port."""
        self._received: dict[tuple[str, int], int] = {}
        self._taken: Counter[str] = Counter()
        self._next_look = 0.0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def opened(self, peer: tuple[str, int], fd: int) -> None:
        """There is one more connection."""
        self._lines[peer] = fd
        self._received.pop(peer, None)

    def took(self, address: str, frame_bytes: int) -> None:
        """A frame that came from there is not in ZeroMQ's hands any more."""
        self._taken[address] += frame_bytes + (2 if frame_bytes <= _SHORT_BYTES else 9)

    def overfull(self) -> Iterator[tuple[str, int]]:
        """Addresses that have more unread than a rank may, once in `LOOK_S`, and how much. Their connections are cut off."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        unread: Counter[str] = Counter()
        for peer, fd in list(self._lines.items()):
            received = self._look(peer, fd)
            if received is None:
                del self._lines[peer]
            else:
                self._received[peer] = received
        open_ones = {address for address, _ in self._lines}
        for peer, received in list(self._received.items()):
            if peer[0] in open_ones:
                unread[peer[0]] += received
            else:
                # What its connections had sent is not known exactly, and is gone with them.
                del self._received[peer]
                self._taken.pop(peer[0], None)
        for address, count in unread.items():
            rest = count - self._taken[address]
            # Nobody may have sent less than was taken: a connection has gone that was not looked at in time.
            self._taken[address] += min(rest, 0)
            if rest > MOST_UNREAD_BYTES:
                self._cut(address)
                yield address, rest

    def _look(self, peer: tuple[str, int], fd: int) -> int | None:
        """How many bytes ZeroMQ has had of a connection; None if it is gone. By now the descriptor may be another one's."""
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
        except OSError:
            return None
        try:
            if sock.getpeername() != peer or sock.getsockname()[1] != self._port:
                return None
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + _RECEIVED.size)
            waiting = array.array("i", [0])
            fcntl.ioctl(fd, termios.FIONREAD, waiting)
            return max(0, int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) - waiting[0])
        except (OSError, struct.error):
            return None
        finally:
            sock.detach()  # it is ZeroMQ's

    def _cut(self, address: str) -> None:
        for peer, fd in list(self._lines.items()):
            if peer[0] == address and self._look(peer, fd) is not None:
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
                try:
                    # ZeroMQ finds the end of the stream, drops what it has of a message, and closes: with a reset, so that the
                    # other end knows at once.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended by itself
                finally:
                    sock.detach()
                del self._lines[peer]
