"""Requests from guests, which may be anything: read by one table, and either right in all fields or refused."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfparallel.errors import ProtocolError, SfError
from sfparallel.vmm.replies import failure
from sfparallel.vmm.requests import ANSWER_BYTES, CAUSE_CHARS, REQUESTS, BadRequest, Request, decode
from sfparallel.wire import MAX_MESSAGE_BYTES, pack, unpack

GOOD: dict[str, dict[str, Any]] = {
    "hello": {"id": 1},
    "ticket": {"id": 1, "n": 4},
    "clone": {"id": 1, "ticket": 1, "context": b"f"},
    "checkpoint": {"id": 1},
    "create": {"id": 1, "ticket": 1, "checkpoint": 1, "first": 0},
    "drop": {"id": 1, "checkpoint": 1},
    "join": {"id": 1, "ticket": 1},
    "kill": {"id": 1, "ticket": 1, "ranks": [1, 2]},
    "signal": {"id": 1, "ticket": 1, "number": 9},
    "stats": {"ticket": 1, "first_s": 0.5, "last_s": 1},
    "exit": {"status": 0, "answer": b"x", "ran_ns": 5},
    "abort": {"status": 1, "cause": "raised KeyError"},
}

texts = st.text("a0\x00\u00e4\u2603\U0001f40c", max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | texts | st.binary(max_size=100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(0, 9), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["op", "id", *sorted({name for op in REQUESTS.values() for name in op.fields})])


def test_requests_as_programs_make_them() -> None:
    assert GOOD.keys() == REQUESTS.keys()
    for op, fields in GOOD.items():
        request = decode(pack({"op": op, **fields}))
        assert (request.op, request.id) == (op, fields.get("id"))
        assert request.fields.keys() == REQUESTS[op].fields.keys()
    assert decode(pack({"op": "kill", "id": 1, "ticket": 1})).fields["ranks"] is None
    assert decode(pack({"op": "kill", "id": 1, "ticket": 1, "ranks": []})).fields["ranks"] == frozenset()
    assert decode(pack({"op": "create", "id": 1, "ticket": 1, "checkpoint": 2})).fields["first"] == 1


@pytest.mark.parametrize(("op", "field", "value"), [
    ("exit", "status", "1" * 30), ("exit", "status", 1 << 40), ("exit", "status", None), ("exit", "status", True),
    ("exit", "answer", bytes(ANSWER_BYTES + 1)), ("exit", "answer", "text"), ("exit", "ran_ns", -1), ("exit", "ran_ns", 1.5),
    ("abort", "cause", b"\xff"), ("abort", "status", math.nan),
    ("ticket", "n", 0), ("ticket", "n", -1), ("ticket", "n", 2.0), ("ticket", "n", "4"), ("ticket", "n", [4]),
    ("signal", "number", 0), ("signal", "number", 65), ("signal", "ranks", 3), ("signal", "ranks", [[1]]),
    ("kill", "ranks", [1] * 70_000), ("kill", "ranks", {"1": 2}), ("kill", "ticket", -1),
    ("stats", "first_s", math.nan), ("stats", "last_s", math.inf), ("stats", "last_s", -1.0),
    ("create", "first", "x"), ("create", "checkpoint", 1.0), ("clone", "context", "text"), ("clone", "context", bytes(10_000)),
    ("join", "id", "1"), ("join", "id", -1), ("join", "id", None), ("join", "id", {}),
])  # fmt: skip
def test_a_wrong_field_is_named(op: str, field: str, value: object) -> None:
    with pytest.raises(BadRequest, match=field) as caught:
        decode(pack({"op": op, **GOOD[op], field: value}))
    answer = failure(caught.value)
    assert answer["error"] == "invalid"
    assert len(pack(answer)) < 500, "the answer repeats no megabytes"


@pytest.mark.parametrize("op", REQUESTS)
def test_a_missing_field_is_named(op: str) -> None:
    for name, field in REQUESTS[op].fields.items():
        if field.required:
            with pytest.raises(BadRequest, match=f"lacks '{name}'"):
                decode(pack({"op": op, **{key: value for key, value in GOOD[op].items() if key != name}}))


def test_a_long_cause_is_cut() -> None:
    cause = decode(pack({"op": "abort", "status": 1, "cause": "x" * 100_000})).fields["cause"]
    assert len(cause) < CAUSE_CHARS + 10


@pytest.mark.parametrize("data", [
    b"", b"\xc1", b"\x90", b"\x80" * 2, b"\x81\x90\x01", b"\x81\x80\x01", b"\x91" * 5000, b"\xdf\xff\xff\xff\xff",
    b"\x81\xa2op\xa1\xff", b"\x81\xa2id\xc7\x03\xff\x00\x00\x00",
], ids=lambda data: data[:6].hex())  # fmt: skip
def test_what_is_no_message_is_an_error_of_ours(data: bytes) -> None:
    """Of keys that are lists, msgpack says TypeError; of depth, StackError."""
    with pytest.raises(ProtocolError):
        unpack(data)
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert failure(caught.value)["error"] == "invalid"


def test_the_largest_request() -> None:
    with pytest.raises(BadRequest, match="bytes"):
        decode(pack({"op": "hello", "id": 1, "x": bytes(MAX_MESSAGE_BYTES)}))


def check(data: bytes) -> None:
    try:
        request = decode(data)
    except SfError as error:
        assert failure(error)["error"] == "invalid"
        assert len(pack({"id": getattr(error, "id", None), **failure(error)})) < 2000
        return
    assert isinstance(request, Request)
    assert request.fields.keys() == REQUESTS[request.op].fields.keys()
    assert (request.id is not None) or not REQUESTS[request.op].answered
    for value in (request.id, *request.fields.values()):
        assert value is None or isinstance(value, int | float | str | bytes | frozenset)
        assert not isinstance(value, float) or math.isfinite(value)
        assert not isinstance(value, int) or abs(value) < 1 << 63


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    check(data)


@settings(deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.dictionaries(names, values, max_size=4), st.sets(names, max_size=2))
@example("exit", {"status": float("nan")}, set())
def test_any_fields(op: str, changed: dict[str, Any], missing: set[str]) -> None:
    message = {"op": op, **GOOD[op], **changed}
    check(msgpack.packb({key: value for key, value in message.items() if key not in missing}, use_bin_type=True,
                        unicode_errors="surrogatepass"))
