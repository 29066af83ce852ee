"""What clones say to the parent of their region: the one place where it is read. Pure functions, no sockets.

A clone runs the user's code, and that code may send anything. Nothing is used before it was checked: a known kind, its fields,
each of its type and in its range, and as many frames as it speaks of. Whatever else comes is a `BadMessage` of that rank, which
costs that rank its results and nobody else's.

Pickles are not looked into here: what unpickling raises is the error of the key that it belongs to.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from sfparallel import wire
from sfparallel.errors import ProtocolError
from sfparallel.runtime.parts import MAX_FRAMES
from sfparallel.text import shown

MAX_HEADER_BYTES = 16 << 20
"""A header holds a small pickle, the text of an error, or the names of collected files."""

MAX_KEYS = 1 << 16
_PATH_BYTES = 4096
_NAME_BYTES = 255
_WHOLE_BITS = 63


class Kind(enum.StrEnum):
    """Kinds of messages; up to PARTS from clone to parent, the others from parent to clone."""

    RESULT = "result"
    ERROR = "error"
    COMM = "comm"
    WHO_LEFT = "who left"
    DONE = "done"
    UNFIT = "unfit"
    FAILED = "failed"
    READY = "ready"
    BACK = "back"
    PARTS = "parts"
    KEYS = "keys"
    LOST = "lost"
    LEFT = "left"
    RELEASE = "release"


FROM_CLONES = {kind.value: kind for kind in
               (Kind.RESULT, Kind.ERROR, Kind.COMM, Kind.WHO_LEFT, Kind.DONE, Kind.UNFIT, Kind.FAILED, Kind.READY,
                Kind.BACK, Kind.PARTS)}


class FileNote(NamedTuple):
    """A collected file: its path below the current folder, as it was checked to be, and its permissions."""

    path: str
    mode: int


class Message(NamedTuple):
    """One message of a rank. Fields that its kind does not have are empty.

    Attributes:
        key: what RESULT and ERROR answer.
        frames: the pickle of RESULT, ERROR, UNFIT or FAILED and its buffers; none for an error that could not be pickled.
        files, contents: collected files of a RESULT.
        error: type, message and traceback of ERROR, UNFIT or FAILED, as text.
        keys: what BACK gives back.
        ran_ns: how long the key took, 0 if nobody measured.
        parts, nbytes: how many, and how long, are the parts that PARTS announces: of a message that comes in pieces behind it.
    """

    kind: Kind
    rank: int
    key: int = -1
    frames: Sequence[memoryview] = ()
    files: Sequence[FileNote] = ()
    contents: Sequence[memoryview] = ()
    error: dict[str, str] = {}  # noqa: RUF012 (nobody writes to it)
    keys: Sequence[int] = ()
    ran_ns: int = 0
    parts: int = 0
    nbytes: int = 0


class BadMessage(NamedTuple):
    """A rank has sent what no rank sends."""

    rank: int
    why: str


def decode(rank: int, parts: Sequence[Any]) -> Message | BadMessage:
    """Read what came over the network.

    Args:
        rank: whose connection it came by.
        parts: the header, as bytes, and the frames behind it, as memoryviews.
    """
    try:
        if not parts:
            raise ProtocolError("a message without a header")
        header = _header(parts[0])
        claimed = header.get("rank")
        if type(claimed) is not int or claimed != rank:
            raise ProtocolError(f"a message that claims to come from rank {shown(claimed)}")
        return _decode(rank, header, parts[1:])
    except ProtocolError as error:
        return BadMessage(rank, str(error))


def decode_answer(rank: int, data: bytes) -> Message | BadMessage:
    """Read what came with a clone's exit, by way of the supervisor (`link.pack_answer`)."""
    try:
        message = _decode(rank, _header(data), ())
    except ProtocolError as error:
        return BadMessage(rank, str(error))
    if message.kind not in (Kind.RESULT, Kind.ERROR):
        return BadMessage(rank, f"a message {message.kind.value!r} as its answer")
    return message


def claims(parts: Sequence[Any]) -> int:
    """Which rank a message says that it comes from; -1 if it does not say so."""
    try:
        rank = _header(parts[0]).get("rank") if parts else None
    except ProtocolError:
        return -1
    return rank if type(rank) is int else -1


