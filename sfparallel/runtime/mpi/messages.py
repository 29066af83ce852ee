"""What a user passes as a buffer (`buf`, `[buf, type]`, `[buf, count, type]`, `[buf, (counts, displs), type]`), as typed blocks.

The forms and their defaults are mpi4py's: an omitted type follows from the memory's format, an omitted count from its length.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from sfparallel.runtime.mpi.buffers import BOTTOM, Bytes, at_address, byte_array, exports, is_buffer, item_format
from sfparallel.runtime.mpi.constants import PROC_NULL
from sfparallel.runtime.mpi.datatype import TypeCore
from sfparallel.runtime.mpi.errors import ERR_BUFFER, ERR_TYPE, MPIException
from sfparallel.runtime.mpi.types import BYTE, Datatype, lookup

_NOTHING: Bytes = np.empty(0, np.uint8)


class Block:
    """`count` elements of a type in memory.

    Attributes:
        data: the memory.
        origin: where in `data` the first element's address is.
    """

    __slots__ = ("core", "count", "data", "nbytes", "origin")

    def __init__(self, data: Bytes, origin: int, count: int, core: TypeCore) -> None:
        self.data = data
        self.origin = origin
        self.count = count
        self.core = core
        self.nbytes = count * core.size

    def check(self) -> Block:
        """Raise if it reaches beyond its memory."""
        first, end = self.core.span(self.count)
        if self.count < 0 or (self.nbytes and (self.origin + first < 0 or self.origin + end > len(self.data))):
            raise MPIException(ERR_BUFFER, f"{self.count} elements of {self.core.name or 'this type'} do not fit into the buffer")
        return self

    def read(self) -> Bytes:
        """The data, packed; memory of the user's if it is contiguous there."""
        self.check()
        return self.core.pack(self.data, self.origin, self.count)

    def place(self) -> memoryview:
        """Where packed data may go; then call `put` with it."""
        self.check()
        if self.core.is_contiguous:
            return self.data[self.origin:self.origin + self.nbytes].data
        return np.empty(self.nbytes, np.uint8).data

    def put(self, packed: Any, nbytes: int | None = None) -> None:
        """Packed data has arrived, in `place` or elsewhere."""
        if self.core.is_contiguous and isinstance(packed, memoryview) and packed.nbytes and _same(packed, self.data, self.origin):
            return
        source = np.frombuffer(packed, np.uint8) if len(packed) else _NOTHING
        self.core.unpack(source if nbytes is None else source[:nbytes], self.data, self.origin, self.count)

    def part(self, index: int, count: int) -> Block:
        """`count` elements from the element `index` on."""
        return Block(self.data, self.origin + index * self.core.extent, count, self.core)


def _same(packed: memoryview, data: Bytes, origin: int) -> bool:
    return bool(np.frombuffer(packed, np.uint8).ctypes.data == data.ctypes.data + origin)


EMPTY = Block(_NOTHING, 0, 0, BYTE._core)


def _is_type(value: Any) -> bool:
    return isinstance(value, Datatype | str)


def _type_of(value: Any) -> TypeCore | None:
    core: TypeCore | None = (value if isinstance(value, Datatype) else lookup(value))._core
    return core


def _memory(buf: Any, kind: Any, readonly: bool) -> tuple[Bytes, TypeCore | None]:
    """Memory and type of the first part of a message."""
    if buf is BOTTOM or buf is None:
        if kind is None:
            return _NOTHING, BYTE._core
        return _NOTHING, _type_of(kind)
    if kind is None:
        format = item_format(buf)
        core = lookup(format)._core if format else BYTE._core
    else:
        core = _type_of(kind)
    return byte_array(buf, readonly=readonly), core


def _extent(core: TypeCore | None, purpose: str) -> int:
    if core is None:
        raise ValueError(f"message: cannot {purpose}, datatype is null")
    if core.extent <= 0:
        raise ValueError(f"message: cannot {purpose}, datatype extent {core.extent} (lb:{core.lb}, ub:{core.lb + core.extent})")
    return core.extent


def _split(message: Any, *, vector: bool) -> tuple[Any, Any, Any, Any]:
    """Buffer, count(s), displacement(s) and type, as far as they are given."""
    if not isinstance(message, list | tuple):
        if message is None or is_buffer(message) or exports(message):
            if message is None:
                raise TypeError("message: expecting buffer or list/tuple")
            return message, None, None, None
        raise TypeError("message: expecting buffer or list/tuple")
    buf, count, displ, kind = None, None, None, None
    if len(message) == 2:
        buf, count = message
        if _is_type(count):
            count, kind = None, count
    elif len(message) == 3:
        buf, count, kind = message
    elif len(message) == 4:
        buf, count, displ, kind = message
    else:
        raise ValueError("message: expecting 2 to 4 items")
    pairs = (tuple,) if vector else (tuple, list)
    if isinstance(count, pairs) and len(message) < 4:
        count, displ = count
    return buf, count, displ, kind


