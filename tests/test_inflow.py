"""What comes to the parent of a region has a bound: large messages come in pieces, and what is no message is cut off."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

import sfparallel as sf
from sfparallel import wire
from sfparallel.errors import ProtocolError
from sfparallel.runtime.clone_messages import BadMessage, Kind, Message
from sfparallel.runtime.here import HERE
from sfparallel.runtime.inflow import MOST_UNREAD_BYTES
from sfparallel.runtime.link import UNREAD, CloneLink, ParentLink, set_up_dealer
from sfparallel.runtime.parts import PIECE_BYTES, Incoming, free_bytes, pieces
from tests.conftest import HANG_S
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture
from tests.test_clone_messages import ADDRESS, GREETING_3, RANK, dealer, good_from_rank_0, raw
from tests.test_clone_messages import link_fixture as link_fixture
from tests.test_runtime_bad_rank import BAD, say, wait_for_the_end

ANY = settings(deadline=None, derandomize=True)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
GENEROUS_BYTES = 256 << 20
"""Of growth: a frame of two bytes takes 64 in ZeroMQ, and it is looked at from time to time."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(name="link_not_watched")
def link_not_watched_fixture() -> Iterator[ParentLink]:
    link = ParentLink("127.0.0.1")
    link.expect(["127.2.0.0", "127.2.0.1", "127.2.0.2", ADDRESS])
    yield link
    link.close()


def shake_hands(sock: socket.socket) -> None:
    """Up to where messages may come."""
    sock.sendall(GREETING_3 + READY)
    hear_ready(sock)


def hear_ready(sock: socket.socket) -> None:
    said = b""
    while b"READY" not in said or b"ROUTER" not in said:
        said += sock.recv(1 << 16)


def unlimited(link: ParentLink, source: str) -> zmq.Socket[bytes]:
    """A clone's end: what it sends waits there, without a limit."""
    sock = HERE.zmq_context().socket(zmq.DEALER)
    set_up_dealer(sock)
    sock.connect(f"tcp://{source}:0;{link.endpoint.removeprefix('tcp://')}")
    return sock


def heard(link: ParentLink, until: Callable[[list[Message | BadMessage]], bool],
          limit_s: float = HANG_S) -> list[Message | BadMessage]:
    """As a region hears it."""
    poller = zmq.Poller()
    link.watch(poller)
    got: list[Message | BadMessage] = []
    end = time.monotonic() + limit_s
    while not until(got):
        assert time.monotonic() < end, got
        poller.poll(link.poll_ms(1.0))
        got += link.take()
    return got


# Pieces -------------------------------------------------------------------------------------------------------------------------

sizes = st.integers(0, 100) | st.sampled_from([PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 40_000, 32 << 10])


@settings(ANY, max_examples=60)
@given(st.lists(sizes, min_size=1, max_size=12))
def test_a_message_in_pieces_arrives_whole(lengths: list[int]) -> None:
    parts: list[Any] = [bytes([number]) * length for number, length in enumerate(lengths, 1)]
    stream = [memoryview(piece) for piece in pieces(parts)]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in stream)
    coming = Incoming(len(parts), sum(lengths))
    for number, piece in enumerate(stream, 1):
        coming.feed(piece)
        assert coming.complete == (number == len(stream))
    assert [bytes(part) for part in coming.parts] == parts
    assert not any(part.readonly for part in coming.parts)


@settings(ANY, max_examples=200)
@given(st.integers(0, 5), st.integers(0, 300), st.lists(st.binary(max_size=60) | st.lists(st.integers(0, 100), max_size=5).map(
    lambda each: struct.pack(f"<{len(each)}Q", *each)), max_size=8))
def test_any_pieces(count: int, nbytes: int, stream: list[bytes]) -> None:
    try:
        coming = Incoming(count, nbytes)
        for piece in stream:
            coming.feed(memoryview(piece))
    except ProtocolError:
        return
    if coming.complete:
        assert len(coming.parts) == count
        assert sum(map(len, coming.parts)) == nbytes


def test_an_announcement_of_what_no_memory_holds() -> None:
    with pytest.raises(ProtocolError, match="no memory"):
        Incoming(1, free_bytes() + (1 << 40))


