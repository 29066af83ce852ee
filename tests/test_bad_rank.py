"""One bad rank of eight costs the results of one rank, whatever it sends, and to whom."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")

BAD = 3

PREAMBLE = f"""
import json, os, signal, socket, struct, sys, time
import sfparallel as sf
from sfparallel import wire
from sfparallel.runtime.here import HERE

BAD = {BAD}
WAYS = {{}}

def way(function):
    WAYS[function.__name__] = function
    return function

def outcome(value):
    if isinstance(value, BaseException):
        return [type(value).__name__, getattr(value, "rank", None), str(value)[:2000]]
    return value

def ask(**fields):
    HERE.lifeline._socket.send(wire.pack(fields))
"""

REQUESTS = """
@way
def a_status_of_30_digits():
    ask(op="exit", status="1" * 30)

@way
def a_status_that_is_none():
    ask(op="exit", status=None)

@way
def an_answer_that_is_too_large():
    ask(op="exit", status=0, answer=bytes(100_000))

@way
def no_answer_at_all():
    ask(op="exit", status=0)

@way
def a_cause_without_end():
    ask(op="abort", status=1, cause="x" * 120_000)
    os._exit(1)

@way
def a_cause_that_is_bytes():
    ask(op="abort", status=1, cause=b"\\xff")

@way
def all_kinds_of_nonsense():
    # Each of these is refused; none may hurt another VM. (The last one ends this rank.)
    line = HERE.lifeline._socket
    for message in (b"", b"\\xc1", b"\\x81\\x90\\x01", b"\\x91" * 5000, b"\\xdf\\xff\\xff\\xff\\xff", bytes(130_000)):
        if message:
            line.send(message)
    for fields in ({"op": "kill", "ticket": 1}, {"op": "signal", "ticket": 1, "number": 9}, {"op": "join", "ticket": 1},
                   {"op": "ticket", "n": 1 << 63}, {"op": "ticket", "n": -1}, {"op": "stats", "ticket": 1, "last_s": "x"},
                   {"op": ["x"]}, {"op": "clone", "ticket": 1}, {"op": "create", "ticket": 1, "checkpoint": {}},
                   {"op": "drop", "checkpoint": 1}, {"op": "file", "path": "/etc/passwd"}):
        for id in (7, "7", None, [], -1):
            line.send(wire.pack({"id": id, **fields}))
    ask(op="exit", status=[])
"""


NETWORK = r"""
def say(*frames, **fields):
    link = HERE.membership.link
    link.connect()
    link.dealer.send_multipart([wire.pack({"rank": link.rank, **fields}), *frames])

def knock(data, then=None):
    # The parent's gather port, past ZeroMQ.
    host, port = HERE.membership.link._endpoint.removeprefix("tcp://").split(":")
    sock = socket.create_connection((host, int(port)))
    sock.sendall(data)
    if then is not None:
        then(sock)
    os._exit(9)  # so that this rank is lost at once

@way
def random_bytes():
    knock(os.urandom(20))

@way
def greeting_of_zmtp_1():
    knock(b"\x01\x00" + b"\x06\x00hello" * 20, lambda sock: time.sleep(0.5))

@way
def greeting_of_zmtp_2():
    knock(b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\x00\x00" + b"\x00\x05hello" * 20, lambda sock: time.sleep(0.5))

@way
def half_a_greeting():
    knock(b"\xff" + bytes(8), lambda sock: time.sleep(0.5))

@way
def a_result_without_fields():
    say(kind="result")

@way
def an_error_without_one():
    say(kind="error", key=BAD)

@way
def an_answer_in_the_name_of_another():
    say(kind="result", rank=0, key=0, pickle=b"I.")

@way
def an_answer_to_what_it_was_not_asked():
    say(kind="result", key=10**6, pickle=b"I.")

@way
def an_answer_with_the_exit_that_is_none():
    ask(op="exit", status=0, answer=b"\xc1\xc1")

@way
def an_answer_with_the_exit_of_another():
    ask(op="exit", status=0, answer=wire.pack({"kind": "result", "key": 10**6, "pickle": b"I."}))

@way
def thousands_of_connections():
    import contextlib, resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 5000))
    host, port = HERE.membership.link._endpoint.removeprefix("tcp://").split(":")
    with contextlib.suppress(OSError):
        socks = [socket.create_connection((host, int(port))) for _ in range(3000)]
        signal.pause()

