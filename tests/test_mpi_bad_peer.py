"""What a rank may send to another one: anything. It then counts as lost there, and nobody else's messages suffer."""

from __future__ import annotations

import contextlib
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfparallel import wire
from sfparallel.runtime.mpi.constants import ANY_TAG
from sfparallel.runtime.mpi.endpoint import ASK, REVOKE, TOOK_PART, Endpoint
from sfparallel.runtime.mpi.errors import MPIException, PeerLost
from sfparallel.runtime.mpi.matching import ACK, CREDIT, CTS, DATA, EAGER, HEADER, RTS, RecvOp
from sfparallel.runtime.mpi.operations import SYNC
from sfparallel.runtime.mpi.pickling import PARTS, pickle
from sfparallel.runtime.mpi.transport import BYE, HELLO, MOST_CALLS
from sfparallel.runtime.region import free_port
from tests.conftest import HANG_S

ADDRESSES = [f"127.3.0.{rank}" for rank in range(1, 4)]
ME, GOOD, BAD = range(3)
CTX = 8


def header(kind: int, flags: int = 0, tag: int = 0, ctx: int = CTX, number: int = 0, credit: int = 0, nbytes: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, tag, ctx, number, credit, nbytes)


class Peer:
    """A rank that writes its bytes by hand."""

    def __init__(self, rank: int, port: int) -> None:
        self.sock = socket.create_connection((ADDRESSES[ME], port), source_address=(ADDRESSES[rank], 0))
        self.send(header(HELLO, number=rank))

    def send(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))


