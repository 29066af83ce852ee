"""Frames from a guest as typed values: the one place where what an agent port says is read.

Whoever is root in a guest can take the agent's port and write anything to it. So no frame is acted upon before it was checked
here; what no agent of ours sends is a ProtocolError, which ends that VM and nothing else. (Requests of programs, FUSE requests
and changes of files are opaque to the agent; `requests`, `fuse_wire` and `copy_back` read them.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sfparallel.errors import ProtocolError
from sfparallel.wire import MAX_MESSAGE_BYTES, Frame, FrameType, unpack

MAX_TEXT_CHARS = 1000
"""Of what a guest gives as the reason of its end: it is kept, shown, and sent to the parent."""

_OUTPUTS = (1, 2)
_MAX_REPORT_BYTES = 4096
_FROM_GUESTS = frozenset(kind for kind in FrameType if kind < FrameType.FREEZE)
_EMPTY = frozenset({FrameType.GONE, FrameType.TAKEN})


@dataclass(frozen=True, slots=True)
class Frozen:
    """The guest stands still; so many processes were killed for want of memory since its boot."""

    oom_kills: int


@dataclass(frozen=True, slots=True)
class Woken:
    """The guest has its identity: what the way there from THAW took, on its own clocks."""

    cpu_ns: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class Exited:
    """The program has ended: its raw wait status, of one that exited or was killed."""

    status: int
    oom_kills: int


def check(frame: Frame) -> None:
    """Raises ProtocolError for a frame that no agent sends, as far as type, channel and size tell."""
    if frame.type not in _FROM_GUESTS:
        raise ProtocolError(f"frame {frame.type.name} is sent to guests only")
    if frame.type is FrameType.OUTPUT and frame.channel not in _OUTPUTS:
        # The channel is a descriptor of ours.
        raise ProtocolError(f"output for channel {frame.channel}")
    if frame.type is FrameType.REQUEST and len(frame.payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a request of {len(frame.payload)} bytes; the agent takes {MAX_MESSAGE_BYTES} from a program")
    if frame.type in _EMPTY and frame.payload:
        raise ProtocolError(f"frame {frame.type.name} with {len(frame.payload)} bytes")


def frozen(frame: Frame) -> Frozen:
    """Read FROZEN."""
    return Frozen(_number(_report(frame), "oom_kills"))


def woken(frame: Frame) -> Woken:
    """Read WOKEN."""
    report = _report(frame)
    return Woken(_number(report, "cpu_ns"), _number(report, "wall_ns"))


def exited(frame: Frame) -> Exited:
    """Read EXITED."""
    report = _report(frame)
    status = _number(report, "status")
    # What waitpid(2) returns for a process that has ended; os.waitstatus_to_exitcode takes nothing else.
    if status > 0xFFFF or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        raise ProtocolError(f"{status} is not the wait status of a program that has ended")
    return Exited(status, _number(report, "oom_kills"))


def failed(frame: Frame) -> str:
    """Read FAILED."""
    text = frame.payload[: 4 * MAX_TEXT_CHARS].decode(errors="replace").strip()
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}..."


def _report(frame: Frame) -> dict[Any, Any]:
    if len(frame.payload) > _MAX_REPORT_BYTES:
        raise ProtocolError(f"frame {frame.type.name} of {len(frame.payload)} bytes")
    return unpack(frame.payload)


def _number(report: dict[Any, Any], key: str) -> int:
    value = report.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ProtocolError(f"{key} is {value!r:.40}, not a number")
    return value