@way
def a_flood():
    for _ in range(30_000):
        say(kind="who left")
"""


def judge(told: dict[str, list[Any]], ranks: int = 8) -> None:
    """7 of 8 results are right, and the error names the rank."""
    for way, results in told.items():
        assert len(results) == ranks, way
        for rank, result in enumerate(results):
            if rank != BAD:
                assert result == rank, (way, results)
        kind, who, message = results[BAD]
        assert (kind, who) == ("CloneLost", BAD), (way, results)
        assert f"rank {BAD}" in message, (way, message)


def test_requests_to_the_supervisor(sfrun: Sfrun) -> None:
    ended = sfrun(
        PREAMBLE + REQUESTS + """
@sf.parallel(n=8, on_error="return", timeout=120)
def work(way):
    rank = sf.comm().rank
    if rank == BAD:
        WAYS[way]()
        signal.pause()
    return rank

print(json.dumps({way: [outcome(result) for result in work(way)] for way in WAYS}))
"""
    ).ok()  # fmt: skip
    judge(json.loads(ended.out))


def test_messages_to_the_parent_of_a_region(sfrun: Sfrun) -> None:
    ended = sfrun(
        PREAMBLE + NETWORK + """
@sf.parallel(n=8, on_error="return", timeout=240)
def work(way):
    rank = sf.comm().rank
    if rank == BAD:
        WAYS[way]()
        signal.pause()
    return rank

print(json.dumps({way: [outcome(result) for result in work(way)] for way in WAYS}))
"""
    ).ok()  # fmt: skip
    judge(json.loads(ended.out))


def test_the_ways_to_meet_errors(sfrun: Sfrun) -> None:
    ended = sfrun(
        PREAMBLE + NETWORK + """
@sf.parallel(n=8, timeout=240)
def work():
    if sf.comm().rank == BAD:
        say(kind="result")
        signal.pause()
    return sf.comm().rank

for on_error in ("raise", "gather"):
    try:
        work.options(on_error=on_error)()
    except sf.SfError as error:
        print(json.dumps([type(error).__name__, str(error), sorted(error.results.items())]))
"""
    ).ok()  # fmt: skip
    (raised, message, _), (gathered, _, results) = map(json.loads, ended.out.splitlines())
    assert (raised, gathered) == ("CloneLost", "RankError")
    assert f"rank {BAD} was lost: it sent 'key' must be" in message
    assert results == [[rank, rank] for rank in range(8) if rank != BAD]


def test_items_of_maps_streams_and_executors(sfrun: Sfrun) -> None:
    """One item is lost, and the rest is done by the other clones."""
    ended = sfrun(
        PREAMBLE + NETWORK + """
def work(item, way):
    if item == BAD:
        WAYS[way]()
        signal.pause()
    return item

some = ("random_bytes", "greeting_of_zmtp_1", "a_result_without_fields", "an_answer_in_the_name_of_another",
        "an_answer_with_the_exit_that_is_none")
told = {}
for way in some:
    ways = [way] * 12
    told["map", way] = sf.parallel_map(work, range(12), ways, n=4, on_error="return", timeout=240)
    told["imap", way] = list(sf.parallel_imap(work, range(12), ways, n=4, on_error="return", timeout=240))
    with sf.Executor(4) as executor:
        futures = [executor.submit(work, item, way) for item in range(12)]
        told["executor", way] = [future.exception(240) or future.result() for future in futures]
print(json.dumps({" ".join(case): [outcome(result) for result in results] for case, results in told.items()}))
"""
    ).ok()  # fmt: skip
    told = json.loads(ended.out)
    assert len(told) == 15
    for case, results in told.items():
        for item, result in enumerate(results):
            if item != BAD:
                assert result == item, (case, results)
        kind, rank, message = results[BAD]
        assert kind == "CloneLost", (case, results)
        assert f"rank {rank}" in message, (case, message)