def test_results_on_their_way_share_the_memory(link: ParentLink) -> None:
    """Each of them alone would fit."""
    nbytes = free_bytes() * 6 // 10
    socks = [HERE.zmq_context().socket(zmq.DEALER) for _ in range(2)]
    for sock in socks:
        sock.setsockopt(zmq.LINGER, 0)
        CloneLink(sock, RANK, ADDRESS, link.endpoint).send(Kind.PARTS, count=1, nbytes=nbytes)
    (message,) = heard(link, bool)
    assert isinstance(message, BadMessage) and "no memory" in message.why
    for sock in socks:
        sock.close()


def test_a_large_result_over_the_link(link: ParentLink) -> None:
    frames: list[Any] = [b"p", memoryview(os.urandom(5 << 20)), b"", bytes(70_000)]
    sock = HERE.zmq_context().socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    CloneLink(sock, RANK, ADDRESS, link.endpoint).send(Kind.RESULT, frames, key=RANK)
    (message,) = heard(link, bool)
    assert isinstance(message, Message)
    assert [bytes(frame) for frame in message.frames] == [bytes(frame) for frame in frames]
    assert sum(link._inflow._taken.values()) > 5 << 20
    sock.close()


@pytest.mark.parametrize(("stream", "says"), [
    ([{"count": 1, "nbytes": 1 << 62}], "no memory"), ([{"count": 1 << 40, "nbytes": 1}], "'count'"),
    ([{"count": 0, "nbytes": 9}], "without parts"),
    ([{"count": 1, "nbytes": 5}, b""], "an empty piece"), ([{"count": 1, "nbytes": 5}, struct.pack("<Q", 6)], "not 5"),
    ([{"count": 1, "nbytes": 2}, struct.pack("<Q", 2) + b"abc"], "more than it had"),
    ([{"count": 1, "nbytes": 2}, struct.pack("<Q", 2) + b"\xc1\xc1"], "undecodable"),
], ids=lambda each: each if isinstance(each, str) else "")  # fmt: skip
def test_pieces_that_no_rank_sends(link: ParentLink, stream: list[Any], says: str) -> None:
    sock = dealer(link, ADDRESS)
    for each in stream:
        sock.send(wire.pack({"kind": "parts", "rank": RANK, **each}) if isinstance(each, dict) else each)
    (bad,) = heard(link, bool)
    assert isinstance(bad, BadMessage)
    assert bad.rank == RANK
    assert says in bad.why
    good_from_rank_0(link)
    sock.close()


def test_pieces_of_a_lost_clone_are_not_its_successors(link: ParentLink) -> None:
    sock = dealer(link, ADDRESS)
    sock.send(wire.pack({"kind": "parts", "rank": RANK, "count": 2, "nbytes": 200}))
    assert not link.router.poll(100) or list(link.take()) == []
    link.forget(RANK)
    link.admit(70_001, ADDRESS)
    for _ in range(3):
        sock.send(b"\xc1" * 100)
    other = dealer(link, ADDRESS)
    other.send(wire.pack({"kind": "ready", "rank": 70_001}))
    assert [(each.rank, isinstance(each, Message)) for each in heard(link, bool)] == [(70_001, True)]
    sock.close()
    other.close()


# What is never a message --------------------------------------------------------------------------------------------------------

ENDLESS = {
    "frames without a last one": b"\x01\x00" * 50_000,
    "long frames without a last one": b"\x03" + struct.pack(">Q", 60_000) + bytes(60_000),
    "one frame of a TiB": bytes(100_000),
    "commands": b"\x04\x08\x04PING\x00\x00x" * 9000,
}  # fmt: skip


