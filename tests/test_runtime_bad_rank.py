"""Ranks that send what no rank sends, on the double: regions, maps, streams and executors lose that rank, and no more."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

import sfparallel as sf
from sfparallel import wire
from sfparallel.runtime.here import HERE
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture

BAD = 2

ERROR = {"type": "T", "message": "m", "traceback": "t"}


def say(*frames: bytes, **fields: Any) -> None:
    """Send on this rank's own line, past the runtime."""
    assert HERE.membership is not None
    link = HERE.membership.link
    link.connect()
    link.dealer.send_multipart([wire.pack({"rank": link.rank, **fields}), *frames])


def wait_for_the_end() -> None:
    """Until the parent lets this rank go, or ends it."""
    assert HERE.membership is not None
    HERE.membership.link.receive()
    os._exit(0)


def hand_over(answer: bytes) -> None:
    assert HERE.lifeline is not None
    HERE.lifeline.exit(0, answer)


def raw(data: bytes) -> Callable[[], None]:

    def send() -> None:
        assert HERE.membership is not None
        host, port = HERE.membership.link._endpoint.split(";")[-1].removeprefix("tcp://").split(":")
        own = HERE.membership.addresses[HERE.membership.rank]
        with socket.create_connection((host, int(port)), source_address=(own, 0)) as sock:
            sock.sendall(data)
        os._exit(9)

    return send


