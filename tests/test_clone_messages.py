"""What clones say to their region's parent, which may be anything: read in one place, from a socket that anybody can reach."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfparallel import wire
from sfparallel.errors import NetworkError
from sfparallel.runtime.clone_messages import FROM_CLONES, MAX_FRAMES, BadMessage, Kind, Message, decode, decode_answer
from sfparallel.runtime.collect import matches
from sfparallel.runtime.here import HERE
from sfparallel.runtime.link import MOST_CALLS, MOST_NOTICES, TURN, ParentLink, pack_answer
from sfparallel.runtime.payload import dump_error, dumps, load_error
from sfparallel.runtime.region import bind_link
from tests.conftest import HANG_S

ERROR = {"type": "builtins.ValueError", "message": "m", "traceback": "t"}
GOOD: dict[Kind, dict[str, Any]] = {
    Kind.RESULT: {"key": 3, "pickle": b"x", "ran_ns": 1},
    Kind.ERROR: {"key": 3, "error": ERROR},
    Kind.COMM: {}, Kind.WHO_LEFT: {}, Kind.READY: {},
    Kind.DONE: {},
    Kind.UNFIT: {"error": ERROR, "pickle": b"x"},
    Kind.FAILED: {"error": ERROR, "pickle": b"x"},
    Kind.PARTS: {"count": 1, "nbytes": 5},
    Kind.BACK: {"keys": [1, 2]},
}  # fmt: skip

texts = st.text("a0/.\x00ä☃", max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(0, 9), inner, max_size=3), max_leaves=8)
names = st.sampled_from(["kind", "rank", "key", "pickle", "ran_ns", "error", "files", "keys"])


def parts_of(sent: Kind, beside: tuple[bytes, ...] = (), **changed: Any) -> list[Any]:
    return [wire.pack({"kind": sent.value, "rank": 3, **GOOD[sent], **changed}), *map(memoryview, beside)]


def test_messages_as_clones_send_them() -> None:
    assert set(GOOD) == set(FROM_CLONES.values())
    for kind in GOOD:
        message = decode(3, parts_of(kind))
        assert isinstance(message, Message)
        assert (message.kind, message.rank) == (kind, 3)
    files = [{"path": b"out/a.txt", "mode": 0o644}, {"path": b"out/\xff", "mode": 0o600}]
    message = decode(3, parts_of(Kind.RESULT, (b"p", b"q", b"first", b"second"), pickle=None, files=files))
    assert isinstance(message, Message)
    assert [bytes(each) for each in message.frames] == [b"p", b"q"]
    assert [bytes(each) for each in message.contents] == [b"first", b"second"]
    assert [(note.path, note.mode) for note in message.files] == [("out/a.txt", 0o644), ("out/\udcff", 0o600)]
    message = decode_answer(2, pack_answer(Kind.ERROR, b"", {"key": 2, "error": ERROR}))
    assert isinstance(message, Message)
    assert (message.key, message.error, message.frames) == (2, ERROR, [])


@pytest.mark.parametrize(("kind", "changed", "says"), [
    (Kind.RESULT, {"key": None}, "'key'"), (Kind.RESULT, {"key": "3"}, "'key'"), (Kind.RESULT, {"key": True}, "'key'"),
    (Kind.RESULT, {"key": -1}, "'key'"), (Kind.RESULT, {"ran_ns": 1.5}, "'ran_ns'"), (Kind.RESULT, {"pickle": "x"}, "pickle"),
    (Kind.RESULT, {"pickle": None}, "0 frames"), (Kind.RESULT, {"pickle": b""}, "0 frames"),
    (Kind.RESULT, {"rank": 4}, "from rank 4"),
    (Kind.RESULT, {"rank": None}, "from rank None"), (Kind.RESULT, {"rank": 3.0}, "from rank 3.0"),
    (Kind.RESULT, {"files": 7}, "'files'"),
    (Kind.RESULT, {"files": [{"path": b"x", "mode": 0o644}]}, "1 frames with 1 files"),
    (Kind.RESULT, {"kind": []}, "unknown kind"),
    (Kind.ERROR, {"error": None}, "description"), (Kind.ERROR, {"error": {}}, "type"), (Kind.ERROR, {"key": None}, "'key'"),
    (Kind.ERROR, {"error": {**ERROR, "traceback": b"x"}}, "traceback"), (Kind.BACK, {"keys": []}, "'keys'"),
    (Kind.BACK, {"keys": 1}, "'keys'"), (Kind.BACK, {"keys": [0] * 70_000}, "'keys'"), (Kind.BACK, {"keys": [-1]}, "'keys'"),
    (Kind.UNFIT, {"error": []}, "description"),
    (Kind.READY, {"kind": "keys"}, "unknown kind 'keys'"), (Kind.READY, {"kind": "x" * 1000}, "unknown kind"),
])  # fmt: skip
def test_a_wrong_field_is_named(kind: Kind, changed: dict[str, Any], says: str) -> None:
    message = decode(3, parts_of(kind, **changed))
    assert isinstance(message, BadMessage)
    assert message.rank == 3
    assert says in message.why
    assert len(message.why) < 300


@pytest.mark.parametrize("path", [b"", b"/etc/passwd", b"../x", b"out/../../x", b"a\0b", b"x" * 300, b"y/" * 3000 + b"z", b".",
    b"//x", "x", None],
                         ids=str)  # fmt: skip
def test_a_path_that_leaves_the_folder(path: object) -> None:
    files = [{"path": path, "mode": 0o644}]
    assert isinstance(decode(3, parts_of(Kind.RESULT, (b"p", b"content"), pickle=None, files=files)), BadMessage)


@pytest.mark.parametrize("mode", [0o4755, -1, "644", None])
def test_a_mode_that_is_more_than_permissions(mode: object) -> None:
    files = [{"path": b"out/x", "mode": mode}]
    assert isinstance(decode(3, parts_of(Kind.RESULT, (b"p", b"content"), pickle=None, files=files)), BadMessage)


def test_counts_that_do_not_match() -> None:
    twice = [{"path": b"out/x", "mode": 0o644}, {"path": b"out//x", "mode": 0o644}]
    assert "twice" in decode(3, parts_of(Kind.RESULT, (b"p", b"1", b"2"), pickle=None,
    files=twice)).why  # type: ignore[union-attr]
    assert isinstance(decode(3, parts_of(Kind.READY, (b"more",))), BadMessage)
    assert isinstance(decode(3, parts_of(Kind.RESULT, (b"more",))), BadMessage), "a pickle in the header and behind it"
    assert isinstance(decode(3, parts_of(Kind.RESULT, (b"",) * (MAX_FRAMES + 1), pickle=None)), BadMessage)
    assert isinstance(decode(3, []), BadMessage)
    assert isinstance(decode(3, [bytes(17 << 20)]), BadMessage)
    assert isinstance(decode_answer(3, wire.pack({"kind": "ready"})), BadMessage)


def check(message: Message | BadMessage) -> None:
    assert message.rank == 3
    if isinstance(message, BadMessage):
        assert len(message.why) < 500
        return
    assert message.kind in FROM_CLONES.values()
    assert type(message.key) is type(message.ran_ns) is int
    assert all(type(key) is int for key in message.keys)
    assert all(isinstance(each, memoryview) for each in (*message.frames, *message.contents))
    assert len(message.files) == len(message.contents)
    if message.kind in (Kind.ERROR, Kind.UNFIT, Kind.FAILED):
        load_error(message.error, message.frames, "rank 3")


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"\x81\x90\x01")
@example(b"\x91" * 3000)
def test_any_bytes(data: bytes) -> None:
    check(decode(3, [data]))
    check(decode_answer(3, data))


@settings(deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.dictionaries(names, values, max_size=4), st.sets(names, max_size=2),
       st.lists(st.binary(max_size=9), max_size=3))
def test_any_fields(kind: Kind, changed: dict[str, Any], missing: set[str], beside: list[bytes]) -> None:
    header = {"kind": kind.value, "rank": 3, **GOOD[kind], **changed}
    header = {name: value for name, value in header.items() if name not in missing}
    packed = msgpack.packb(header, use_bin_type=True)
    check(decode(3, [packed, *map(memoryview, beside)]))
    check(decode_answer(3, packed))


@pytest.mark.parametrize(("path", "pattern", "expected"), [
    ("out/a.png", "out/*.png", True), ("a.png", "out/*.png", False), ("out/x/a.png", "out/*.png", False),
    ("out/a.png", "**/*.png", True),
    ("a.png", "**/*.png", True), ("x/y/z/a.png", "x/**/a.*", True), ("x/a.png", "x/**", True), (".git/hooks/x", "**", False),
    (".git/hooks/x", "*/*/*", False), (".profile", "*", False), (".profile", ".*", True), ("x/.a", "x/*", False),
    ("program.py", "out/*", False),
    ("out/a", "out/[ab]", True), ("out/c", "out/[ab]", False), ("out/a", "./out/a", True),
])  # fmt: skip
def test_collected_files_are_those_that_the_globs_find(path: str, pattern: str, expected: bool, tmp_path: Any) -> None:
    from glob import glob
    from pathlib import PurePosixPath
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    found = [os.path.normpath(each) for each in glob(pattern, root_dir=tmp_path, recursive=True)]
    assert (path in found) is expected, "the table itself"
    assert matches(PurePosixPath(path).parts, PurePosixPath(pattern).parts) is expected


# Errors, which come as pickles -------------------------------------------------------------------------------------------------


class NoNotes(Exception):
    def add_note(self, note: str) -> None:
        raise OSError("no notes")


class Unreadable:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit(3)",)


@pytest.mark.parametrize("made", [SystemExit(3), KeyboardInterrupt(), NoNotes("x"), 7, Unreadable()], ids=repr)
def test_what_a_pickled_error_may_be(made: object) -> None:
    """Nothing that comes as an error ends the parent's program."""
    error = load_error(ERROR, dumps(made), "rank 3")
    assert isinstance(error, Exception)
    assert any("rank 3" in note for note in error.__notes__)