def _header(data: bytes) -> dict[Any, Any]:
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(data)} bytes; it may have {MAX_HEADER_BYTES}")
    return wire.unpack(data)


def _decode(rank: int, header: dict[Any, Any], beside: Sequence[memoryview]) -> Message:
    name = header.get("kind")
    kind = FROM_CLONES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"a message of unknown kind {shown(name)}")
    if kind is Kind.RESULT or kind is Kind.ERROR:
        frames, key, ran_ns = _frames(header, beside), _whole(header, "key"), _whole(header, "ran_ns", 0)
        if kind is Kind.ERROR:
            return Message(kind, rank, key, frames, error=_error(header), ran_ns=ran_ns)
        files = _files(header)
        payload = len(frames) - len(files)
        if payload < 1:
            raise ProtocolError(f"a result of {len(frames)} frames with {len(files)} files")
        return Message(kind, rank, key, frames[:payload], files, frames[payload:], ran_ns=ran_ns)
    if kind is Kind.UNFIT or kind is Kind.FAILED:
        return Message(kind, rank, frames=_frames(header, beside), error=_error(header))
    if beside:
        raise ProtocolError(f"a message {kind.value!r} with {len(beside)} frames behind it")
    if kind is Kind.BACK:
        return Message(kind, rank, keys=_keys(header))
    if kind is Kind.PARTS:
        return Message(kind, rank, parts=_whole(header, "count", highest=MAX_FRAMES + 1), nbytes=_whole(header, "nbytes"))
    return Message(kind, rank)


def _whole(header: dict[Any, Any], name: str, default: int | None = None, highest: int = (1 << _WHOLE_BITS) - 1) -> int:
    value = header.get(name, default)
    if type(value) is not int or not 0 <= value <= highest:
        raise ProtocolError(f"{name!r} must be a whole number from 0 to {highest}, not {shown(value)}")
    return value


def _frames(header: dict[Any, Any], beside: Sequence[memoryview]) -> Sequence[memoryview]:
    """The pickle in the header, if it is there, else what comes behind it."""
    pickled = header.get("pickle")
    if pickled is None:
        if len(beside) > MAX_FRAMES:
            raise ProtocolError(f"a message of more than {MAX_FRAMES} frames")
        return beside
    if not isinstance(pickled, bytes) or beside:
        raise ProtocolError("a pickle that is not bytes, or comes twice")
    return [memoryview(pickled)] if pickled else []


def _keys(header: dict[Any, Any]) -> list[int]:
    keys = header.get("keys")
    if not isinstance(keys, list) or not 0 < len(keys) <= MAX_KEYS or any(type(key) is not int or key < 0 for key in keys):
        raise ProtocolError(f"'keys' must be a list of 1 to {MAX_KEYS} whole numbers, not {shown(keys)}")
    return keys


def _error(header: dict[Any, Any]) -> dict[str, str]:
    error = header.get("error")
    if not isinstance(error, dict):
        raise ProtocolError("an error without a description")
    texts = {name: error.get(name) for name in ("type", "message", "traceback")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ProtocolError(f"an error whose {name} is not text")
    return texts  # type: ignore[return-value]


def _files(header: dict[Any, Any]) -> list[FileNote]:
    listed = header.get("files", [])
    if not isinstance(listed, list) or len(listed) > MAX_FRAMES:
        raise ProtocolError(f"'files' must be a list of at most {MAX_FRAMES}, not {shown(listed)}")
    notes = [_file(each) for each in listed]
    if len({note.path for note in notes}) < len(notes):
        raise ProtocolError("the same file twice")
    return notes


def _file(each: Any) -> FileNote:
    if not isinstance(each, dict):
        raise ProtocolError("a file without a description")
    name = each.get("path")
    if not isinstance(name, bytes) or not 0 < len(name) <= _PATH_BYTES or b"\0" in name:
        raise ProtocolError("a file without a valid path")
    path = os.fsdecode(name)
    pure = PurePosixPath(path)
    too_long = any(len(os.fsencode(part)) > _NAME_BYTES for part in pure.parts)
    if pure.is_absolute() or ".." in pure.parts or not pure.name or too_long:
        raise ProtocolError(f"a file {path[:100]!r}, which is not below the current folder")
    return FileNote(str(pure), _whole(each, "mode", highest=0o777))
