"""Netlink, as far as the clone network needs it: messages with attributes, sent in batches, each one acknowledged.

Not pyroute2: its synchronous calls refuse to run inside an asyncio event loop, a message costs 0.4 to 0.6 ms (here 0.02 to
0.1, nearly all of it the kernel's), and its import 0.35 s of every start (measured with 0.9.7).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from sfparallel.errors import NetworkError

# <linux/netlink.h>
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_ACK_TLVS = 0x200
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NLMSGERR_ATTR_MSG = 1
_NESTED = 0x8000
_KIND_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port id
_ATTRIBUTE = struct.Struct("=HH")  # length, type
# A batch's acknowledgements must fit in the socket's receive buffer (212,992 bytes by default, about 800 are charged for each).
_BATCH = 128


@dataclass(frozen=True)
class Message:
    """One request.

    Attributes:
        kind: RTM_* or NFT_MSG_* with its subsystem.
        flags: NLM_F_*, beyond NLM_F_REQUEST.
        body: family header and attributes.
        what: what it does, for the error message.
    """

    kind: int
    flags: int
    body: bytes
    what: str


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, bytes([value]))


def u16(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=H", value))


def u32(kind: int, value: int) -> bytes:
    """A 32-bit number in host order (rtnetlink)."""
    return attribute(kind, struct.pack("=I", value))


def be32(kind: int, value: int) -> bytes:
    """A 32-bit number in network order (nfnetlink)."""
    return attribute(kind, struct.pack(">i" if value < 0 else ">I", value))


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(attributes))


def parse_attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes (type without flags, payload) in a message's body or in a nested attribute."""
    at = 0
    while at + 4 <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < 4 or at + length > len(body):
            raise NetworkError("the kernel sent a malformed netlink attribute")
        yield kind & _KIND_MASK, body[at + 4 : at + length]
        at += (length + 3) & ~3


def _parse_messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and body of each message in a datagram."""
    at = 0
    while at + 16 <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < 16 or at + length > len(data):
            raise NetworkError("the kernel sent a malformed netlink message")
        yield kind, flags, sequence, data[at + 16 : at + length]
        at += (length + 3) & ~3


class NetlinkSocket:
    """A netlink socket. It belongs for good to the network namespace in which the calling thread is when it is made."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def transact(self, messages: Sequence[Message], *, tolerate: Collection[int] = ()) -> None:
        """Has every message carried out, in order; what does not ask for an acknowledgement gets none.

        Args:
            messages: independent requests, or one nf_tables transaction (at most 128 messages then).
            tolerate: errno values that count as success.

        Raises:
            NetworkError: the kernel refused one; the message names it, its cause is the `OSError`.
        """
        for start in range(0, len(messages), _BATCH):
            self._transact(messages[start : start + _BATCH], tolerate)

    def _transact(self, messages: Sequence[Message], tolerate: Collection[int]) -> None:
        names: dict[int, str] = {}
        awaited: set[int] = set()
        parts = []
        for message in messages:
            sequence = self._next()
            names[sequence] = message.what
            if message.flags & NLM_F_ACK:
                awaited.add(sequence)
            flags = message.flags | NLM_F_REQUEST
            parts.append(_HEADER.pack(16 + len(message.body), message.kind, flags, sequence, 0) + message.body)
        self._socket.send(b"".join(parts))
        first: NetworkError | None = None
        # The kernel has done the work, and queued every acknowledgement, by the time that send returns.
        for kind, flags, sequence, body in self._received(socket.MSG_DONTWAIT):
            if kind != _NLMSG_ERROR or sequence not in names:
                continue
            awaited.discard(sequence)
            code = -struct.unpack_from("=i", body)[0]
            if code and code not in tolerate and first is None:
                first = _refusal(names[sequence], code, body, flags)
        if first is not None:
            raise first
        if awaited:
            raise NetworkError(f"the kernel did not acknowledge: {names[min(awaited)]}")

    def dump(self, message: Message) -> list[bytes]:
        """The bodies of the kernel's answers to a request for a list."""
        sequence = self._next()
        flags = message.flags | NLM_F_REQUEST | NLM_F_DUMP
        self._socket.send(_HEADER.pack(16 + len(message.body), message.kind, flags, sequence, 0) + message.body)
        bodies = []
        for kind, answer_flags, answered, body in self._received(0):
            if answered != sequence:
                continue
            if kind == _NLMSG_DONE:
                break
            if kind == _NLMSG_ERROR:
                raise _refusal(message.what, -struct.unpack_from("=i", body)[0], body, answer_flags)
            bodies.append(body)
        return bodies

    def _next(self) -> int:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        return self._sequence

    def _received(self, flags: int) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            try:
                data = self._socket.recv(1 << 17, flags)
            except BlockingIOError:
                return
            yield from _parse_messages(data)


def _refusal(what: str, code: int, body: bytes, flags: int) -> NetworkError:
    """The kernel's refusal in words: the error number, and the sentence that newer code paths add to it."""
    detail = os.strerror(code)
    if flags & _NLM_F_ACK_TLVS:
        # After the error code (4 bytes) and the header of the refused message (16; its body is left out: NETLINK_CAP_ACK).
        for kind, payload in parse_attributes(body[20:]):
            if kind == _NLMSGERR_ATTR_MSG:
                detail += f" ({payload.rstrip(bytes(1)).decode(errors='replace')})"
    hint = "`sf doctor` says which permission is missing" if code in (errno.EPERM, errno.EACCES) else None
    error = NetworkError(f"could not {what}: {detail}", hint=hint)
    error.__cause__ = OSError(code, os.strerror(code))
    return error
