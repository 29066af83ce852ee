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