def test_the_text_of_an_error_is_cut() -> None:
    description, _ = dump_error(ValueError("x" * (5 << 20)), 3)
    assert len(wire.pack(description)) < 4 << 20


# The socket ---------------------------------------------------------------------------------------------------------------------

RANK, ADDRESS = 3, "127.2.0.3"


@pytest.fixture(name="link")
def link_fixture() -> Iterator[ParentLink]:
    link = ParentLink("127.0.0.1")
    link.expect(["127.2.0.0", "127.2.0.1", "127.2.0.2", ADDRESS])
    link.listen()
    yield link
    link.close()


def dealer(link: ParentLink, source: str, identity: bytes = b"") -> zmq.Socket[bytes]:
    sock = HERE.zmq_context().socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    if identity:
        sock.setsockopt(zmq.ROUTING_ID, identity)
    sock.connect(f"tcp://{source}:0;{link.endpoint.removeprefix('tcp://')}")
    return sock


def raw(link: ParentLink, source: str) -> socket.socket:
    host, port = link.endpoint.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), source_address=(source, 0))


def collect(link: ParentLink, until: Callable[[list[Message | BadMessage]], bool],
            limit_s: float = HANG_S) -> list[Message | BadMessage]:
    got: list[Message | BadMessage] = []
    end = time.monotonic() + limit_s
    while not until(got) and time.monotonic() < end:
        link.router.poll(100)
        got += link.take()
    return got


