"""What programs in the VMs may ask the supervisor for: one table, by which every request is read.

A request comes from a guest, and whoever is root there can write anything to the agent port. So nothing of it is used before all
of it was checked: known name, known fields, each of its type and in its range. Pure functions, without any I/O.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfparallel.errors import UsageError
from sfparallel.text import shown
from sfparallel.wire import MAX_MESSAGE_BYTES, unpack

ANSWER_BYTES = 64 << 10
"""A result up to this size may travel with the clone's last request, which has to be made anyway: a TCP connection to the parent
costs a clone more than a third of its whole life under emulation (measured). Larger ones go over the clone network."""

CONTEXT_BYTES = 4 << 10
CAUSE_CHARS = 1000
"""Of the text in which a clone, its guest or its QEMU say why it ends: it goes on to the parent, in packets of a limited size."""

MOST_RANKS = 1 << 16

Check = Callable[[Any], Any]
"""Returns a value as it is to be used, or raises ValueError with what it must be."""


class Caller(enum.Enum):
    """Which VMs may make a request."""

    ANY = "any VM"
    CLONE = "a clone"


class BadRequest(UsageError):
    """A request that no program of ours makes.

    Attributes:
        op: its name, empty if it has none that is known.
        id: the number under which its sender waits for an answer, None if that is unreadable.
    """

    def __init__(self, message: str, op: str = "", number: int | None = None) -> None:
        super().__init__(message)
        self.op = op
        self.id = number


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request; one that is optional has `default` when it is missing."""

    check: Check
    required: bool = True
    default: Any = None


@dataclass(frozen=True, slots=True)
class Op:
    """A request: who may make it, whether an answer is awaited, and its fields."""

    fields: dict[str, Field]
    caller: Caller = Caller.ANY
    answered: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was read: all fields of its `Op` are there, and right."""

    op: str
    id: int | None
    fields: dict[str, Any]


def whole(lowest: int, highest: int) -> Check:
    """A whole number in a range (no bool, which Python takes for one)."""

    def check(value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"a whole number from {lowest} to {highest}")
        return value

    return check


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError("a number of seconds, at least 0")
    return float(value)


def _some_bytes(most: int) -> Check:

    def check(value: Any) -> bytes:
        if not isinstance(value, bytes) or len(value) > most:
            raise ValueError(f"at most {most} bytes")
        return value

    return check


def _ranks(value: Any) -> frozenset[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MOST_RANKS or any(type(rank) is not int for rank in value):
        raise ValueError(f"a list of at most {MOST_RANKS} whole numbers")
    return frozenset(value)


def _cause(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return shortened(value)


def shortened(cause: str) -> str:
    """A cause of a bounded size."""
    return cause if len(cause) <= CAUSE_CHARS else f"{cause[:CAUSE_CHARS]} ..."


_ID = whole(0, (1 << 63) - 1)
_COUNT = whole(1, (1 << 63) - 1)
_NUMBER = Field(whole(0, (1 << 63) - 1))
_STATUS = Field(whole(-(1 << 31), (1 << 31) - 1))
_SOME_RANKS = Field(_ranks, required=False)
_LIMIT = Field(_seconds, required=False)

REQUESTS: dict[str, Op] = {
    "hello": Op({}),
    "ticket": Op({"n": Field(_COUNT)}),
    "clone": Op({"ticket": _NUMBER, "context": Field(_some_bytes(CONTEXT_BYTES), required=False, default=b""),
                 "within_s": _LIMIT}),
    "checkpoint": Op({"within_s": _LIMIT}),
    "create": Op({"ticket": _NUMBER, "checkpoint": _NUMBER, "first": Field(whole(0, (1 << 31) - 1), required=False, default=1),
                  "within_s": _LIMIT}),
    "drop": Op({"checkpoint": _NUMBER}),
    "join": Op({"ticket": _NUMBER}),
    "kill": Op({"ticket": _NUMBER, "ranks": _SOME_RANKS}),
    "signal": Op({"ticket": _NUMBER, "number": Field(whole(1, 64)), "ranks": _SOME_RANKS}),
    "stats": Op({"ticket": _NUMBER, "first_s": Field(_seconds), "last_s": Field(_seconds)}, answered=False),
    "exit": Op({"status": _STATUS, "ran_ns": Field(whole(0, (1 << 63) - 1), required=False, default=0),
                "answer": Field(_some_bytes(ANSWER_BYTES), required=False, default=b"")}, Caller.CLONE, answered=False),
    "abort": Op({"status": _STATUS, "cause": Field(_cause)}, Caller.CLONE, answered=False),
}  # fmt: skip
"""All requests; `Regions` has a handler for each. (`file`, the copy-back of a change, is read by `copy_back`.)"""


def decode(payload: bytes) -> Request:
    """Read a request.

    Raises:
        ProtocolError: it is no message at all.
        BadRequest: it is none of the table, or one of its fields is wrong.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise BadRequest(f"a request may have {MAX_MESSAGE_BYTES} bytes, not {len(payload)}")
    message = unpack(payload)
    number = message.get("id")
    if number is not None:
        try:
            number = _ID(number)
        except ValueError as error:
            raise BadRequest(f"the id of a request must be {error}") from None
    op = message.get("op")
    if not isinstance(op, str) or op not in REQUESTS:
        raise BadRequest(f"the supervisor knows no request {shown(op)}", number=number)
    wanted = REQUESTS[op]
    if wanted.answered and number is None:
        raise BadRequest(f"the request {op!r} has no id, so it cannot be answered", op)
    return Request(op, number, {name: _read(op, number, name, field, message) for name, field in wanted.fields.items()})


def _read(op: str, number: int | None, name: str, field: Field, message: dict[Any, Any]) -> Any:
    if name not in message:
        if field.required:
            raise BadRequest(f"the request {op!r} lacks {name!r}", op, number)
        return field.default
    try:
        return field.check(message[name])
    except ValueError as error:
        raise BadRequest(f"{name!r} of the request {op!r} must be {error}, not {shown(message[name])}", op, number) from None
