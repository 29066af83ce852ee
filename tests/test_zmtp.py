"""What anybody may send to a region's socket: greetings, commands and frames of ZeroMQ's protocol, torn off anywhere."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.runtime.link import ParentLink
from tests.test_clone_messages import ADDRESS, GREETING_3, RANK, good_from_rank_0, raw

READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
GENEROUS_BYTES = 256 << 20
"""Of growth: a frame that announces much does not take it."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


signatures = st.sampled_from([b"\xff" + bytes(8) + b"\x7f", b"\xff" + bytes(7) + b"\x01\x7f", b"\x01\x00", b"\xff" * 10])
versions = st.sampled_from([b"\x03\x00", b"\x03\x01", b"\x02\x05", b"\x01", b"\x00", b"\x09\x09"])
mechanisms = st.sampled_from([b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b""]) | st.binary(max_size=20)
greetings = st.builds(lambda signature, version, mechanism, end: signature + version + mechanism.ljust(20, b"\0") + end,
                      signatures | st.binary(max_size=10), versions | st.binary(max_size=2), mechanisms,
                      st.sampled_from([bytes(32), b"\x01" + bytes(31), b""]))
names = st.sampled_from([b"READY", b"ERROR", b"PING", b"PONG", b"HELLO", b"SUBSCRIBE", b""])
keys = st.sampled_from([b"Socket-Type", b"Identity", b"Resource", b"X", b""])
values = st.sampled_from([b"DEALER", b"ROUTER", b"REQ", b"PUB", b"", b"\0\0\0\0\1"]) | st.binary(max_size=300)


def command(name: bytes, properties: list[tuple[bytes, bytes]]) -> bytes:
    return bytes([len(name)]) + name + b"".join(bytes([len(key)]) + key + struct.pack(">I", len(value)) + value
                                                for key, value in properties)


def frame(flags: int, body: bytes, claimed: int) -> bytes:
    if claimed or len(body) > 255:
        return bytes([flags | 2]) + struct.pack(">Q", claimed or len(body)) + body
    return bytes([flags & ~2, len(body)]) + body


bodies = st.builds(command, names, st.lists(st.tuples(keys, values), max_size=4)) | st.binary(max_size=40)
frames = st.builds(frame, st.sampled_from([0, 1, 4, 6, 7]) | st.integers(0, 255), bodies,
                   st.sampled_from([0, 0, 0, 1 << 31, 1 << 40, (1 << 63) + 1, (1 << 64) - 1]))
streams = st.builds(lambda head, rest: head + b"".join(rest), st.just(GREETING_3 + READY) | st.just(GREETING_3) | greetings,
                    st.lists(frames | st.binary(max_size=30), max_size=5))


@pytest.fixture(name="talked_to", scope="module")
def talked_to_fixture() -> Iterator[ParentLink]:
    link = ParentLink("127.0.0.1")
    link.expect(["127.2.0.0", "127.2.0.1", "127.2.0.2", ADDRESS])
    yield link
    link.close()


def test_any_bytes_at_the_gather_socket(talked_to: ParentLink) -> None:
    """Real sockets, real ZeroMQ: greetings, commands and frames of all versions, torn off anywhere."""
    link = talked_to
    poller = zmq.Poller()
    link.watch(poller)

    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(streams, st.sampled_from([ADDRESS, "127.9.9.9"]), st.booleans())
    def check(stream: bytes, source: str, hangs_up: bool) -> None:
        link._called.clear()
        sock = raw(link, source)
        try:
            with contextlib.suppress(OSError):  # it may be hung up on
                sock.sendall(stream)
                if hangs_up:
                    sock.shutdown(socket.SHUT_WR)
            for each in link.take():
                assert each.rank == RANK
        finally:
            sock.close()

    before = resident_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
        good_from_rank_0(link)
    assert resident_bytes() - before < GENEROUS_BYTES
