"""Memory maps against a model: plain dictionaries of what guest memory and layer files hold."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.errors import ProtocolError, UsageError
from sfparallel.vmm.layers import KEPT_LAYER, PAGE_BYTES, RUN, STORED, ZERO, ZERO_LAYER, MemoryMap, Records

PAGES = 40


def runs_of(writes: dict[int, int]) -> Records:
    """What the paging layer reports when these pages got this content (0: zero)."""
    rows: list[list[int]] = []
    for page, content in sorted(writes.items()):
        kind = STORED if content else ZERO
        if rows and rows[-1][2] == kind and rows[-1][0] + rows[-1][1] == page:
            rows[-1][1] += 1
        else:
            rows.append([page, 1, kind])
    return np.array([tuple(row) for row in rows], dtype=RUN)


class Model:
    """A VM and its layer files; contents are small numbers, 0 is zero."""

    def __init__(self) -> None:
        self.memory = dict.fromkeys(range(PAGES), 0)
        self.files: dict[int, dict[int, int]] = {}
        self.map = MemoryMap.zero(PAGES)
        self.own: int | None = None
        self.snapshots: list[tuple[MemoryMap, dict[int, int]]] = []

    def fresh(self) -> int:
        number = max(self.files, default=0) + 1
        self.files[number] = {}
        return number

    def commit(self, writes: dict[int, int]) -> None:
        self.own = self.own or self.fresh()
        self.memory.update(writes)
        for page, content in writes.items():
            if content:
                self.files[self.own][page] = content
            else:
                self.files[self.own].pop(page, None)
        self.map = self.map.apply(runs_of(writes), self.own)

    def snapshot(self) -> None:
        """Somebody else holds all layers from here on."""
        self.snapshots.append((self.map, dict(self.memory)))
        self.own = None

    def flatten(self, only: set[int] | None) -> None:
        number = self.fresh()
        plan = self.map.flatten(number, only)
        for first, pages, layer, _ in plan.copies.tolist():
            for page in range(first, first + pages):
                if page in self.files[layer]:
                    self.files[number][page] = self.files[layer][page]
        assert plan.bytes == int(plan.copies["pages"].sum()) * PAGE_BYTES
        self.map = plan.memory_map
        self.own = None

    def check(self, memory_map: MemoryMap, memory: dict[int, int]) -> None:
        for gap in (0, 3, 16):
            filled = memory_map.filled(gap)
            assert filled.layers == memory_map.layers
            assert self.seen(filled) == list(memory.values())
            again = MemoryMap.decode(filled.encode(), filled.page_count)
            assert again == filled

    def seen(self, memory_map: MemoryMap) -> list[int]:
        """Guest memory as it looks after a map."""
        extents = memory_map.extents()
        shown: list[int] = []
        for offset, length, layer, reserved in extents.array.tolist():
            assert offset == len(shown) * PAGE_BYTES and length % PAGE_BYTES == 0 and length > 0 and reserved == 0
            file = {} if layer == ZERO_LAYER else self.files[extents.layers[layer]]
            shown += [file.get(page, 0) for page in range(len(shown), len(shown) + length // PAGE_BYTES)]
        return shown


contents = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 3), max_size=25)
steps = st.one_of(
    st.tuples(st.just("commit"), contents),
    st.tuples(st.just("snapshot"), st.none()),
    st.tuples(st.just("flatten"), st.one_of(st.none(), st.sets(st.integers(1, 6)))),
    st.tuples(st.just("map"), st.none()),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=12))
def test_generations_show_what_was_written(history: list[tuple[str, object]]) -> None:
    model = Model()
    for step, argument in history:
        if step == "commit":
            assert isinstance(argument, dict)
            model.commit(argument)
        elif step == "snapshot":
            model.snapshot()
        elif step == "flatten":
            assert argument is None or isinstance(argument, set)
            model.flatten(argument)
        else:
            model.map = model.map.filled()
        model.check(model.map, model.memory)
    for memory_map, memory in model.snapshots:
        model.check(memory_map, memory)


def test_short_gap_is_absorbed_only_where_no_file_has_data() -> None:
    writes = dict.fromkeys([0, 1, 4, 5], 7)
    fresh = MemoryMap.zero(8).apply(runs_of(writes), 1)
    assert fresh.source.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert fresh.filled().source.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert fresh.filled(1) is fresh
    once_stored = fresh.apply(runs_of({2: 9}), 1).apply(runs_of({2: 0}), 1)
    assert once_stored.source.tolist() == fresh.source.tolist()
    assert once_stored.filled() is once_stored
    assert fresh.distrusted().filled().source.tolist() == fresh.source.tolist()
    assert once_stored.flatten(2).memory_map.filled().source.tolist() == [2, 2, 2, 2, 2, 2, 0, 0]


def test_extents_compact_layer_numbers() -> None:
    extents = MemoryMap(np.array([9, 9, 0, 4, 300], dtype=np.uint16)).extents()
    assert extents.layers == (4, 9, 300)
    assert extents.array["layer"].tolist() == [1, ZERO_LAYER, 0, 2]
    assert extents.array["length_bytes"].tolist() == [2 * PAGE_BYTES, PAGE_BYTES, PAGE_BYTES, PAGE_BYTES]


SOURCES = st.lists(st.integers(0, 3), min_size=PAGES, max_size=PAGES)


@settings(deadline=None)
@given(SOURCES, SOURCES)
def test_extents_over_a_base_map_what_differs(old: list[int], new: list[int]) -> None:
    base, memory_map = MemoryMap(np.array(old)), MemoryMap(np.array(new))
    extents = memory_map.extents(base)
    mapped = np.array(old)
    end = 0
    for offset, length, layer, _ in extents.array.tolist():
        assert offset == end and length > 0
        end = offset + length
        if layer != KEPT_LAYER:
            mapped[offset // PAGE_BYTES:end // PAGE_BYTES] = 0 if layer == ZERO_LAYER else extents.layers[layer]
    assert end == PAGES * PAGE_BYTES
    assert mapped.tolist() == new
    kinds = extents.array["layer"]
    assert not np.any((kinds[1:] == KEPT_LAYER) & (kinds[:-1] == KEPT_LAYER))
    assert len(kinds) <= len(memory_map.extents().array)
    assert set(extents.layers) <= set(new)


def test_extents_over_the_same_image_are_one() -> None:
    memory_map = MemoryMap(np.array([9, 9, 0, 4, 300], dtype=np.uint16))
    extents = memory_map.extents(memory_map)
    assert extents.layers == () and extents.array.tolist() == [(0, 5 * PAGE_BYTES, KEPT_LAYER, 0)]
    with pytest.raises(UsageError, match="5 pages cannot be laid over one of 4"):
        memory_map.extents(MemoryMap.zero(4))


def test_map_is_immutable() -> None:
    memory_map = MemoryMap.zero(4)
    with pytest.raises(AttributeError):
        memory_map.source = np.zeros(4, dtype=np.uint16)
    with pytest.raises(ValueError, match="read-only"):
        memory_map.source[0] = 1


@pytest.mark.parametrize("rows", [
    [(0, 0, STORED)], [(0, 1, 3)], [(3, 2, STORED)], [(2, 1, ZERO), (1, 1, ZERO)], [(0, 2, ZERO), (1, 1, ZERO)],
    [(2**63, 1, ZERO)], [(2**64 - 1, 2, ZERO)],
])
def test_impossible_runs_are_refused(rows: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ProtocolError):
        MemoryMap.zero(4).apply(np.array(rows, dtype=RUN), 1)


def test_misuse_is_refused() -> None:
    memory_map = MemoryMap(np.array([0, 2], dtype=np.uint16))
    for call in (lambda: MemoryMap.zero(0), lambda: memory_map.flatten(2), lambda: memory_map.flatten(0),
                 lambda: memory_map.apply(np.zeros(0, dtype=RUN), 65536)):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(ProtocolError):
        memory_map.apply(np.zeros(3, dtype=np.uint8), 1)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 10_000), st.integers(1, 255))
def test_damaged_bytes_are_refused_or_harmless(noise: bytes, at: int, flip: int) -> None:
    with pytest.raises(ProtocolError):
        MemoryMap.decode(noise, 200)
    good = bytearray(MemoryMap(np.arange(200, dtype=np.uint16) // 7, np.arange(200) % 3 == 0).encode())
    good[at % len(good)] ^= flip
    with suppress(ProtocolError):
        assert MemoryMap.decode(bytes(good), 200).page_count <= 200


def test_huge_announcement_does_not_take_memory() -> None:
    good = MemoryMap.zero(10).encode()
    with pytest.raises(ProtocolError):
        MemoryMap.decode(good[:8] + (1 << 32).to_bytes(8, "little") + (1 << 31).to_bytes(8, "little") + good[24:], 1 << 32)


def test_a_damaged_number_of_pages_does_not_take_memory() -> None:
    """The last row of pages reaches to the end of memory, wherever that is: of ten pages it made half a gigabyte of map."""
    good = MemoryMap.zero(10).encode()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=r"of 268435456 pages for a memory of 10"):
            MemoryMap.decode(good[:8] + (1 << 28).to_bytes(8, "little") + good[16:], 10)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@contextmanager
def sparse_file(pages: int, data: list[int]) -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, pages * PAGE_BYTES)
        for page in data:
            os.pwrite(fd, b"x" * PAGE_BYTES, page * PAGE_BYTES)
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("data", [[], [0], [9], [0, 1, 5, 9], list(range(10))])
def test_map_of_a_sparse_file(data: list[int]) -> None:
    with sparse_file(10, data) as fd:
        memory_map = MemoryMap.from_sparse_file(fd, 3)
        assert np.flatnonzero(memory_map.source == 3).tolist() == data
        assert memory_map.page_count == 10 and memory_map.pages_of(0) == 10 - len(data)
        with pytest.raises(ProtocolError):
            MemoryMap.from_sparse_file(fd, 3, page_count=11)


def test_a_million_pages_are_quick() -> None:
    """4 GiB with 20 000 runs: each step must stay far below the pause of a fork. The bound is loose, and one of processor
    time: the machine may be busy."""
    generator = random.Random(1)
    writes = {page: page & 1 for start in range(0, 1 << 20, 200) for page in range(start, start + generator.randrange(1, 50))}
    runs = runs_of(writes)
    base = MemoryMap(np.ones(1 << 20, dtype=np.uint16))
    started = time.process_time()
    memory_map = base.apply(runs, 2)
    memory_map.filled().extents()
    MemoryMap.decode(memory_map.encode(), memory_map.page_count)
    memory_map.flatten(3)
    assert time.process_time() - started < 2.0
