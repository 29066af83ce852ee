"""Which layer file holds which page of a guest's memory: a pure model, without any I/O on layers.

A memory image is a stack of *layers*, sparse files as large as guest memory, in which each page stands at its own offset.
A `MemoryMap` says for each page where its newest content is: in layer n, or nowhere because it is zero. A commit turns one
map into the next; the older one stays valid, because layers of live maps are never written to (an in-place commit is
allowed only while nobody else uses the target).
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sfparallel.errors import ProtocolError, UsageError

PAGE_BYTES = 4096
MAX_LAYER_NUMBER = 0xFFFF
ZERO_LAYER = 0xFFFFFFFF
"""Layer of an extent that is fresh anonymous memory."""
KEPT_LAYER = 0xFFFFFFFE
"""Layer of an extent that the VM has mapped already."""
STORED = 1
"""Kind of a run: the target layer of the commit holds these pages."""
ZERO = 2
"""Kind of a run: these pages are zero and held nowhere."""

EXTENT = np.dtype([("offset_bytes", "<u8"), ("length_bytes", "<u8"), ("layer", "<u4"), ("reserved", "<u4")])
RUN = np.dtype([("first_page", "<u8"), ("pages", "<u4"), ("kind", "<u4")])
COPY = np.dtype([("first_page", "<u8"), ("pages", "<u8"), ("layer", "<u4"), ("reserved", "<u4")])

Sources: TypeAlias = npt.NDArray[np.uint16]
Flags: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]
Records: TypeAlias = npt.NDArray[np.void]

_HEADER = struct.Struct("<8sQQQ")  # magic, pages, runs of sources, ranges of stored pages
_MAGIC = b"SFMMAP1\0"
_MAX_PAGES = 1 << 32


@dataclass(frozen=True)
class Extents:
    """An image as the paging layer lays it over guest memory.

    Attributes:
        array: records of dtype `EXTENT`, sorted, without gaps.
        layers: layer numbers; an extent's `layer` is an index into this tuple (or `ZERO_LAYER`, `KEPT_LAYER`).
    """

    array: Records
    layers: tuple[int, ...]


@dataclass(frozen=True)
class FlattenPlan:
    """How to merge layers into a fresh one.

    Attributes:
        copies: records of dtype `COPY`: copy these pages of that layer to the same offsets of the fresh layer.
        number: number of the fresh layer.
        memory_map: the map that holds once the copies are made.
    """

    copies: Records
    number: int
    memory_map: MemoryMap

    @property
    def bytes(self) -> int:
        """Bytes that are to be copied."""
        return int(self.copies["pages"].sum()) * PAGE_BYTES


class MemoryMap:
    """Where each page of a guest's memory is held; immutable.

    Args:
        source: for each page the number of the layer that holds it, or 0: the page is zero. Not to be written to afterwards.
        stored: pages at which some layer of this map may have data; by default those that have a source. A page that was
            stored once and is zero now must be in it: its old content may still be in a file.
    """

    __slots__ = ("_layers", "source", "stored")

    source: Sources
    stored: Flags
    _layers: tuple[int, ...] | None

    def __init__(self, source: npt.ArrayLike, stored: Flags | None = None) -> None:
        array = np.ascontiguousarray(source, dtype="<u2").view()
        if array.ndim != 1 or not 0 < array.size <= _MAX_PAGES:
            raise UsageError(f"a memory map has one dimension and at least one page, not the shape {array.shape}")
        kept = array > 0 if stored is None else (np.asarray(stored, dtype=np.bool_) | (array > 0))
        array.flags.writeable = False
        kept.flags.writeable = False
        object.__setattr__(self, "source", array)
        object.__setattr__(self, "stored", kept)
        object.__setattr__(self, "_layers", None)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"MemoryMap is immutable: cannot set {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MemoryMap):
            return NotImplemented
        return np.array_equal(self.source, other.source) and np.array_equal(self.stored, other.stored)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<MemoryMap of {self.page_count} pages, layers {list(self.layers)}>"

    @classmethod
    def zero(cls, page_count: int) -> MemoryMap:
        """The map of a freshly started VM: nothing is stored."""
        return cls(np.zeros(page_count, dtype=np.uint16))

    @classmethod
    def from_sparse_file(cls, fd: int, number: int = 1, page_count: int | None = None) -> MemoryMap:
        """The map of an image that is one sparse file: its holes are zero pages.

        Args:
            fd: the file; its offset is not preserved.
            number: layer number of the file.
            page_count: pages of guest memory; by default the file's size decides.

        Raises:
            ProtocolError: the size is no whole number of pages, or smaller than `page_count` says.
        """
        size = os.fstat(fd).st_size
        pages = size // PAGE_BYTES if page_count is None else page_count
        if size == 0 or size % PAGE_BYTES or size < pages * PAGE_BYTES:
            raise ProtocolError(f"a memory image of {size} bytes does not fit {pages} pages of {PAGE_BYTES} bytes")
        source = np.zeros(pages, dtype=np.uint16)
        offset = 0
        while offset < pages * PAGE_BYTES:
            try:
                first = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    break
                raise
            offset = os.lseek(fd, first, os.SEEK_HOLE)
            source[first // PAGE_BYTES:-(-offset // PAGE_BYTES)] = number
        return cls(source)

    @property
    def page_count(self) -> int:
        return int(self.source.size)

    @property
    def size_bytes(self) -> int:
        return self.page_count * PAGE_BYTES

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that the image needs, ascending; looked for once."""
        if self._layers is None:
            object.__setattr__(self, "_layers", tuple(int(n) for n in np.flatnonzero(np.bincount(self.source)) if n))
        assert self._layers is not None
        return self._layers

    def pages_of(self, number: int) -> int:
        """Number of pages that layer `number` holds (0: zero pages)."""
        return int(np.count_nonzero(self.source == number))

    @property
    def row_count(self) -> int:
        """Number of rows of pages that have one source: about as many mappings does the image need."""
        return int(np.count_nonzero(self.source[1:] != self.source[:-1])) + 1

    def rows_of(self, number: int) -> list[tuple[int, int]]:
        """Where the pages of layer `number` are: offset and length of each row, in bytes, ascending."""
        edges = np.flatnonzero(np.diff(self.source == number, prepend=False, append=False)) * PAGE_BYTES
        return [(int(begin), int(end - begin)) for begin, end in edges.reshape(-1, 2)]

    def apply(self, runs: npt.NDArray[Any], target_number: int) -> MemoryMap:
        """The map after a commit.

        Args:
            runs: records of dtype `RUN`, sorted: what the paging layer reported.
            target_number: number of the layer into which it stored pages.

        Raises:
            ProtocolError: runs that no correct paging layer reports.
        """
        _check_number(target_number)
        first, pages = check_runs(runs, self.page_count)
        source = self.source.copy()
        values = np.where(runs["kind"] == STORED, target_number, 0).astype(np.uint16)
        source[_indices(first, pages)] = np.repeat(values, pages)
        return MemoryMap(source, self.stored)

    def filled(self, max_zero_gap_pages: int = 16) -> MemoryMap:
        """The same image with fewer changes of source: short gaps of zeros are taken from the layer around them.

        A zero page should be anonymous memory: to read a hole through a private mapping of a memfd allocates the page in the
        file (measured). Each change of source costs a mapping, though, so a short run of zeros between two runs of one layer
        is said to come from that layer as well, if no layer ever had data there. A VM must be mapped and remembered by the
        same map: were the gap recorded as zero but mapped from the layer, that layer could be given up, and written to by
        others, while the VM still shows its pages.

        Args:
            max_zero_gap_pages: longest run of zero pages that is absorbed.
        """
        starts, values = _runs(self.source)
        lengths = np.diff(starts, append=self.page_count)
        doubtful = np.logical_or.reduceat(self.stored, starts)
        absorb = np.zeros(values.size, dtype=np.bool_)
        absorb[1:-1] = (
            (values[1:-1] == 0) & (values[:-2] == values[2:]) & (lengths[1:-1] <= max_zero_gap_pages) & ~doubtful[1:-1]
        )
        if not absorb.any():
            return self
        return MemoryMap(np.repeat(np.where(absorb, np.roll(values, 1), values), lengths), self.stored)

    def distrusted(self) -> MemoryMap:
        """The same image after an in-place commit that failed: no file is known any more to have a hole at a zero page."""
        return MemoryMap(self.source, np.ones(self.page_count, dtype=np.bool_))

    def extents(self, base: MemoryMap | None = None) -> Extents:
        """The map as extents for the paging layer.

        Args:
            base: map of an image of the same size by which the VM is mapped already, with the same layers under the same
                numbers: rows of pages that are all held where they were are left as they are mapped.

        Raises:
            UsageError: the base is of another size.
        """
        if base and base.page_count != self.page_count:
            raise UsageError(f"an image of {self.page_count} pages cannot be laid over one of {base.page_count}")
        starts, values = _runs(self.source)
        kept = np.zeros(starts.size, np.bool_) if base is None else ~np.logical_or.reduceat(self.source != base.source, starts)
        used, index = np.unique(values[~kept], return_inverse=True)
        shift = int(used.size and used[0] == 0)
        layers = np.full(starts.size, KEPT_LAYER, dtype=np.int64)
        layers[~kept] = np.where(values[~kept] == 0, ZERO_LAYER, index.reshape(-1) - shift)
        # Rows that are kept, one behind the other, are one extent.
        begins = np.concatenate((np.ones(1, np.bool_), ~(kept[1:] & kept[:-1])))
        starts = starts[begins]
        array = np.zeros(starts.size, dtype=EXTENT)
        array["offset_bytes"] = starts * PAGE_BYTES
        array["length_bytes"] = np.diff(starts, append=self.page_count) * PAGE_BYTES
        array["layer"] = layers[begins]
        return Extents(array, tuple(int(n) for n in used[shift:]))

    def flatten(self, number: int, only: Collection[int] | None = None) -> FlattenPlan:
        """Plan to merge layers into a fresh one, so that fewer of them (and fewer mappings) make up the image.

        Args:
            number: number of the fresh layer, whose file is empty; not in use in this map.
            only: the layers to merge; by default all.

        Raises:
            UsageError: the number is in use.
        """
        _check_number(number)
        if number in self.layers:
            raise UsageError(f"layer {number} is in use: flatten into a fresh layer")
        chosen = self.source > 0 if only is None else np.isin(self.source, np.fromiter(only, dtype=np.uint16)) & (self.source > 0)
        starts, values = _runs(np.where(chosen, self.source, np.uint16(0)))
        lengths = np.diff(starts, append=self.page_count)
        copies = np.zeros(int(np.count_nonzero(values)), dtype=COPY)
        copies["first_page"] = starts[values > 0]
        copies["pages"] = lengths[values > 0]
        copies["layer"] = values[values > 0]
        source = np.where(chosen, np.uint16(number), self.source)
        rest = not np.array_equal(source > 0, chosen)
        # With layers left over, what they store beneath zero pages is as unknown as before; a fresh layer has no such pages.
        return FlattenPlan(copies, number, MemoryMap(source, self.stored if rest else None))

    def encode(self) -> bytes:
        """The map as bytes, for the manifest of a checkpoint."""
        starts, values = _runs(self.source)
        extra_starts, extra_values = _runs((self.stored & (self.source == 0)).astype(np.uint16))
        lengths = np.diff(extra_starts, append=self.page_count)
        chosen = extra_values > 0
        body = b"".join((
            starts.astype("<u8").tobytes(), values.astype("<u2").tobytes(),
            extra_starts[chosen].astype("<u8").tobytes(), lengths[chosen].astype("<u8").tobytes(),
        ))
        return _HEADER.pack(_MAGIC, self.page_count, starts.size, int(chosen.sum())) + zlib.compress(body, 1)

    @classmethod
    def decode(cls, data: bytes, most_pages: int) -> MemoryMap:
        """The map that `encode` made bytes of.

        Args:
            most_pages: of the guest's memory. A damaged map of few bytes can say any number, and would take so much memory.

        Raises:
            ProtocolError: bytes that `encode` never makes of such a memory.
        """
        if len(data) < _HEADER.size:
            raise ProtocolError(f"a memory map of {len(data)} bytes is cut short")
        magic, pages, runs, extra = _HEADER.unpack_from(data)
        if magic != _MAGIC or not 0 < pages <= _MAX_PAGES or not 0 < runs <= pages or extra > pages:
            raise ProtocolError("not a memory map, or one of another version")
        if pages > most_pages:
            raise ProtocolError(f"a memory map of {pages} pages for a memory of {most_pages}")
        body = _inflate(data[_HEADER.size:], runs * 10 + extra * 16)
        starts = np.frombuffer(body, "<u8", runs).astype(np.int64)
        values = np.frombuffer(body, "<u2", runs, runs * 8)
        first = np.frombuffer(body, "<u8", extra, runs * 10).astype(np.int64)
        lengths = np.frombuffer(body, "<u8", extra, runs * 10 + extra * 8).astype(np.int64)
        if starts[0] != 0 or int(starts[-1]) >= pages or np.any(np.diff(starts) <= 0):
            raise ProtocolError("the runs of a memory map are not in order")
        if extra and not _in_order(first, lengths, pages):
            raise ProtocolError("the stored ranges of a memory map are not in order")
        stored = np.zeros(pages, dtype=np.bool_)
        stored[_indices(first, lengths)] = True
        return cls(np.repeat(values, np.diff(starts, append=pages)), stored)


