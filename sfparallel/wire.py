"""What travels between supervisor, guest agent and user programs: frames and messages, without any I/O.

The agent port is a byte stream of frames: a header of 8 bytes (little endian: u32 payload length, u16 type, u16 channel) and
the payload. Messages inside frames, and on the guest's local socket, are msgpack maps (https://msgpack.org/).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from sfparallel.errors import ProtocolError

HEADER = struct.Struct("<IHH")
MAX_PAYLOAD_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 128 << 10
"""Largest message on the guest's local SEQPACKET socket."""

AGENT_SOCKET = "/run/sfparallel/agent.sock"
"""Where programs in a guest reach the agent."""


class FrameType(enum.IntEnum):
    """Types of frames on the agent port; below 32 they go from guest to host."""

    FROZEN = 1
    WOKEN = 2
    FAILED = 3
    REQUEST = 4
    GONE = 5
    OUTPUT = 6
    FUSE = 7
    EXITED = 8
    TAKEN = 9
    MODES = 10
    FREEZE = 32
    THAW = 33
    REPLY = 34
    STDIN = 35
    FUSE_REPLY = 36
    SIGNAL = 37
    RUN = 38
    CLOSE = 39
    TERMINAL = 40
    CLOCK = 41


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of the agent port."""

    type: FrameType
    payload: bytes = b""
    channel: int = 0

    def encode(self) -> bytes:
        if len(self.payload) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"frame {self.type.name} of {len(self.payload)} bytes is larger than {MAX_PAYLOAD_BYTES}")
        return HEADER.pack(len(self.payload), self.type, self.channel) + self.payload


class FrameParser:
    """Turns a byte stream into frames; feed it pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that `data` completes.

        Raises:
            ProtocolError: a header that no correct peer sends; the stream is unusable.
        """
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            length, number, channel = HEADER.unpack_from(self._buffer)
            if length > MAX_PAYLOAD_BYTES:
                raise ProtocolError(f"frame of {length} bytes announced; at most {MAX_PAYLOAD_BYTES} are allowed")
            try:
                kind = FrameType(number)
            except ValueError:
                raise ProtocolError(f"unknown frame type {number}") from None
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size:end])
            del self._buffer[:end]
            yield Frame(kind, payload, channel)


def pack(message: dict[str, Any]) -> bytes:
    """Encode a message as msgpack."""
    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def pack_names(message: dict[str, Any]) -> bytes:
    """Encode a message to a guest that has names of files, arguments or variables in it: those need not be UTF-8 (PEP 383)."""
    packed: bytes = msgpack.packb(message, use_bin_type=True, unicode_errors="surrogateescape")
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Decode a message.

    Raises:
        ProtocolError: not a msgpack map.
    """
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.exceptions.UnpackException) as error:
        # TypeError: a key that is a list or a map. The text may hold what was sent: as much of it as a message can bear.
        raise ProtocolError(f"undecodable message of {len(data)} bytes: {str(error)[:200]}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a message must be a map, not {type(message).__name__}")
    return message
