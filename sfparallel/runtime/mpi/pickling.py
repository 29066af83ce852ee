"""Objects as bytes: pickle protocol 5, large buffers beside the pickle instead of inside (PEP 574).

A payload with PARTS is a table (number of parts, their lengths), then the parts, each at a multiple of `ALIGN`: the pickle, and
its buffers in order. It arrives in one piece of memory, in which the arrays stay.
"""

from __future__ import annotations

import pickle as python_pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any

from sfparallel.runtime.mpi.buffers import buffer
from sfparallel.runtime.mpi.errors import ERR_UNKNOWN, MPIException
from sfparallel.runtime.mpi.matching import PARTS, Buffer

ALIGN = 64
OUT_OF_BAND_BYTES = 16 << 10
"""Smaller buffers stay in the pickle: a copy costs less than a part of its own."""

PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))
"""Types whose objects have no buffers to leave out, and are always pickled."""

_COUNT = struct.Struct("<Q")
_ZEROS = bytes(ALIGN)
THRESHOLD = 1 << 18

Payload = tuple[int, list[Buffer], int]
"""Flags, frames, length."""


class Pickle:
    """How lower-case calls turn objects into bytes (mpi4py's `MPI.Pickle`).

    Args:
        dumps, loads: instead of pickle's; objects then travel in one piece.
        protocol: of pickle.
        threshold: size in bytes from which `dumps_oob` leaves buffers out.
    """

    def __init__(self, dumps: Callable[..., bytes] | None = None, loads: Callable[[Any], Any] | None = None,
                 protocol: int | None = None, threshold: int | None = None) -> None:
        self._dumps = dumps or python_pickle.dumps
        self._loads = loads or python_pickle.loads
        self._own = dumps is None and loads is None and protocol is None
        self.PROTOCOL = protocol
        self.THRESHOLD = threshold

    @property
    def PROTOCOL(self) -> int | None:
        return self._protocol

    @PROTOCOL.setter
    def PROTOCOL(self, protocol: int | None) -> None:
        if protocol is None and self._dumps is python_pickle.dumps:
            protocol = python_pickle.HIGHEST_PROTOCOL
        self._protocol = protocol

    @property
    def THRESHOLD(self) -> int:
        return self._threshold

    @THRESHOLD.setter
    def THRESHOLD(self, threshold: int | None) -> None:
        self._threshold = THRESHOLD if threshold is None else threshold

    def dumps(self, obj: Any) -> bytes:
        """Serialize an object."""
        return self._dumps(obj) if self._protocol is None else self._dumps(obj, self._protocol)

    def loads(self, data: Any) -> Any:
        """The object again."""
        return self._loads(data)

    def dumps_oob(self, obj: Any) -> tuple[bytes, list[buffer]]:
        """Serialize an object; large buffers are left out and returned."""
        buffers: list[buffer] = []

        def keep(out: python_pickle.PickleBuffer) -> bool:
            view = out.raw()
            if view.nbytes < self._threshold:
                return True
            buffers.append(buffer(view))
            return False

        if self._protocol is None:
            return self._dumps(obj), buffers
        protocol = self._protocol if self._protocol < 0 else max(self._protocol, 5)
        return self._dumps(obj, protocol, buffer_callback=keep), buffers

    def loads_oob(self, data: Any, buffers: Iterable[Any]) -> Any:
        """The object again, from both."""
        loads: Any = self._loads
        return loads(data, buffers=buffers)

    def payload(self, obj: Any) -> Payload:
        """An object as a message; its large buffers are referred to, not copied."""
        if not self._own:
            data = self.dumps(obj)
            return 0, [data], len(data)
        if type(obj) in PLAIN:
            data = python_pickle.dumps(obj, 5)
            return 0, [data], len(data)
        outside: list[memoryview] = []

        def keep(out: python_pickle.PickleBuffer) -> bool:
            try:
                view = out.raw()
            except BufferError:
                return True  # not contiguous: pickle copies it
            if view.nbytes < OUT_OF_BAND_BYTES:
                return True
            outside.append(view)
            return False

        try:
            data = python_pickle.dumps(obj, 5, buffer_callback=keep)
        except (python_pickle.PicklingError, AttributeError, TypeError):
            # Functions without a name that can be imported. Seldom needed, and slow to import.
            from sfparallel.runtime import by_value
            outside.clear()
            data = by_value.dumps(obj, keep)
        if not outside:
            return 0, [data], len(data)
        return _joined(data, outside)

    def object(self, payload: Buffer, flags: int) -> Any:
        """The object of a message."""
        if not len(payload):
            return None  # a message without data, of `Send`
        if not flags & PARTS:
            return self._loads(payload)
        view = memoryview(payload)
        lengths, at = _table(view)
        parts = []
        for length in lengths:
            parts.append(view[at:at + length])
            at = _aligned(at + length)
        return python_pickle.loads(parts[0], buffers=[_writable(part) for part in parts[1:]])


def _table(view: memoryview) -> tuple[tuple[int, ...], int]:
    """The lengths of a payload's parts, and where the first of them begins.

    Raises:
        MPIException: there is no such table: whoever sent it is no `Pickle`.
    """
    count = _COUNT.unpack_from(view)[0] if len(view) >= _COUNT.size else 0
    if not 0 < count < len(view) // 8:
        raise MPIException(ERR_UNKNOWN, "an object was sent in parts, without a table of these")
    lengths = struct.unpack_from(f"<{count}Q", view, 8)
    at = end = _aligned(8 + 8 * count)
    for length in lengths:
        end = _aligned(end) + length
    if end > len(view):
        raise MPIException(ERR_UNKNOWN, f"an object of {end} bytes was sent in {len(view)}")
    return lengths, at


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _writable(part: memoryview) -> Buffer:
    return bytearray(part) if part.readonly else part


def _joined(data: bytes, outside: list[memoryview]) -> Payload:
    parts: list[Buffer] = [data, *outside]
    lengths = [len(part) for part in parts]
    table = struct.pack(f"<{len(parts) + 1}Q", len(parts), *lengths)
    frames: list[Buffer] = []
    at = 0
    for part in (table, *parts):
        padding = _aligned(at) - at
        if padding:
            frames.append(_ZEROS[:padding])
        frames.append(part)
        at += padding + len(part)
    return PARTS, frames, at


pickle = Pickle()