def check_runs(runs: npt.NDArray[Any], page_count: int) -> tuple[Indices, Indices]:
    """First page and number of pages of each run of a commit.

    Raises:
        ProtocolError: runs that no correct paging layer reports of so many pages.
    """
    if runs.dtype != RUN or runs.ndim != 1:
        raise ProtocolError(f"runs of dtype {runs.dtype}")
    first = runs["first_page"].astype(np.int64)
    pages = runs["pages"].astype(np.int64)
    end = first + pages
    if runs.size and (
        first.min() < 0 or pages.min() < 1 or int(end[-1]) > page_count or np.any(first[1:] < end[:-1])
        or not np.all((runs["kind"] == STORED) | (runs["kind"] == ZERO))
    ):
        raise ProtocolError(f"impossible runs for a memory of {page_count} pages")
    return first, pages


def _in_order(first: Indices, lengths: Indices, pages: int) -> bool:
    if np.any(first < 0) or np.any(first >= pages) or np.any(lengths < 1) or np.any(lengths > pages):
        return False
    end = first + lengths
    return bool(end[-1] <= pages and np.all(first[1:] >= end[:-1]))


def _check_number(number: int) -> None:
    if not 0 < number <= MAX_LAYER_NUMBER:
        raise UsageError(f"{number} is not a layer number", hint=f"use 1 to {MAX_LAYER_NUMBER}")


def _runs(array: Sources) -> tuple[Indices, Sources]:
    """First index and value of each run of equal elements."""
    starts = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(array[1:] != array[:-1]) + 1))
    return starts, array[starts]


def _indices(first: Indices, lengths: Indices) -> Indices:
    """All indices of the ranges `first[i]` .. `first[i] + lengths[i]`, in order."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.repeat(first - before, lengths) + np.arange(total, dtype=np.int64)


def _inflate(data: bytes, expected: int) -> bytes:
    """Decompress exactly `expected` bytes; a bomb is cut off at that size."""
    inflater = zlib.decompressobj()
    try:
        body = inflater.decompress(data, expected + 1)
    except zlib.error as error:
        raise ProtocolError(f"undecodable memory map: {error}") from error
    if len(body) != expected or not inflater.eof or inflater.unused_data:
        raise ProtocolError(f"a memory map of {len(body)} bytes where {expected} are announced")
    return body
