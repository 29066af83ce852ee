"""What the paging layer is asked to do, made ready beforehand: an image to lay over VMs, a commit, a merge of layers."""

from __future__ import annotations

import enum
import fcntl
import os
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from sfparallel.errors import Closed, PagingError, ProtocolError, UsageError
from sfparallel.vmm.layers import PAGE_BYTES, RUN, Extents, FlattenPlan, MemoryMap, Records

MAX_LAYERS = 250
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_COPY_BYTES = 1 << 20


class CommitMode(enum.IntFlag):
    """How a commit treats its target layer and the VM's mappings.

    Attributes:
        FRESH: the target is an empty layer, which the VM does not map yet; afterwards the VM shares it.
        IN_PLACE: the target may hold older pages of this VM; no other VM maps it, no checkpoint refers to it.
        NO_REMAP: leave the VM's mappings alone: it is about to end, or `map` follows.
    """

    FRESH = 0
    IN_PLACE = 1
    NO_REMAP = 2


def _memfd(name: str, content: memoryview | bytes | None = None, *, seal: bool = False) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content or b"").cast("B")
        while view:
            view = view[os.write(fd, view):]
        if seal:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class MapPlan:
    """An image, ready to be laid over the memory of any number of VMs.

    Args:
        memory_map: the image.
        layers: descriptors of its layers by number, open for reading at least; the plan keeps duplicates.
        base: the map by which the VMs are mapped already, if they are; only what differs from it is mapped then.

    Attributes:
        memory_map: the image as it will be mapped (`MemoryMap.filled`). This, not the argument, is the map of a VM that was
            mapped with the plan: the one to pass to its next `commit`.

    Raises:
        UsageError: a layer is missing.
        PagingError: more layers than one message can carry.
    """

    def __init__(self, memory_map: MemoryMap, layers: Mapping[int, int], base: MemoryMap | None = None) -> None:
        self.memory_map = memory_map.filled()
        self.base = base
        self.extents: Extents = self.memory_map.extents(base)
        missing = [n for n in self.extents.layers if n not in layers]
        if missing:
            raise UsageError(f"no descriptor for the layers {missing} of the image")
        if len(self.extents.layers) > MAX_LAYERS:
            raise PagingError(f"an image of {len(self.extents.layers)} layers cannot be mapped; at most {MAX_LAYERS} can",
                              hint="merge layers with MemoryMap.flatten first")
        self._fds: list[int] = []
        try:
            self._fds.append(_memfd("sf-extents", self.extents.array.tobytes(), seal=True))
            for number in self.extents.layers:
                self._fds.append(fcntl.fcntl(layers[number], fcntl.F_DUPFD_CLOEXEC, 0))
        except BaseException:
            self.close()
            raise

    @property
    def fds(self) -> Sequence[int]:
        """Descriptors of the request: the extents, then the layers.

        Raises:
            Closed: the plan was closed.
        """
        if not self._fds:
            raise Closed("this map plan was closed")
        return self._fds

    def close(self) -> None:
        """Give the descriptors back; VMs that were mapped are not affected."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CommitPlan:
    """A commit, ready to be carried out: what takes time that grows with guest memory is done while the VM still runs.

    Args:
        memory_map: the image that the VM has been running on: of its `MapPlan`, or what its last commit made of that.
        target: descriptor of the target layer, open for reading and writing; a file of the size of guest memory.
        target_number: its number.
        mode: whether the target is fresh.
        layers: descriptors of layers of the image by number, readable: pages that were written to, and are what their layer
            holds all the same, are not stored again. No more than `MAX_LAYERS` of them are used.
    """

    def __init__(self, memory_map: MemoryMap, target: int, target_number: int, mode: CommitMode = CommitMode.FRESH, *,
                 layers: Mapping[int, int] | None = None) -> None:
        compared = list((layers or {}).items())[:MAX_LAYERS]
        numbers = np.array([number for number, _ in compared], dtype=memory_map.source.dtype)
        self.mode = mode
        self.target_number = target_number
        self.size_bytes = memory_map.size_bytes
        self.page_count = memory_map.page_count
        self._runs = _memfd("sf-runs")
        try:
            self._sources = _memfd("sf-sources", np.concatenate((memory_map.source, numbers)).data, seal=True)
        except BaseException:
            os.close(self._runs)
            raise
        self.fds = (target, self._runs, self._sources, *(fd for _, fd in compared))
        """Descriptors of the request; those of layers and target are the caller's."""

    def read_runs(self, count: int) -> Records:
        """What the library wrote: records of dtype `layers.RUN`.

        Raises:
            ProtocolError: they are not there.
        """
        runs = np.zeros(count, dtype=RUN)
        view = memoryview(runs.view(np.uint8).data)
        offset = 0
        while offset < len(view):
            n = os.preadv(self._runs, [view[offset:]], offset)
            if n == 0:
                raise ProtocolError(f"{count} runs were announced, {offset // RUN.itemsize} were written")
            offset += n
        return runs

    def close(self) -> None:
        os.close(self._runs)
        os.close(self._sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def copy_pages(plan: FlattenPlan, layers: Mapping[int, int], target: int) -> None:
    """Carry out a flatten plan. Pages that are zero, because a gap of the image was absorbed, stay holes.

    Args:
        plan: what to copy.
        layers: descriptors of the layers by number.
        target: descriptor of the fresh layer; it is given the size of guest memory.
    """
    os.ftruncate(target, plan.memory_map.size_bytes)
    for first, pages, number, _ in plan.copies.tolist():
        offset, end = first * PAGE_BYTES, (first + pages) * PAGE_BYTES
        while offset < end:
            data = os.pread(layers[number], min(_COPY_BYTES, end - offset), offset)
            if not data:
                raise PagingError(f"layer {number} ends at {offset}, before a page that it should hold")
            for begin, end_of_piece in _not_zero(data):
                _write(target, data[begin:end_of_piece], offset + begin)
            offset += len(data)


def _not_zero(data: bytes) -> list[tuple[int, int]]:
    """Where there are pages that are not zero: begin and end of each row, in bytes."""
    filled = np.frombuffer(data, dtype="<u8").reshape(-1, PAGE_BYTES // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)) * PAGE_BYTES
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
