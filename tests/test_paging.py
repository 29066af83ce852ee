"""The paging layer over its real socket, in a harness that stands for QEMU: commits, images, errors, the connection."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sfparallel.errors import Closed, PagingError, UsageError
from sfparallel.vmm import paging, plans
from sfparallel.vmm.layers import (
    EXTENT,
    KEPT_LAYER,
    PAGE_BYTES,
    STORED,
    ZERO,
    ZERO_LAYER,
    Extents,
    MemoryMap,
)
from sfparallel.vmm.paging import PagingLayer, PagingStep, ScanMethod
from sfparallel.vmm.plans import CommitMode, MapPlan
from tests.conftest import HANG_S
from tests.paging_rig import (
    BYTES,
    PAGES,
    Guest,
    Rig,
    refused,
    rows,
    run,
    small_tmpfs,
    stored_pages,
)
from tests.paging_rig import program_fixture as program_fixture
from tests.paging_rig import rig_fixture as rig_fixture


@run
async def test_commit_stores_what_is_not_zero(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(3, 4, 7)
    guest.fill(7, 2, 0)
    guest.fill(20, 1, 9)
    guest.tell("touch", 40, 4)  # read faults: the kernel's zero page, nothing to store
    result = await guest.commit(target, 1)
    assert [row for row in rows(result.runs) if row[2] == STORED] == [(3, 4, STORED), (20, 1, STORED)]
    assert (7, 2, ZERO) in rows(result.runs)
    assert result.stored_pages == 5 and result.zero_pages >= 2 and result.dirty_pages == 5 + result.zero_pages
    assert stored_pages(target) == 5
    assert os.pread(target, PAGE_BYTES, 20 * PAGE_BYTES) == b"\x09" * PAGE_BYTES
    shown = [0] * PAGES
    shown[3:7], shown[20] = [7] * 4, 9
    assert guest.show() == shown
    assert stored_pages(target) == 5, "nothing that was zero may have got a page by being read"
    statistics = await guest.layer.statistics(guest.address, BYTES)
    assert statistics.private_pages == 0 or rig.scan is ScanMethod.PAGEMAP
    assert statistics.file_pages == 5
    assert 0 < statistics.process_anonymous_bytes <= statistics.process_private_bytes
    assert 10 < statistics.mappings < statistics.max_mappings


@run
async def test_next_commit_costs_only_what_was_dirtied_since(rig: Rig) -> None:
    guest, first, second = rig.guest(), rig.memfd(), rig.memfd()
    guest.fill(0, 50, 1)
    assert (await guest.commit(first, 1)).stored_pages == 50
    assert (await guest.commit(second, 2)).stored_pages == 0
    guest.fill(10, 2, 2)
    guest.fill(30, 1, 0)
    result = await guest.commit(second, 2)
    assert [row for row in rows(result.runs) if row[0] < 50] == [(10, 2, STORED), (30, 1, ZERO)]
    assert guest.show(9, 4) == [1, 2, 2, 1] and guest.show(29, 3) == [1, 0, 1]
    assert stored_pages(first) == 50 and stored_pages(second) == 2


@run
async def test_a_page_that_is_what_it_was_is_not_stored_again(rig: Rig) -> None:
    """It is shared again, whichever layer holds it; long rows are taken for data, and stored unseen."""
    guest, layers = rig.guest(), {number: rig.memfd() for number in (1, 2, 3)}
    guest.fill(0, 50, 1)
    await guest.commit(layers[1], 1)
    guest.fill(0, 20, 2)
    await guest.commit(layers[2], 2, layers=layers)
    for page, pages, byte in ((1, 2, 2), (5, 1, 9), (6, 1, 2), (25, 3, 1), (30, 1, 0)):
        guest.fill(page, pages, byte)
    result = await guest.commit(layers[3], 3, layers=layers)
    assert [row for row in rows(result.runs) if row[0] < 50] == [(5, 1, STORED), (30, 1, ZERO)]
    assert (result.stored_pages, result.dirty_pages - result.zero_pages) == (1, 7)
    shown = [2] * 5 + [9] + [2] * 14 + [1] * 10 + [0] + [1] * 19
    assert guest.show(0, 50) == shown
    for page, byte in ((5, 9), (7, 2), (40, 1)):
        guest.fill(page, 1, byte)
    result = await guest.commit(layers[3], 3, CommitMode.IN_PLACE, layers=layers)
    assert not [row for row in rows(result.runs) if row[2] == STORED] and result.stored_pages == 0
    assert guest.show(0, 50) == shown
    assert [stored_pages(layers[number]) for number in (1, 2, 3)] == [50, 20, 1]
    clone = rig.guest()
    await clone.load(guest.map, layers)
    assert clone.show(0, 50) == shown
    guest.fill(0, 50, 1)
    assert (await guest.commit(layers[3], 3, CommitMode.IN_PLACE, layers=layers)).stored_pages == 50


@run
async def test_clone_does_not_see_later_writes_of_parent_or_sibling(rig: Rig) -> None:
    parent, base = rig.guest(), rig.memfd()
    parent.fill(0, 32, 1)
    await parent.commit(base, 1)
    clones = [rig.guest(), rig.guest()]
    with MapPlan(parent.map, {1: base}) as plan:
        await asyncio.gather(*(clone.layer.map(clone.address, plan) for clone in clones))
    parent.fill(4, 4, 2)
    parent.fill(40, 1, 2)
    clones[0].fill(5, 1, 3)
    assert parent.show(3, 6) == [1, 2, 2, 2, 2, 1]
    assert clones[0].show(3, 6) == [1, 1, 3, 1, 1, 1]
    assert clones[1].show() == [1] * 32 + [0] * 32
    assert stored_pages(base) == 32
    # A fork of the parent with clones alive, and one of a clone: both into fresh layers.
    deltas = {2: rig.memfd(), 3: rig.memfd()}
    await parent.commit(deltas[2], 2)
    clones[0].map = plan.memory_map
    assert (await clones[0].commit(deltas[3], 3)).stored_pages == 1
    grandchild, second = rig.guest(), rig.guest()
    await grandchild.load(clones[0].map, {1: base, 3: deltas[3]})
    await second.load(parent.map, {1: base, 2: deltas[2]})
    assert grandchild.show(3, 6) == [1, 1, 3, 1, 1, 1] and grandchild.show(40, 1) == [0]
    assert second.show(3, 6) == [1, 2, 2, 2, 2, 1] and second.show(40, 1) == [2]
    assert clones[1].show() == [1] * 32 + [0] * 32


@run
async def test_over_a_base_only_what_differs_is_mapped(rig: Rig) -> None:
    parent, layers = rig.guest(), {1: rig.memfd(), 2: rig.memfd()}
    parent.fill(0, 40, 1)
    await parent.commit(layers[1], 1)
    parent.fill(8, 4, 2)
    await parent.commit(layers[2], 2)
    clone = rig.guest()
    await clone.load(parent.map, layers)
    # While the clone waits, its layer gets other pages, and fewer, and it is written to where nothing will be mapped anew.
    parent.fill(8, 2, 3)
    parent.fill(20, 1, 3)
    parent.fill(11, 1, 0)
    await parent.commit(layers[2], 2, CommitMode.IN_PLACE)
    clone.fill(9, 2, 9)
    clone.fill(30, 20, 9)
    with MapPlan(parent.map, layers, clone.map) as plan:
        assert plan.extents.array["layer"].tolist() == [KEPT_LAYER, ZERO_LAYER, KEPT_LAYER, 0, KEPT_LAYER]
        assert plan.extents.layers == (2,)
        await clone.layer.map(clone.address, plan)
        clone.map = plan.memory_map
    shown = [1] * 8 + [3, 3, 2, 0] + [1] * 8 + [3] + [1] * 19 + [0] * 24
    assert parent.show() == clone.show() == shown
    clone.fill(10, 1, 7)
    assert (await clone.commit(rig.memfd(), 3)).stored_pages == 1
    assert parent.show() == shown


@run
async def test_in_place_commit_reuses_and_frees_pages_of_its_layer(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 20, 1)
    await guest.commit(target, 1)
    mappings = (await guest.layer.statistics(guest.address, BYTES)).mappings
    for round_ in range(2, 6):
        guest.fill(5, 3, round_)
        result = await guest.commit(target, 1, CommitMode.IN_PLACE)
        assert [row for row in rows(result.runs) if row[0] < 20] == [(5, 3, STORED)]
    statistics = await guest.layer.statistics(guest.address, BYTES)
    assert statistics.mappings <= mappings, "pages that come from the target already need no mapping"
    assert guest.show(4, 5) == [1, 5, 5, 5, 1]
    guest.fill(5, 3, 0)
    guest.fill(25, 1, 8)
    result = await guest.commit(target, 1, CommitMode.IN_PLACE)
    assert [row for row in rows(result.runs) if row[0] < 26] == [(5, 3, ZERO), (25, 1, STORED)]
    assert stored_pages(target) == 20 - 3 + 1
    assert guest.show(4, 5) == [1, 0, 0, 0, 1] and guest.show(24, 3) == [0, 8, 0]
    clone = rig.guest()
    await clone.load(guest.map, {1: target})
    assert clone.show() == guest.show()


@run
async def test_short_clean_gaps_are_stored_too(rig: Rig) -> None:
    """So that image and mappings stay in few pieces; a gap of five pages is too long for that."""
    guest, target, other = rig.guest(), rig.memfd(), rig.memfd()
    guest.fill(0, 60, 1)
    await guest.commit(other, 2)
    before = guest.mappings()
    for page in (*range(0, 20, 2), 24, 29):
        guest.fill(page, 1, 3)
    result = await guest.commit(target, 1)
    assert rows(result.runs) == [(0, 19, STORED), (24, 6, STORED)]
    assert result.dirty_pages == 12 and result.stored_pages == stored_pages(target) == 25
    assert guest.mappings() <= before + 4
    for page in range(1, 20, 2):
        guest.fill(page, 1, 4)
    result = await guest.commit(target, 1, CommitMode.IN_PLACE)
    assert result.stored_pages == 10, "what lies between is in the target already"
    assert guest.show(0, 20) == [3, 4] * 10 and guest.show(20, 40) == [1] * 4 + [3] + [1] * 4 + [3] + [1] * 30
    clone = rig.guest()
    await clone.load(guest.map, {1: target, 2: other})
    assert clone.show() == guest.show()


@run
async def test_scattered_pages_are_found_once_each(rig: Rig) -> None:
    """More runs than the kernel's (512) and the library's (2048) buffers of PAGEMAP_SCAN hold, and just as many."""
    for runs in (511, 512, 513, 1500, 2048, 2049, 5000):
        guest, target = rig.guest(2 * runs), rig.memfd(2 * runs * PAGE_BYTES)
        for page in range(0, 2 * runs, 2):
            guest.fill(page, 1, 1)
        result = await guest.commit(target, 1)
        assert rows(result.runs) == [(page, 1, STORED) for page in range(0, 2 * runs, 2)]


@run
async def test_random_generations(rig: Rig) -> None:
    """Random writes, commits of both kinds, clones and remaps against an array of what memory must hold."""
    random = np.random.default_rng(1)
    parent = rig.guest()
    expected = np.zeros(PAGES, dtype=int)
    layers: dict[int, int] = {}
    exclusive = 0
    frozen: list[tuple[Guest, list[int]]] = []
    for round_ in range(60):
        for _ in range(int(random.integers(0, 6))):
            page = int(random.integers(0, PAGES))
            pages = int(random.integers(1, min(9, PAGES - page) + 1))
            byte = int(random.integers(0, 4))
            parent.fill(page, pages, byte)
            expected[page:page + pages] = byte
        in_place = bool(exclusive and random.random() < 0.7)
        if not in_place:
            exclusive = len(layers) + 1
            layers[exclusive] = rig.memfd()
        await parent.commit(layers[exclusive], exclusive, CommitMode.IN_PLACE if in_place else CommitMode.FRESH)
        assert parent.show() == expected.tolist(), round_
        if random.random() < 0.15:
            clone = rig.guest()
            await clone.load(parent.map, layers)
            frozen.append((clone, expected.tolist()))
            exclusive = 0
        if random.random() < 0.1:
            number = len(layers) + 1
            plan = parent.map.flatten(number)
            layers[number] = rig.memfd()
            plans.copy_pages(plan, layers, layers[number])
            await parent.load(plan.memory_map, layers)
            exclusive = number
            assert parent.show() == expected.tolist(), round_
    assert frozen
    for clone, memory in frozen:
        assert clone.show() == memory


@run
async def test_failed_write_leaves_memory_intact(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 20, 1)
    guest.tell("limit", 8 * PAGE_BYTES)
    error = await refused(guest.commit(target, 1), errno.EFBIG, PagingStep.WRITE)
    assert error.memory_intact
    guest.fill(2, 1, 2)
    assert guest.show(0, 21) == [1, 1, 2, *[1] * 17, 0]
    guest.tell("limit", 1 << 40)
    result = await guest.commit(target, 1)
    assert result.stored_pages == 20
    assert guest.show(0, 21) == [1, 1, 2, *[1] * 17, 0]


@pytest.mark.needs("root")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_full_file_system_leaves_memory_intact(rig: Rig, tmp_path: Path) -> None:
    async def scenario() -> None:
        with small_tmpfs(tmp_path, 16 * PAGE_BYTES) as folder, open(folder / "layer", "w+b") as file:
            file.truncate(BYTES)
            guest = rig.guest()
            guest.fill(0, 20, 1)
            error = await refused(guest.commit(file.fileno(), 1), errno.ENOSPC, PagingStep.WRITE)
            assert error.memory_intact and error.hint and "free" in error.hint
            assert guest.show(0, 21) == [*[1] * 20, 0]
            # What the failed commit left behind must not come back when the pages are zero in the next one.
            guest.fill(12, 8, 0)
            result = await guest.commit(file.fileno(), 1, CommitMode.IN_PLACE)
            assert result.stored_pages == 12 and stored_pages(file.fileno()) == 12
            assert guest.show(0, 21) == [*[1] * 12, *[0] * 9]
            guest.layer.close()
            guest.process.wait(HANG_S)

    asyncio.run(scenario())


@run
async def test_sealed_target_is_refused_before_anything_happens(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    fcntl.fcntl(target, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    guest.fill(0, 3, 1)
    await refused(guest.commit(target, 1), errno.EPERM, PagingStep.WRITE)
    assert guest.show(0, 4) == [1, 1, 1, 0]


@run
async def test_commit_without_remap(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 3, 1)
    result = await guest.commit(target, 1, CommitMode.NO_REMAP)
    assert not result.remapped and result.remap_step is PagingStep.NONE and result.stored_pages == 3
    assert (await guest.layer.statistics(guest.address, BYTES)).private_pages >= 3
    await guest.load(guest.map.apply(result.runs, 1), {1: target})
    assert (await guest.layer.statistics(guest.address, BYTES)).private_pages == 0
    assert guest.show(0, 4) == [1, 1, 1, 0]


@run
async def test_commit_arguments_are_checked(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 3, 1)
    zero = MemoryMap.zero(PAGES)

    async def attempt(number: int, step: PagingStep, *, address: int = guest.address, memory_map: MemoryMap = zero,
                      fd: int = target, layer: int = 1) -> None:
        error = await refused(guest.layer.commit(address, memory_map, fd, layer), number, step)
        assert error.memory_intact

    await attempt(errno.EINVAL, PagingStep.ARGUMENTS, address=guest.address + 1)
    await attempt(errno.EINVAL, PagingStep.ARGUMENTS, address=2**64 - PAGE_BYTES)
    await attempt(errno.EINVAL, PagingStep.ARGUMENTS, layer=0)
    await attempt(errno.EINVAL, PagingStep.ARGUMENTS, layer=65536)
    await attempt(errno.ENOMEM, PagingStep.RANGE, address=PAGE_BYTES)
    await attempt(errno.ENODATA, PagingStep.FILES, fd=rig.memfd(BYTES - 1))
    await attempt(errno.EINVAL, PagingStep.SOURCES, memory_map=MemoryMap(np.ones(PAGES, dtype=np.uint16)))
    with open("/dev/null", "r+b") as null:
        await attempt(errno.EINVAL, PagingStep.FILES, fd=null.fileno())
    with closing(os.fdopen(os.open(f"/proc/self/fd/{target}", os.O_RDONLY), "rb")) as read_only:
        await attempt(errno.EBADF, PagingStep.FILES, fd=read_only.fileno())
    assert guest.show(0, 4) == [1, 1, 1, 0]


class RawPlan(MapPlan):
    """A plan that says what the test wants, right or wrong."""

    def __init__(self, extents: list[tuple[int, int, int, int]], layers: list[int], announced: int | None = None) -> None:
        super().__init__(MemoryMap.zero(PAGES), {})
        content = np.array(extents, dtype=EXTENT)
        self.extents = Extents(np.zeros(len(content) if announced is None else announced, dtype=EXTENT), ())
        os.close(self._fds.pop())
        self._fds = [plans._memfd("extents", content.tobytes()), *map(os.dup, layers)]


HALF = BYTES // 2
Z = ZERO_LAYER
BAD_EXTENTS: list[tuple[str, list[tuple[int, int, int, int]], int, PagingStep]] = [
    ("a gap", [(0, PAGE_BYTES, 0, 0), (2 * PAGE_BYTES, BYTES - 2 * PAGE_BYTES, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("an overlap", [(0, HALF, 0, 0), (HALF - PAGE_BYTES, HALF + PAGE_BYTES, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("not sorted", [(HALF, HALF, 0, 0), (0, HALF, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("too short", [(0, HALF, 0, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("too long", [(0, HALF, 0, 0), (HALF, BYTES, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("length overflow", [(0, HALF, 0, 0), (HALF, 2**64 - PAGE_BYTES, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("nothing", [(0, 0, 0, 0), (0, BYTES, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("not aligned", [(0, HALF + 1, 0, 0), (HALF + 1, HALF - 1, Z, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("unknown layer", [(0, HALF, 0, 0), (HALF, HALF, 2, 0)], errno.EINVAL, PagingStep.EXTENTS),
    ("reserved", [(0, BYTES, 0, 1)], errno.EINVAL, PagingStep.EXTENTS),
    ("layer too short", [(0, HALF, 0, 0), (HALF, HALF, 1, 0)], errno.ENODATA, PagingStep.FILES),
]


@run
async def test_bad_extents_do_not_touch_memory(rig: Rig) -> None:
    guest, layer, short = rig.guest(), rig.memfd(), rig.memfd(BYTES - 1)
    guest.fill(0, PAGES, 5)
    for reason, extents, number, step in BAD_EXTENTS:
        with RawPlan(extents, [layer, short]) as plan:
            error = await refused(guest.layer.map(guest.address, plan), number, step)
            assert error.memory_intact and guest.show() == [5] * PAGES, reason
    good = [(0, BYTES, 0, 0)]
    with RawPlan(good, [layer], announced=2) as plan:
        await refused(guest.layer.map(guest.address, plan), errno.ENODATA, PagingStep.EXTENTS)
    with RawPlan(good, [layer], announced=0) as plan:
        await refused(guest.layer.map(guest.address, plan), errno.EINVAL, PagingStep.ARGUMENTS)
    with RawPlan(good, [layer], announced=(1 << 20) + 1) as plan:
        await refused(guest.layer.map(guest.address, plan), errno.E2BIG, PagingStep.ARGUMENTS)
    with RawPlan(good, [layer] * 251) as plan:
        await refused(guest.layer.map(guest.address, plan), errno.E2BIG, PagingStep.ARGUMENTS)
    with open("/dev/zero", "rb") as device, RawPlan(good, [device.fileno()]) as plan:
        await refused(guest.layer.map(guest.address, plan), errno.EINVAL, PagingStep.FILES)
    with RawPlan(good, [layer]) as plan:
        await refused(guest.layer.map(guest.address + BYTES * 1000, plan), errno.ENOMEM, PagingStep.RANGE)
        assert guest.show() == [5] * PAGES
        await guest.layer.map(guest.address, plan)
        assert guest.show() == [0] * PAGES


@run
async def test_as_many_layers_as_a_message_carries(rig: Rig) -> None:
    guest, parts = rig.guest(300), {}
    source = np.zeros(300, dtype=np.uint16)
    for number in range(1, 252):
        parts[number] = rig.memfd(300 * PAGE_BYTES)
        os.pwrite(parts[number], bytes([number % 200 + 1]) * PAGE_BYTES, number * PAGE_BYTES)
        source[number] = number
    with pytest.raises(PagingError, match="251 layers"):
        MapPlan(MemoryMap(source), parts)
    source[251] = 0
    await guest.load(MemoryMap(source), parts)
    assert guest.show(0, 252) == [0, *(number % 200 + 1 for number in range(1, 251)), 0]
    guest.tell("files", 100)
    with MapPlan(MemoryMap(source), parts) as plan:
        error = await refused(guest.layer.map(guest.address, plan), errno.EMFILE, PagingStep.RECEIVE)
    assert error.hint and "ulimit" in error.hint
    await guest.layer.hello()
    open_files = len(os.listdir(f"/proc/{guest.process.pid}/fd"))
    assert open_files < 12, "descriptors of a refused message are closed"


@run
async def test_too_many_mappings_are_refused_beforehand(rig: Rig) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 300_000:
        pytest.skip("vm.max_map_count is so high here that the test would take long")
    pages = limit + 2000
    guest, layer = rig.guest(pages), rig.memfd((limit + 2000) * PAGE_BYTES)
    source = np.zeros(pages, dtype=np.uint16)
    source[::2] = 1
    extents = MemoryMap(source).extents()
    with RawPlan(extents.array.tolist(), [layer]) as plan:
        plan.memory_map = MemoryMap.zero(pages)
        error = await refused(guest.layer.map(guest.address, plan), errno.ENOMEM, PagingStep.BUDGET)
    assert error.memory_intact and error.hint and "max_map_count" in error.hint
    # The same limit met by a commit: the image is complete, only not shared.
    for page in range(0, pages, 2):
        guest.tell("fill", page, 1, 1)
    result = await guest.layer.commit(guest.address, guest.map, layer, 1)
    assert not result.remapped and result.remap_step is PagingStep.BUDGET and result.stored_pages == pages // 2
    assert guest.show(0, 4) == [1, 0, 1, 0]


@run
async def test_where_nothing_is_translated_nothing_is_warmed(rig: Rig) -> None:
    guest = rig.guest()
    assert await guest.layer.warm(PAGE_BYTES) == 0
    for size_bytes in (0, PAGE_BYTES + 1):
        assert (await refused(guest.layer.warm(size_bytes), errno.EINVAL, PagingStep.ARGUMENTS)).memory_intact


@run
async def test_requests_that_nobody_should_send(rig: Rig) -> None:
    guest = rig.guest()
    control = guest.layer._open()
    loop = asyncio.get_running_loop()

    async def ask(packet: bytes) -> tuple[int, int]:
        control.send(packet)
        reply = paging._REPLY.unpack(await loop.sock_recv(control, 200))
        return int(reply[4]), int(reply[5])

    good = (paging._MAGIC, 1, 1, 77, 0, 0, 0, 0, 0)
    assert await ask(paging._REQUEST.pack(*good)) == (0, 0)
    assert await ask(paging._REQUEST.pack(*good)[:-1]) == (-errno.EPROTO, PagingStep.RECEIVE)
    assert await ask(paging._REQUEST.pack(*good) + b"x") == (-errno.EPROTO, PagingStep.RECEIVE)
    assert await ask(paging._REQUEST.pack(1, *good[1:])) == (-errno.EPROTO, PagingStep.RECEIVE)
    assert await ask(paging._REQUEST.pack(good[0], 2, *good[2:])) == (-errno.EPROTONOSUPPORT, PagingStep.RECEIVE)
    assert await ask(paging._REQUEST.pack(good[0], 1, 99, *good[3:])) == (-errno.ENOSYS, PagingStep.RECEIVE)
    for operation in (2, 3):  # no descriptors
        assert (await ask(paging._REQUEST.pack(good[0], 1, operation, *good[3:])))[0] == -errno.EINVAL
    hello = await guest.layer.hello()
    assert hello.pid == guest.process.pid and hello.page_bytes == PAGE_BYTES


@run
async def test_cancelled_request_does_not_confuse_the_next(rig: Rig) -> None:
    guest = rig.guest()
    guest.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, guest.process.pid, os.WSTOPPED)  # all of its threads stand still
    task = asyncio.create_task(guest.layer.hello())
    await asyncio.sleep(0)  # it runs up to the point where it waits for the answer
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    guest.process.send_signal(signal.SIGCONT)
    statistics = await guest.layer.statistics(guest.address, BYTES)
    assert statistics.max_mappings > 0
    results = await asyncio.gather(*(guest.layer.hello() for _ in range(5)))
    assert len(set(results)) == 1


@run
async def test_end_of_connection_ends_the_process(rig: Rig) -> None:
    guest = rig.guest()
    assert guest.tell("environment") == "0"
    await guest.layer.hello()
    guest.layer.close()
    guest.layer.close()
    assert guest.process.wait(HANG_S) == 0
    with pytest.raises(Closed):
        await guest.layer.hello()


@run
async def test_end_of_the_process_is_reported(rig: Rig) -> None:
    guest = rig.guest()
    guest.process.kill()
    guest.process.wait(HANG_S)
    with pytest.raises(PagingError, match="ended"):
        await guest.layer.hello()


def test_listening_library_accepts_one_peer(rig: Rig, tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "page"
        process = rig.spawn({"SFPAGE_PATH": str(path)})
        assert process.stdout
        process.stdout.readline()  # main has begun: the constructor has bound the socket
        layer = await PagingLayer.connect(path, "guest")
        await layer.hello()
        assert not path.exists()
        with pytest.raises(PagingError, match="no paging layer"):
            await PagingLayer.connect(path, "guest")
        layer.close()
        assert process.wait(HANG_S) == 0

    asyncio.run(scenario())


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(sys.argv[1])
    print(sock.recv(100))
"""