def good_from_rank_0(link: ParentLink) -> None:
    """Rank 0 is heard, whatever came before."""
    sock = dealer(link, "127.2.0.0")
    sock.send_multipart([wire.pack({"kind": "result", "rank": 0, "key": 0}), b"x"])
    got = collect(link, lambda got: any(each.rank == 0 for each in got))
    message = next(each for each in got if each.rank == 0)
    assert isinstance(message, Message)
    assert bytes(message.frames[0]) == b"x"
    sock.close()


def test_bad_messages_are_those_of_who_sent_them(link: ParentLink) -> None:
    sock = dealer(link, ADDRESS)
    for header in ({"kind": "result", "rank": 0, "key": 0, "pickle": b"x"}, {"kind": "result", "rank": 7}, {"kind": "x",
    "rank": RANK}):
        sock.send(wire.pack(header))
    sock.send(b"\xc1")
    sock.send_multipart([b"", b""])
    got = collect(link, lambda got: len(got) == 5)
    assert len(got) == 5
    assert all(isinstance(each, BadMessage) and each.rank == RANK for each in got)
    assert "claims to come from rank 0" in got[0].why  # type: ignore[union-attr]
    good_from_rank_0(link)
    sock.close()


GREETING_2 = b"\xff" + bytes(7) + b"\x01\x7f" + b"\x01\x05" + b"\x00\x00"
GREETING_3 = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32


@pytest.mark.parametrize("data", [
    b"\x01\x00" + b"\x06\x00hello" * 20, b"\x04\x00abc" + b"\x06\x00hello", GREETING_2 + b"\x00\x05hello" * 20,
    GREETING_2 + b"\x01\x05hello", GREETING_3, GREETING_3 + b"\x04\x26\x05READY", GREETING_3 + os.urandom(100),
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 64, b"\x00" * 64, b"\xff", b"", b"\xff" + bytes(8) + b"\x7f\x09",
], ids=lambda data: data[:12].hex() or "nothing")  # fmt: skip
@pytest.mark.parametrize("source", [ADDRESS, "127.9.9.9"], ids=["a rank", "nobody"])
def test_bytes_that_are_no_zmtp_3(link: ParentLink, data: bytes, source: str) -> None:
    """Messages of ZMTP 1.0 and 2.0 arrive, but libzmq does not tell from where (`zmq.ZMQError: Invalid argument`)."""
    with raw(link, source) as sock, warnings.catch_warnings():
        warnings.simplefilter("error")  # as with -W error: that must not make it the program's error
        sock.sendall(data)
        good_from_rank_0(link)
        collect(link, lambda got: link.drained, 5)