EVERYWHERE: dict[str, Callable[[], None]] = {
    "random bytes": raw(os.urandom(20)),
    "zmtp 1.0": raw(b"\x01\x00" + b"\x06\x00hello" * 20),
    "zmtp 2.0": raw(b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\x00\x00" + b"\x00\x05hello" * 20),
    "no fields": lambda: say(kind="result"),
    "no error": lambda: say(kind="error", key=BAD),
    "no kind": lambda: say(),
    "a wrong type": lambda: say(kind="result", key=[], pickle=b"x"),
    "an answer of another": lambda: say(kind="result", rank=0, key=0, pickle=pickle.dumps("forged")),
    "an answer for another": lambda: say(kind="result", key=10**6, pickle=pickle.dumps("forged")),
    "nothing": lambda: say(kind="back", keys=[]),
    "another kind": lambda: say(kind="done", status=0),
    "keys": lambda: say(kind="keys", keys=[1]),
    "exit without an answer": lambda: hand_over(b""),
    "exit with bytes": lambda: hand_over(b"\xc1\xc1"),
    "exit with another kind": lambda: hand_over(wire.pack({"kind": "comm"})),
    "exit with half an answer": lambda: hand_over(wire.pack({"kind": "error", "key": 0, "pickle": b""})),
    "exit with another's answer": lambda: hand_over(wire.pack({"kind": "result", "key": 10**6, "pickle": pickle.dumps(1)})),
}  # fmt: skip


def flood() -> None:
    for _ in range(30_000):
        say(kind="who left")


@pytest.mark.parametrize("way", [*EVERYWHERE, "ready", "flood"])
def test_regions(double: Doubles, way: str) -> None:
    send = {**EVERYWHERE, "ready": lambda: say(kind="ready"), "flood": flood}[way]

    @sf.parallel(n=5, on_error="return", timeout=300)
    def work() -> int:
        rank = sf.comm().rank
        if rank == BAD:
            send()
            wait_for_the_end()
        return rank

    results = work()
    assert [result for rank, result in enumerate(results) if rank != BAD] == [0, 1, 3, 4]
    assert isinstance(results[BAD], sf.CloneLost)
    assert results[BAD].rank == BAD
    assert f"rank {BAD}" in str(results[BAD])


def test_the_other_ways_to_meet_errors(double: Doubles) -> None:
    @sf.parallel(n=4, on_error="gather")
    def work() -> int:
        if sf.comm().rank == BAD:
            say(kind="result")
            wait_for_the_end()
        return sf.comm().rank

    with pytest.raises(sf.RankError, match=f"rank {BAD}") as caught:
        work()
    assert caught.value.results == {0: 0, 1: 1, 3: 3}
    assert isinstance(caught.value.errors[BAD], sf.CloneLost)
    with pytest.raises(sf.CloneLost, match=f"rank {BAD} .* it sent 'key' must be") as lost:
        work.options(on_error="raise")()
    assert lost.value.rank == BAD


def test_a_second_answer_changes_nothing(double: Doubles) -> None:
    @sf.parallel(n=3, on_error="return")
    def work() -> bytes:
        rank = sf.comm().rank
        if rank == BAD:
            say(kind="result", key=BAD, pickle=pickle.dumps(b"first"))
            say(kind="result", key=BAD, pickle=pickle.dumps(b"second"))
            wait_for_the_end()
        return bytes(100_000)  # over the network

    results = work()
    assert results[:2] == [bytes(100_000)] * 2
    assert results[BAD] == b"first"


@pytest.mark.parametrize("frames", [(b"",), (b"not a pickle",), (b"cos\nsystem\n(S'exit 1'\ntR.",), (pickle.dumps(1)[:-1],)])
def test_wrong_pickles_are_errors_of_their_rank(double: Doubles, frames: tuple[bytes, ...]) -> None:
    @sf.parallel(n=3, on_error="return")
    def work() -> int:
        if sf.comm().rank == BAD:
            say(*frames, kind="result", key=BAD)
            wait_for_the_end()
        return sf.comm().rank

    results = work()
    assert results[:2] == [0, 1]
    if frames[0].startswith(b"cos"):
        assert results[BAD] == 256, "pickles run code: of the parent VM, not of the host"
    else:
        assert isinstance(results[BAD], sf.ResultNotPicklable)
        assert f"rank {BAD}" in str(results[BAD])


class Ends:
    """Ends the program that unpickles it."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit(3)",)


def test_a_result_that_would_end_the_parent(double: Doubles) -> None:
    results = sf.parallel(n=3, on_error="return")(lambda: Ends() if sf.comm().rank == BAD else 7)()
    assert results[:2] == [7, 7]
    assert isinstance(results[BAD], sf.ResultNotPicklable)


@pytest.mark.parametrize("way", [*EVERYWHERE, "ready"])
def test_maps(double: Doubles, way: str) -> None:
    send = {**EVERYWHERE, "ready": lambda: say(kind="ready")}[way]

    def work(item: int) -> int:
        if item == 5:
            send()
            wait_for_the_end()
        return item * item

    results = sf.parallel_map(work, range(20), n=4, on_error="return", timeout=300)
    assert [result for item, result in enumerate(results) if item != 5] == [item * item for item in range(20) if item != 5]
    assert isinstance(results[5], sf.CloneLost)
    assert f"rank {results[5].rank}" in str(results[5])


@pytest.mark.parametrize("way", [*EVERYWHERE, "a second ready", "comm"])
def test_streams(double: Doubles, way: str) -> None:
    send = {**EVERYWHERE, "a second ready": lambda: say(kind="ready"), "comm": lambda: say(kind="comm")}[way]

    def work(item: int) -> int:
        if item == 5:
            send()
            wait_for_the_end()
        return item * item

    results = list(sf.parallel_imap(work, range(20), n=3, on_error="return", timeout=300))
    assert [result for item, result in enumerate(results) if item != 5] == [item * item for item in range(20) if item != 5]
    assert isinstance(results[5], sf.CloneLost)
    assert "rank" in str(results[5])


IN_TASKS = {**EVERYWHERE, "unfit": lambda: say(kind="unfit", error=ERROR),
            "failed": lambda: say(kind="failed", error=ERROR)}


def task(item: int, way: str) -> int:
    if item == 5:
        IN_TASKS[way]()
        wait_for_the_end()
    return item * item


@pytest.mark.parametrize("way", IN_TASKS)
def test_executors_replace_a_bad_clone(double: Doubles, way: str) -> None:
    with sf.Executor(3) as executor:
        futures = [executor.submit(task, item, way) for item in range(20)]
        for item, future in enumerate(futures):
            if item == 5:
                error = future.exception(60)
                assert isinstance(error, sf.CloneLost)
                assert future.rank == error.rank
            else:
                assert future.result(60) == item * item
        assert executor.broken is None


def test_a_flood_does_not_outlast_the_time_limit(double: Doubles) -> None:
    """From a rank of its own it would end that; from a stranger it only costs time. Who has answered is not called missing."""

    @sf.parallel(n=4, timeout=15)
    def work() -> int:
        rank = sf.comm().rank
        if rank == BAD:
            host, port = HERE.membership.link._endpoint.split(";")[-1].removeprefix("tcp://").split(":")  # type: ignore[union-attr]
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            while True:  # a connection may be cut off
                with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as sock:
                    sock.sendall(b"\x01\x00")  # from 127.0.0.1, which is nobody's
                    while True:
                        sock.sendall(b"\x06\x00hello" * 5000)
        time.sleep(1)
        return rank

    with pytest.raises(sf.RegionTimeout) as caught, pytest.warns(RuntimeWarning, match="no address"):
        work()
    assert caught.value.missing == [BAD]
    assert caught.value.results == {0: 0, 1: 1, 3: 3}


def test_files_that_nobody_asked_for(double: Doubles, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "program.py"
    victim.write_text("as it was")
    names = {0: "program.py", 1: "../outside", 2: "/outside", 3: "out/mine"}

    @sf.parallel(n=4, collect="out/*", on_error="return")
    def work() -> None:
        rank = sf.comm().rank
        notes = [{"path": names[rank].encode(), "mode": 0o777}]
        say(pickle.dumps(rank), b"content", kind="result", key=rank, files=notes)
        wait_for_the_end()

    results = work()
    for rank in range(3):
        assert isinstance(results[rank], sf.CloneLost)
        assert f"rank {rank}" in str(results[rank])
    assert results[3] == 3
    assert (tmp_path / "out/mine").read_text() == "content"
    assert victim.read_text() == "as it was"
    assert not (tmp_path.parent / "outside").exists()