@pytest.mark.needs("root")
def test_listening_library_turns_other_users_away(rig: Rig) -> None:
    """Even where the socket's permissions let them in: the peer owns guest memory."""

    async def meet(path: Path) -> None:
        layer = await PagingLayer.connect(path, "guest")
        await layer.hello()
        layer.close()

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "page"
        process = rig.spawn({"SFPAGE_PATH": str(path)})
        assert process.stdout
        process.stdout.readline()
        path.chmod(0o777)
        ended = subprocess.run([sys.executable, "-c", STRANGER, path], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        assert ended.stdout == "b''\n"
        asyncio.run(meet(path))
        assert process.wait(HANG_S) == 0


def test_listening_library_gives_up(rig: Rig, tmp_path: Path) -> None:
    process = rig.spawn({"SFPAGE_PATH": str(tmp_path / "page"), "SFPAGE_WAIT_MS": "50"})
    assert process.wait(HANG_S) == 119
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("variables", [
    {"SFPAGE_FD": "77"}, {"SFPAGE_FD": "x"}, {"SFPAGE_FD": "0"}, {"SFPAGE_PATH": "/" + "x" * 200}, {"SFPAGE_PATH": "/none/page"},
], ids=str)
def test_unusable_connection_ends_the_process(rig: Rig, variables: dict[str, str]) -> None:
    assert rig.spawn(variables).wait(HANG_S) == 119


def test_plan_wants_all_layers() -> None:
    with pytest.raises(UsageError, match=r"\[4\]"):
        MapPlan(MemoryMap(np.array([0, 4], dtype=np.uint16)), {})
    plan = MapPlan(MemoryMap.zero(4), {})
    plan.close()
    with pytest.raises(Closed):
        _ = plan.fds