def test_random_bytes(link: ParentLink) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(100):
            with raw(link, ADDRESS) as sock:
                sock.sendall(os.urandom(40))
        good_from_rank_0(link)


def test_a_stranger_is_named_three_times_at_most(link: ParentLink) -> None:
    sock = dealer(link, "127.9.9.9")
    for _ in range(500):
        sock.send(wire.pack({"kind": "result", "rank": RANK, "key": RANK, "pickle": b"x"}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not collect(link, lambda _: link._strangers.count == 500)
    assert len(told) == 3
    assert "it came from 127.9.9.9" in str(told[0].message)
    sock.close()


def test_a_name_that_was_somebody_elses_does_not_help(link: ParentLink) -> None:
    """A peer names its connection as it likes. The name of one that has ended is free again."""
    first = dealer(link, "127.2.0.0", b"name")
    first.send(wire.pack({"kind": "comm", "rank": 0}))
    assert collect(link, bool)[0].rank == 0
    first.close()
    end = time.monotonic() + HANG_S
    got: list[Message | BadMessage] = []
    while not got and time.monotonic() < end:  # until the name is free, libzmq refuses it
        second = dealer(link, ADDRESS, b"name")
        second.send(wire.pack({"kind": "result", "rank": 0, "key": 0, "pickle": b"forged"}))
        got = collect(link, bool, 0.5)
        second.close()
    assert isinstance(got[0], BadMessage)
    assert got[0].rank == RANK


def test_a_flood_is_taken_in_turns(link: ParentLink) -> None:
    sock = dealer(link, ADDRESS)
    for _ in range(3 * TURN):
        sock.send(wire.pack({"kind": "comm", "rank": RANK}))
    seen = []
    while len(seen) < 3 * TURN:
        assert link.router.poll(30_000)
        turn = list(link.take())
        assert len(turn) <= TURN
        seen += turn
    assert [isinstance(each, BadMessage) for each in seen] == [False] * MOST_NOTICES + [True] * (3 * TURN - MOST_NOTICES)
    link.forget(RANK)
    sock.send(b"\xc1")
    good_from_rank_0(link)
    sock.close()


def test_what_a_lost_clone_has_left_is_not_its_successors(link: ParentLink) -> None:
    """A clone that replaces another one may have its address."""
    sock = dealer(link, ADDRESS)
    link.forget(RANK)
    link.admit(70_001, ADDRESS)
    sock.send(wire.pack({"kind": "result", "rank": RANK, "key": 1, "pickle": b"x"}))
    sock.send(wire.pack({"kind": "ready", "rank": 70_001}))
    got = collect(link, bool)
    assert [(each.rank, isinstance(each, Message)) for each in got] == [(70_001, True)]
    sock.close()


CALLER = """
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
host, port, source, data = sys.argv[1:]
socks = []
try:
    while len(socks) < 3000:
        sock = socket.create_connection((host, int(port)), source_address=(source, 0))
        socks.append(sock)
        sock.sendall(bytes.fromhex(data))
except OSError:
    pass
print("done", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("source", [ADDRESS, "127.9.9.9"], ids=["a rank", "nobody"])
@pytest.mark.parametrize("data", [b"", GREETING_3[:12]], ids=["silent", "half a greeting"])
def test_thousands_of_connections(link: ParentLink, source: str, data: bytes) -> None:
    """They would use up the descriptors of the program."""
    before = len(os.listdir("/proc/self/fd"))
    poller = zmq.Poller()
    link.watch(poller)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    host, port = link.endpoint.removeprefix("tcp://").split(":")
    with subprocess.Popen([sys.executable, "-c", CALLER, host, port, source, data.hex()], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        poller.register(caller.stdout.fileno(), zmq.POLLIN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
        try:
            got: list[Message | BadMessage] = []
            end = time.monotonic() + HANG_S
            while time.monotonic() < end and caller.stdout.fileno() not in dict(poller.poll(1000)):
                got += link.take()
            good_from_rank_0(link)
            while time.monotonic() < end and _descriptors() > before + 2 * MOST_CALLS:
                got += link.take()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            caller.kill()
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * MOST_CALLS
    expected = [BadMessage(RANK, f"more than {MOST_CALLS} connections")] if source == ADDRESS else []
    assert got == expected


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # not one is free
        return 1 << 30


def test_a_link_that_cannot_be_bound_says_why() -> None:
    with pytest.raises(NetworkError, match=r"192\.0\.2\.1.*[Cc]annot assign"):
        bind_link("192.0.2.1")
