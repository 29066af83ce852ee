"""Datatypes: which bytes of a buffer are data, and what they mean.

A type is a list of segments (offset, length) within an extent; an element of an array of that type begins one extent after the
one before. Elementary types also have a numpy dtype, by which reductions compute.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi.buffers import Bytes
from sfparallel.runtime.mpi.errors import ERR_ARG, ERR_TYPE, MPIException
from sfparallel.runtime.mpi.handle import Core

Offsets = npt.NDArray[np.int64]
_BIG_ELEMENT = 1 << 16
_UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class TypeCore(Core):
    """What a datatype is.

    Attributes:
        size: bytes of data in one element.
        lb, extent: where an element begins, and how far the next one is.
        offsets, lengths: the segments, in the order in which they travel; neighbours are joined.
        dtype: numpy's, for elementary types and pairs; the packed form.
        char: type code (struct module, numpy), empty if there is none.
        contents: (integers, addresses, counts, types) by which it was made.
    """

    def __init__(self, offsets: Offsets, lengths: Offsets, lb: int, extent: int, *, combiner: int = c.COMBINER_NAMED,
                 contents: tuple[list[int], list[int], list[int], list[TypeCore]] = ((), (), (), ()),  # type: ignore[assignment]
                 dtype: np.dtype[Any] | None = None, char: str = "", kind: str = "", name: str = "", align: int = 0) -> None:
        self.offsets, self.lengths = _joined(offsets, lengths)
        self.size = int(lengths.sum()) if len(lengths) else 0
        self.lb = lb
        self.extent = extent
        self.combiner = combiner
        self.contents = contents
        self.dtype = dtype
        self.char = char
        self.kind = kind
        self.name = name
        self.align = align
        self.attributes: dict[int, Any] = {}
        self.true_lb = int(self.offsets.min()) if self.size else 0
        self.true_extent = int((self.offsets + self.lengths).max()) - self.true_lb if self.size else 0
        self.is_contiguous = (self.size == self.extent == self.true_extent and not self.lb and not self.true_lb
                              and len(self.offsets) <= 1) or not self.size
        self._index: tuple[int, npt.NDArray[np.int64]] | None = None
        self._unit = 0

    def span(self, count: int) -> tuple[int, int]:
        """First and last byte (exclusive) that `count` elements touch, relative to their address."""
        if not count or not self.size:
            return 0, 0
        far = (count - 1) * self.extent
        return min(self.true_lb, self.true_lb + far), max(self.true_lb, self.true_lb + far) + self.true_extent

    @property
    def unit(self) -> int:
        """Data moves in pieces that are as large as all distances allow: an index takes eight bytes for each of them."""
        if not self._unit:
            distances = np.concatenate((self.offsets, self.lengths, [self.extent]))
            self._unit = int(np.gcd.reduce(distances, initial=max(_UNITS)))
        return self._unit

    def _units(self, count: int, unit: int) -> npt.NDArray[np.int64]:
        """Offsets of all data of `count` elements, in units of so many bytes."""
        if self._index is None or self._index[0] != unit:
            offsets, lengths = self.offsets // unit, self.lengths // unit
            ends = np.cumsum(lengths)
            self._index = unit, np.repeat(offsets - (ends - lengths), lengths) + np.arange(self.size // unit)
        one = self._index[1]
        if count == 1:
            return one
        starts = np.arange(count, dtype=np.int64) * (self.extent // unit)
        return (starts[:, None] + one).ravel()

    def _window(self, data: Bytes, origin: int, count: int, unit: int) -> tuple[Any, npt.NDArray[np.int64]]:
        """The memory that `count` elements span, in units, and where in it their data are."""
        first, end = self.span(count)
        return data[origin + first:origin + end].view(_UNITS[unit]), self._units(count, unit) - first // unit

    def pack(self, data: Bytes, origin: int, count: int) -> Bytes:
        """The data bytes of `count` elements; `origin` is where in `data` the first one's address is."""
        if self.is_contiguous:
            return data[origin:origin + count * self.size]
        if not count:
            return data[:0]
        window, index = self._window(data, origin, count, self.unit)
        packed: Bytes = window[index].view(np.uint8)
        return packed

    def unpack(self, packed: Bytes, data: Bytes, origin: int, count: int) -> None:
        """Put packed bytes, perhaps fewer than `count` elements have, where they belong."""
        if self.is_contiguous:
            data[origin:origin + len(packed)] = packed
        elif len(packed):
            elements = min(count, -(-len(packed) // self.size))
            unit = self.unit if len(packed) % self.unit == 0 else 1
            window, index = self._window(data, origin, elements, unit)
            window[index[:len(packed) // unit]] = packed.view(_UNITS[unit])

    def basic_count(self, nbytes: int) -> int:
        """Number of elementary items in the first `nbytes` of data."""
        if not self.size:
            return 0
        sizes = self.basic_sizes()
        whole, rest = divmod(nbytes, self.size)
        count = whole * len(sizes)
        for size in sizes:
            if rest < size:
                break
            rest -= size
            count += 1
        return count if not rest else c.UNDEFINED

    def basic_sizes(self, *, halves: bool = False) -> list[int]:
        """Sizes of the elementary items of one element; `halves`: complex numbers count as two."""
        if self.kind == "c" and halves:
            return [self.size // 2] * 2
        if self.combiner == c.COMBINER_NAMED:
            if self.dtype is not None and self.dtype.names:
                return [self.dtype[name].itemsize for name in self.dtype.names]
            return [self.size] if self.size else []
        types = self.contents[3]
        if len(types) == 1:
            below = types[0].basic_sizes(halves=halves)
            return below * (self.size // sum(below)) if below else []
        sizes: list[int] = []
        for blocklength, each in zip(self.contents[0][1:], types, strict=False):
            sizes += each.basic_sizes(halves=halves) * blocklength
        return sizes


def _joined(offsets: Offsets, lengths: Offsets) -> tuple[Offsets, Offsets]:
    keep = lengths > 0
    if not keep.all():
        offsets, lengths = offsets[keep], lengths[keep]
    if len(offsets) < 2:
        return offsets, lengths
    first = np.concatenate(([True], offsets[1:] != offsets[:-1] + lengths[:-1]))
    if first.all():
        return offsets, lengths
    starts = np.flatnonzero(first)
    return offsets[starts], np.add.reduceat(lengths, starts)


def _array(values: Sequence[int] | Offsets) -> Offsets:
    return np.asarray(values, dtype=np.int64)


def elementary(name: str, dtype: str | np.dtype[Any], char: str, kind: str, align: int = 0, size: int = 0) -> TypeCore:
    """A named type."""
    numpy_type = np.dtype(dtype) if dtype else None
    nbytes = size or (numpy_type.itemsize if numpy_type else 0)
    return TypeCore(_array([0]), _array([nbytes]), 0, nbytes, dtype=numpy_type, char=char, kind=kind, name=name,
                    align=align or nbytes)


def pair(name: str, value: str, index: str) -> TypeCore:
    """A value and an index, laid out as in C."""
    fields = [("value", value), ("index", index)]
    aligned = np.dtype(fields, align=True)
    packed = np.dtype(fields)
    place = aligned.fields["index"][1]  # type: ignore[index]
    sizes = [packed["value"].itemsize, packed["index"].itemsize]
    return TypeCore(_array([0, place]), _array(sizes), 0, aligned.itemsize, dtype=packed, kind="pair", name=name,
                    align=aligned.alignment)


def replicated(base: TypeCore, places: Sequence[int] | Offsets, combiner: int,
               contents: tuple[list[int], list[int], list[int], list[TypeCore]]) -> TypeCore:
    """Copies of a type at given offsets (in bytes)."""
    at = _array(places)
    offsets = (at[:, None] + base.offsets).ravel()
    lengths = np.tile(base.lengths, len(at))
    if len(at):
        lb = int(at.min()) + base.lb
        extent = int(at.max()) + base.lb + base.extent - lb
    else:
        lb = extent = 0
    return TypeCore(offsets, lengths, lb, extent, combiner=combiner, contents=contents, align=base.align)


def contiguous(base: TypeCore, count: int) -> TypeCore:
    if count * base.size > _BIG_ELEMENT and base.is_contiguous:
        # One segment, not millions of them that are joined afterwards.
        whole = TypeCore(_array([0]), _array([count * base.size]), 0, count * base.extent, combiner=c.COMBINER_CONTIGUOUS,
                         contents=([count], [], [], [base]), align=base.align)
        return whole
    return replicated(base, np.arange(count) * base.extent, c.COMBINER_CONTIGUOUS, ([count], [], [], [base]))


def blocks(base: TypeCore, blocklengths: Sequence[int], displacements: Sequence[int], combiner: int,
           contents: tuple[list[int], list[int], list[int], list[TypeCore]]) -> TypeCore:
    """Blocks of a type; displacements in bytes."""
    places = [np.arange(length) * base.extent + place for length, place in zip(blocklengths, displacements, strict=True)]
    return replicated(base, np.concatenate(places) if places else [], combiner, contents)


def struct_of(blocklengths: Sequence[int], displacements: Sequence[int], types: Sequence[TypeCore]) -> TypeCore:
    """Blocks of different types; displacements in bytes."""
    parts = [blocks(each, [length], [place], 0, ([], [], [], []))
             for length, place, each in zip(blocklengths, displacements, types, strict=True)]
    offsets = np.concatenate([part.offsets for part in parts]) if parts else _array([])
    lengths = np.concatenate([part.lengths for part in parts]) if parts else _array([])
    full = [part for part, length in zip(parts, blocklengths, strict=True) if length]
    lb = min((part.lb for part in full), default=0)
    ub = max((part.lb + part.extent for part in full), default=0)
    align = max((each.align for each in types), default=1) or 1
    extent = -(-(ub - lb) // align) * align
    return TypeCore(offsets, lengths, lb, extent, combiner=c.COMBINER_STRUCT, align=align,
                    contents=([len(parts), *blocklengths], list(displacements), [], list(types)))


def resized(base: TypeCore, lb: int, extent: int) -> TypeCore:
    return TypeCore(base.offsets, base.lengths, lb, extent, combiner=c.COMBINER_RESIZED, contents=([], [lb, extent], [], [base]),
                    align=base.align)


def duplicate(base: TypeCore) -> TypeCore:
    return TypeCore(base.offsets, base.lengths, base.lb, base.extent, combiner=c.COMBINER_DUP, contents=([], [], [], [base]),
                    dtype=base.dtype, char=base.char, kind=base.kind, align=base.align)


def subarray(base: TypeCore, sizes: Sequence[int], subsizes: Sequence[int], starts: Sequence[int], order: int) -> TypeCore:
    if not len(sizes) == len(subsizes) == len(starts):
        raise ValueError("sizes, subsizes and starts must have equal lengths")
    for size, subsize, start in zip(sizes, subsizes, starts, strict=True):
        if subsize < 1 or subsize > size or start < 0 or start + subsize > size:
            raise MPIException(ERR_ARG, f"subarray {subsize} at {start} of {size}")
    picks = [np.arange(start, start + subsize) for start, subsize in zip(starts, subsizes, strict=True)]
    made = _grid(base, sizes, picks, order)
    made.combiner = c.COMBINER_SUBARRAY
    made.contents = ([len(sizes), *sizes, *subsizes, *starts, order], [], [], [base])
    return made


def _grid(base: TypeCore, sizes: Sequence[int], picks: Sequence[npt.NDArray[Any]], order: int) -> TypeCore:
    """Elements of an array of `sizes`, in the order of memory."""
    dims = list(zip(sizes, picks, strict=True))
    if order == c.ORDER_FORTRAN:
        dims.reverse()
    elif order != c.ORDER_C:
        raise MPIException(ERR_ARG, f"order {order}")
    index = np.zeros(1, np.int64)
    for size, pick in dims:
        index = (index[:, None] * size + pick).ravel()
    total = 1
    for size in sizes:
        total *= size
    made = replicated(base, index * base.extent, 0, ([], [], [], []))
    made.lb, made.extent = 0, total * base.extent
    made.is_contiguous = made.is_contiguous and made.size == made.extent
    return made


def darray(base: TypeCore, size: int, rank: int, gsizes: Sequence[int], distribs: Sequence[int], dargs: Sequence[int],
           psizes: Sequence[int], order: int) -> TypeCore:
    """This rank's part of an array that is distributed over a grid of processes (MPI 4.0, 5.1.4)."""
    if not len(gsizes) == len(distribs) == len(dargs) == len(psizes):
        raise ValueError("gsizes, distribs, dargs and psizes must have equal lengths")
    coordinates, rest, total = [], rank, size
    for psize in psizes:
        total //= psize
        coordinates.append(rest // total)
        rest %= total
    picks = []
    for gsize, distrib, darg, psize, coordinate in zip(gsizes, distribs, dargs, psizes, coordinates, strict=True):
        block = {c.DISTRIBUTE_NONE: gsize, c.DISTRIBUTE_BLOCK: -(-gsize // psize), c.DISTRIBUTE_CYCLIC: 1}.get(distrib)
        if block is None:
            raise MPIException(ERR_ARG, f"distribution {distrib}")
        if darg != c.DISTRIBUTE_DFLT_DARG and distrib != c.DISTRIBUTE_NONE:
            block = darg
        every = np.arange(gsize)
        picks.append(every if distrib == c.DISTRIBUTE_NONE else every[every // block % psize == coordinate])
    made = _grid(base, gsizes, picks, order)
    made.combiner = c.COMBINER_DARRAY
    made.contents = ([size, rank, len(gsizes), *gsizes, *distribs, *dargs, *psizes, order], [], [], [base])
    return made


def type_code(core: TypeCore) -> tuple[str, str]:
    """Character and string of a type, as mpi4py's `typechar` and `typestr`; empty strings for derived types."""
    if core.combiner == c.COMBINER_DUP:
        return type_code(core.contents[3][0])
    if not core.char:
        return "", ""
    char = core.char
    if char in "?":
        return char, "b1"
    if char == "c":
        return char, "S1"
    if char == "U":
        return char, "U1"
    return char, core.kind + str(core.size)


def check_type(core: TypeCore | None) -> TypeCore:
    """Raise for the null datatype."""
    if core is None:
        raise MPIException(ERR_TYPE, "null datatype")
    return core


def long_double_bytes() -> int:
    """Size of the C type."""
    return np.dtype("longdouble").itemsize


POINTER = struct.calcsize("P")