@pytest.mark.parametrize("source", [ADDRESS, "127.9.9.9"], ids=["a rank", "nobody"])
@pytest.mark.parametrize("way", ENDLESS)
def test_what_never_becomes_a_message(link: ParentLink, way: str, source: str) -> None:
    """It is cut off, and takes little memory until then; the other ranks are heard."""
    before = resident_bytes()
    poller = zmq.Poller()
    link.watch(poller)
    got: list[Message | BadMessage] = []
    with raw(link, source) as sock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shake_hands(sock)
        sock.sendall(b"\x02" + struct.pack(">Q", 1 << 40) if "TiB" in way else b"")
        sock.setblocking(False)
        sent, cut, end, data = 0, False, time.monotonic() + HANG_S, ENDLESS[way]
        rest = memoryview(data)
        while not cut and time.monotonic() < end:
            try:
                count = sock.send(rest)
                sent += count
                rest = rest[count:] or memoryview(data)
            except BlockingIOError:
                wait_ms = link.poll_ms(1.0)
                assert wait_ms is not None
                poller.poll(wait_ms // 10)
            except OSError:
                cut = True
            got += link.take()
        assert cut, f"it took {sent >> 20} MiB"
    assert resident_bytes() - before < GENEROUS_BYTES
    assert {type(each) for each in got} <= {BadMessage}
    if source == ADDRESS and "TiB" not in way:  # for so much ZeroMQ has no memory, and hangs up itself
        assert [each.rank for each in got] == [RANK]
        assert "not a whole message" in got[0].why  # type: ignore[union-attr]
    good_from_rank_0(link)


def test_what_comes_before_the_region_looks(link_not_watched: ParentLink) -> None:
    """A clone may be faster than its parent, which may also do much else before it looks for answers."""
    link, before = link_not_watched, resident_bytes()
    data = ENDLESS["long frames without a last one"]
    with raw(link, ADDRESS) as sock:
        sock.settimeout(5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            shake_hands(sock)
            while sent < GENEROUS_BYTES:
                sock.sendall(data)
                sent += len(data)
        assert sent < MOST_UNREAD_BYTES
        assert resident_bytes() - before < MOST_UNREAD_BYTES
        poller = zmq.Poller()
        link.watch(poller)
        sock.settimeout(60)
        hear_ready(sock)
        sock.setblocking(False)
        rest = memoryview(data)
        got: list[Message | BadMessage] = []
        end = time.monotonic() + 60
        while not got:
            assert time.monotonic() < end
            with contextlib.suppress(OSError):
                rest = rest[sock.send(rest):] or memoryview(data)
            poller.poll((link.poll_ms(1.0) or 0) // 10)
            got += link.take()
    assert [each.rank for each in got if isinstance(each, BadMessage)] == [RANK]
    good_from_rank_0(link)


def test_a_queue_of_whole_messages_is_short(link: ParentLink) -> None:
    """While the parent is busy: the rest waits where it comes from."""
    piece, before = bytes(PIECE_BYTES), resident_bytes()
    sock = unlimited(link, ADDRESS)
    for _ in range(400):
        sock.send(piece, copy=False)
    assert link.router.poll(30_000)
    time.sleep(0.5)  # it would be here by then
    assert resident_bytes() - before < 50 << 20
    assert UNREAD * PIECE_BYTES <= MOST_UNREAD_BYTES / 2
    sock.close()


def test_nothing_is_cut_off_that_is_taken(link: ParentLink) -> None:
    """Far more than the bound, in messages of all sizes."""
    socks = [unlimited(link, "127.2.0.1"), unlimited(link, "127.2.0.2")]
    pickled = [bytes(size) for size in (0, 1, 200, 300, 70_000, PIECE_BYTES - 100)]
    count = 4 * MOST_UNREAD_BYTES // sum(map(len, pickled)) + 1
    for _ in range(count):
        for rank, sock in enumerate(socks, 1):
            for each in pickled:
                sock.send(wire.pack({"kind": "result", "rank": rank, "key": 0, "pickle": each or b"x"}))
    got = heard(link, lambda got: len(got) == 2 * count * len(pickled))
    assert all(isinstance(each, Message) for each in got)
    for sock in socks:
        sock.close()


def fill_the_parent() -> None:
    """Of a rank: until it is cut off, and then until it is ended."""
    membership = HERE.membership
    assert membership is not None
    host, port = membership.link._endpoint.split(";")[-1].removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), source_address=(membership.addresses[membership.rank], 0)) as sock:
        shake_hands(sock)
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(ENDLESS["frames without a last one"])
    wait_for_the_end()


@pytest.mark.parametrize("way", ["no last frame", "pieces without end"])
def test_a_region_loses_who_fills_the_parent(double: Doubles, way: str) -> None:
    @sf.parallel(n=8, on_error="return", timeout=500)
    def work() -> Any:
        rank = sf.comm().rank
        if rank == BAD:
            if way == "no last frame":
                fill_the_parent()
            say(kind="parts", count=1, nbytes=1 << 62)
            wait_for_the_end()
        return bytes(300_000) + bytes([rank])

    results = work()
    assert [result[-1] for rank, result in enumerate(results) if rank != BAD] == [0, 1, 3, 4, 5, 6, 7]
    assert isinstance(results[BAD], sf.CloneLost)
    assert f"rank {BAD}" in str(results[BAD])