def simple(message: Any, *, readonly: bool, peer: int = 0, parts: int = 0) -> Block:
    """A block from a message specification.

    Args:
        peer: PROC_NULL stands for no message at all.
        parts: number of equal parts of which the count of one is wanted; 0 or 1 for the whole.
    """
    if peer == PROC_NULL:
        return EMPTY
    buf, o_count, o_displ, kind = _split(message, vector=False)
    data, core = _memory(buf, kind, readonly)
    length, offset, count = len(data), 0, 0
    if o_displ is not None:
        displ = operator.index(o_displ)
        if displ < 0:
            raise ValueError(f"message: negative displacement {displ}")
        if displ > 0:
            extent = _extent(core, "handle displacement")
            if displ * extent > length:
                raise ValueError(f"message: displacement {displ} out of bounds, number of datatype entries {length // extent}")
            offset = displ * extent
            length -= offset
    if o_count is not None:
        count = operator.index(o_count)
        if count < 0:
            raise ValueError(f"message: negative count {count}")
        if count > 0 and buf is None:
            raise ValueError(f"message: buffer is None but count is {count}")
    elif length > 0:
        extent = _extent(core, "infer count")
        if length % extent:
            raise ValueError(f"message: cannot infer count, buffer length {length} is not a multiple of datatype extent {extent} "
                             f"(lb:{core.lb if core else 0}, ub:{(core.lb if core else 0) + extent})")
        count = length // extent
        if parts > 1:
            if count % parts:
                raise ValueError(f"message: cannot infer count, number of entries {count} is not a multiple of required number "
                                 f"of blocks {parts}")
            count //= parts
    return _block(data, offset, count, core, buf is BOTTOM)


def _block(data: Bytes, offset: int, count: int, core: TypeCore | None, absolute: bool) -> Block:
    if core is None:
        raise MPIException(ERR_TYPE, "null datatype")
    if absolute:
        # Displacements of the type are addresses.
        first, end = core.span(count)
        return Block(at_address(first, end - first), -first, count, core)
    return Block(data, offset, count, core)


def _is_integral(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _integers(value: Any, parts: int, what: str) -> list[int]:
    numbers = [operator.index(each) for each in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if len(numbers) != parts:
        raise ValueError(f"message: expecting {parts} {what}, got {len(numbers)}")
    return numbers


def vector(message: Any, *, readonly: bool, parts: int, peer: int = 0) -> list[Block]:
    """One block for each of `parts` ranks."""
    if peer == PROC_NULL:
        return [EMPTY] * parts
    buf, o_counts, o_displs, kind = _split(message, vector=True)
    data, core = _memory(buf, kind, readonly)
    if o_counts is None:
        entries = 0
        if len(data):
            extent = _extent(core, "infer count")
            if len(data) % extent:
                raise ValueError(f"message: cannot infer count, buffer length {len(data)} is not a multiple of datatype extent "
                                 f"{extent} (lb:{core.lb if core else 0}, ub:{(core.lb if core else 0) + extent})")
            entries = len(data) // extent
        counts = [entries // parts + (entries % parts > i) for i in range(parts)]
    elif _is_integral(o_counts):
        counts = [operator.index(o_counts)] * parts
    else:
        counts = _integers(o_counts, parts, "counts")
    if o_displs is None:
        displs = [sum(counts[:i]) for i in range(parts)]
    elif _is_integral(o_displs):
        displs = [operator.index(o_displs) * i for i in range(parts)]
    else:
        displs = _integers(o_displs, parts, "displacements")
    if core is None:
        raise MPIException(ERR_TYPE, "null datatype")
    return [_block(data, displ * core.extent, count, core, buf is BOTTOM) if count else Block(data, 0, 0, core)
            for count, displ in zip(counts, displs, strict=True)]


def vector_w(message: Any, *, readonly: bool, parts: int) -> list[Block]:
    """One block of its own type for each of `parts` ranks; displacements in bytes."""
    counts: Sequence[int] | None
    displs: Sequence[int] | None
    if len(message) == 2:
        buf, kinds = message
        counts = displs = None
    elif len(message) == 3:
        buf, (counts, displs), kinds = message
    elif len(message) == 4:
        buf, counts, displs, kinds = message
    else:
        raise ValueError("message: expecting 2 to 4 items")
    if buf is BOTTOM:
        if counts is None:
            raise ValueError("message: BOTTOM requires counts")
        if displs is None:
            raise ValueError("message: BOTTOM requires displs")
    if counts is None and displs is None:
        counts, displs = [1] * parts, [0] * parts
    counts = _integers(counts, parts, "counts")
    displs = _integers(displs, parts, "displacements")
    if len(kinds) != parts:
        raise ValueError(f"message: expecting {parts} datatypes, got {len(kinds)}")
    data = _NOTHING if buf is BOTTOM or buf is None else byte_array(buf, readonly=readonly)
    blocks = []
    for count, displ, kind in zip(counts, displs, kinds, strict=True):
        core = kind._core
        if buf is BOTTOM and count:
            first, end = core.span(count)
            blocks.append(Block(at_address(displ + first, end - first), -first, count, core))
        else:
            blocks.append(_block(data, displ, count, core, False) if count else Block(data, 0, 0, core or BYTE._core))
    return blocks