class Rig:
    """An endpoint of three, and the two others."""

    def __init__(self) -> None:
        self.port = free_port(ADDRESSES[ME])
        self.endpoint = Endpoint(ME, ADDRESSES, self.port)
        self.endpoint.poll()
        self.good, self.bad = Peer(GOOD, self.port), Peer(BAD, self.port)
        transport = self.endpoint._transport
        assert transport is not None
        self.transport = transport
        self.until(lambda: transport.knows(GOOD) and transport.knows(BAD))

    def until(self, condition: Callable[[], bool], limit_s: float = HANG_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, "what was waited for has not come"
            self.endpoint.poll()

    def recv(self, source: int, buffer: memoryview | None = None) -> RecvOp:
        with self.endpoint.lock:
            return self.endpoint.engine.recv(CTX, source, ANY_TAG, buffer)

    def send(self, dest: int, size: int, flags: int = 0) -> Any:
        with self.endpoint.lock:
            return self.endpoint.engine.send(dest, CTX, 0, [bytes(size)], size, flags)

    def good_is_heard(self) -> None:
        op = self.recv(GOOD)
        self.good.send(header(EAGER, nbytes=5), b"hello")
        self.until(lambda: op.done)
        assert op.error is None
        assert bytes(op.payload) == b"hello"

    def bad_is_lost(self, says: str = "") -> None:
        op = self.recv(BAD)
        self.until(lambda: op.done)
        assert isinstance(op.error, PeerLost)
        assert op.error.rank == BAD
        assert f"rank {BAD} sent" in str(op.error)
        assert says in str(op.error)

    def close(self) -> None:
        self.endpoint.close()
        for peer in (self.good, self.bad):
            peer.sock.close()


@pytest.fixture(name="rig")
def rig_fixture() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.mark.parametrize(("data", "says"), [
    (header(7), "unknown kind 7"), (header(99), "unknown kind 99"), (header(EAGER, nbytes=1 << 60), f"of {1 << 60} bytes"),
    (header(DATA, number=5, nbytes=1 << 62), "not requested"), (header(DATA, number=5, nbytes=3) + b"abc", "not requested"),
    (header(CTS, nbytes=1 << 40), "bytes"), (header(HELLO, number=BAD), "its rank twice"), (header(RTS, number=1) * 2, "twice"),
    (header(REVOKE, nbytes=1) + b"\xc1", "undecodable"), (header(REVOKE), "undecodable"),
    *((header(REVOKE, nbytes=len(order)) + order, "the revocation") for order in map(wire.pack, (
        {}, {"contexts": [], "members": [BAD]}, {"contexts": [1], "members": [ME]}, {"contexts": ["x"], "members": [BAD]},
        {"contexts": [1], "members": [BAD, 1 << 40]}, {"contexts": 1, "members": [BAD]}, {"contexts": [1], "members": {}}))),
], ids=lambda each: each if isinstance(each, str) else each[:2].hex())  # fmt: skip
def test_what_no_rank_sends(rig: Rig, data: bytes, says: str) -> None:
    rig.bad.send(data)
    rig.bad_is_lost(says)
    rig.good_is_heard()
    again = Peer(BAD, rig.port)
    again.send(header(EAGER, nbytes=1), b"x")
    rig.good_is_heard()
    again.sock.close()


def test_a_rank_does_not_get_what_goes_to_another(rig: Rig) -> None:
    large, sync = rig.send(GOOD, 100_000), rig.send(GOOD, 3, SYNC)
    rig.bad.send(header(CTS, number=1))
    rig.bad_is_lost("another rank's message")
    assert not large.done
    assert not sync.done


def test_nor_does_it_acknowledge_that(rig: Rig) -> None:
    sync = rig.send(GOOD, 3, SYNC)
    rig.bad.send(header(ACK, number=1))
    rig.bad_is_lost("another rank's message")
    assert not sync.done


def test_a_length_that_was_not_announced(rig: Rig) -> None:
    op = rig.recv(BAD)
    rig.bad.send(header(RTS, number=9, nbytes=100_000))
    rig.until(lambda: op.matched)
    rig.bad.send(header(DATA, number=9, nbytes=200_000))
    rig.bad_is_lost("not requested")
    assert isinstance(op.error, PeerLost)


def test_an_announcement_of_what_no_memory_holds(rig: Rig) -> None:
    op = rig.recv(BAD)
    rig.bad.send(header(RTS, number=9, nbytes=1 << 60))
    rig.until(lambda: op.matched)
    rig.bad.send(header(DATA, number=9, nbytes=1 << 60))
    rig.bad_is_lost("no memory")


def test_messages_without_end_that_nobody_receives(rig: Rig) -> None:
    rig.endpoint.engine.most_held_bytes = 1 << 20  # else it takes a while
    message = header(EAGER, ctx=77, nbytes=60_000) + bytes(60_000)
    with contextlib.suppress(ConnectionError):  # it is hung up on
        for _ in range(20):
            rig.bad.send(message)
            rig.endpoint.poll()
    rig.bad_is_lost("far more messages")
    rig.good_is_heard()


def test_what_is_received_does_not_count(rig: Rig) -> None:
    rig.endpoint.engine.most_held_bytes = 1 << 20
    for _ in range(40):
        rig.good.send(header(EAGER, nbytes=60_000), bytes(60_000))
        rig.until(lambda: rig.endpoint.engine.probe(CTX, GOOD, ANY_TAG) is not None)
        assert rig.recv(GOOD).done


def test_calls_of_somebody_who_does_not_belong_here(rig: Rig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source, data in (("127.3.9.9", header(HELLO, number=GOOD)), (ADDRESSES[BAD], header(HELLO, number=GOOD)),
                             (ADDRESSES[BAD], header(HELLO, number=1000)), (ADDRESSES[BAD], header(EAGER, nbytes=1 << 60)),
                             (ADDRESSES[BAD], header(BYE)), (ADDRESSES[ME], header(HELLO, number=ME)),
                             (ADDRESSES[BAD], header(HELLO, number=BAD, nbytes=1 << 50)),
                             (ADDRESSES[BAD], b"GET / HTTP/1.1\r\n" * 9)):
            with socket.create_connection((ADDRESSES[ME], rig.port), source_address=(source, 0)) as sock:
                sock.sendall(data)
                rig.good_is_heard()
    assert not rig.endpoint.engine.dead


def test_thousands_of_connections_of_one_rank(rig: Rig) -> None:
    """They would use up this process's descriptors."""
    socks = [socket.create_connection((ADDRESSES[ME], rig.port), source_address=(ADDRESSES[BAD], 0)) for _ in range(300)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rig.good_is_heard()
    assert len(rig.transport._lines) <= 2 + MOST_CALLS
    for sock in socks:
        sock.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rig.until(lambda: len(rig.transport._lines) == 2)
    rig.good_is_heard()


kinds = st.sampled_from([EAGER, RTS, CTS, DATA, ACK, CREDIT, ASK, TOOK_PART, REVOKE, HELLO, BYE]) | st.integers(0, 255)
messages = st.builds(
    lambda payload, *fields: header(*fields) + payload, st.binary(max_size=20),
    kinds, st.integers(0, 255), st.integers(-2, 3), st.sampled_from([CTX, CTX + 1, 99]),
    st.integers(0, 3) | st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1), st.integers(0, 20) | st.integers(0, 2**64 - 1))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(messages | st.binary(max_size=100), max_size=8))
def test_any_bytes(stream: list[bytes]) -> None:
    """Nothing but a loss comes of it, and what others send arrives."""
    rig = Rig()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            receives = [rig.recv(BAD), rig.recv(BAD, memoryview(bytearray(8)))]
            rig.send(GOOD, 100_000)
            rig.send(BAD, 100_000, SYNC)
            with contextlib.suppress(OSError):  # it may be hung up on meanwhile
                rig.bad.send(*stream)
                rig.bad.sock.shutdown(socket.SHUT_WR)
            rig.until(lambda: BAD in rig.endpoint.engine.dead or BAD in rig.endpoint.engine.left)
            if CTX not in rig.endpoint.engine.revoked:  # as a member it may do that
                rig.good_is_heard()
            for op in receives:
                rig.until(lambda op=op: op.done)  # type: ignore[misc]
                assert op.error is None or isinstance(op.error, MPIException)
    finally:
        rig.close()


@settings(deadline=None)
@given(st.binary(max_size=100) | st.builds(lambda count, rest: count.to_bytes(8, "little") + rest,
                                           st.integers(0, 4) | st.integers(0, 2**64 - 1), st.binary(max_size=64)))
def test_tables_of_parts(data: bytes) -> None:
    """A pickle that is none is an error of who unpickles it; a table that is none is an error of ours."""
    try:
        pickle.object(data, PARTS)
    except MPIException as error:
        assert "sent" in str(error)
    except Exception as error:
        assert type(error).__module__ in ("_pickle", "builtins"), error
        assert "unpack" not in str(error)
