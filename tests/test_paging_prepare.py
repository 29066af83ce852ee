"""Commits that were prepared while the VM ran: the same outcome as without, whatever happens in between; nothing is left."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.vmm.layers import PAGE_BYTES, STORED, ZERO, MemoryMap
from sfparallel.vmm.paging import PagingRefused, PagingStep, ScanMethod
from sfparallel.vmm.plans import CommitMode, CommitPlan
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

LARGE = 1024
"""Pages of a guest with rows that are moved aside as a whole."""
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
OVER_A_FILE = mmap.MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
"""Flags with which the library maps a layer over guest memory, and nothing else maps anything."""


@run
async def test_what_changes_after_preparing_is_committed_as_it_is_then(rig: Rig) -> None:
    guest, base, target = rig.guest(128), rig.memfd(128 * PAGE_BYTES), rig.memfd(128 * PAGE_BYTES)
    guest.fill(0, 120, 1)
    await guest.commit(base, 1)
    guest.fill(2, 40, 2)
    guest.fill(60, 2, 1)
    guest.fill(80, 2, 1)
    async with guest.prepared(target, 2, layers={1: base}) as plan:
        assert stored_pages(target) == 40 and guest.show(0, 3) == [1, 1, 2]
        guest.fill(3, 2, 0)  # prepared, and zero now
        guest.fill(60, 1, 2)  # was what its layer holds; the next one still is
        guest.fill(10, 1, 3)
        guest.fill(110, 1, 3)  # not prepared
        result = await guest.carry_out(plan)
    assert [row for row in rows(result.runs) if row[0] < 120] == [
        (2, 1, STORED), (3, 2, ZERO), (5, 37, STORED), (60, 1, STORED), (110, 1, STORED)]  # fmt: skip
    assert stored_pages(target) == 40, "what was prepared for nothing is a hole again"
    expected = [1, 1, 2, 0, 0, *[2] * 5, 3, *[2] * 31, *[1] * 18, 2, *[1] * 49, 3, *[1] * 9]
    assert guest.show(0, 120) == expected
    clone = rig.guest(128)
    await clone.load(guest.map, {1: base, 2: target})
    assert clone.show(0, 120) == expected


@run
async def test_in_place_keeps_pages_that_are_not_dirty_and_those_that_are_what_they_were(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 50, 1)
    await guest.commit(target, 1)
    guest.fill(0, 40, 2)
    async with guest.prepared(target, 1, CommitMode.IN_PLACE) as plan:
        guest.fill(0, 5, 0)
        await guest.carry_out(plan)
    assert guest.show(0, 51) == [*[0] * 5, *[2] * 35, *[1] * 10, 0] and stored_pages(target) == 45
    guest.fill(8, 4, 3)
    async with guest.prepared(target, 1, CommitMode.IN_PLACE, {1: target}) as plan:
        guest.fill(8, 4, 2)  # as it was: nobody looks at that any more
        assert (await guest.carry_out(plan)).stored_pages == 4
    guest.fill(8, 4, 2)
    async with guest.prepared(target, 1, CommitMode.IN_PLACE, {1: target}) as plan:
        assert (await guest.carry_out(plan)).stored_pages == 0
    assert guest.show(0, 51) == [*[0] * 5, *[2] * 35, *[1] * 10, 0] and stored_pages(target) == 45


@run
async def test_large_rows_leave_guest_memory_as_a_whole(rig: Rig) -> None:
    """Over fresh memory, over another layer, over the target itself; zero; and across two mappings, where they cannot."""
    guest, first, second = rig.guest(LARGE), rig.memfd(LARGE * PAGE_BYTES), rig.memfd(LARGE * PAGE_BYTES)
    expected = [0] * LARGE
    for target, number, mode, writes in (
        (first, 1, CommitMode.FRESH, [(100, 600, 1)]),
        (first, 1, CommitMode.IN_PLACE, [(300, 200, 2)]),
        (second, 2, CommitMode.FRESH, [(150, 400, 3), (650, 300, 4)]),
        (second, 2, CommitMode.IN_PLACE, [(100, 600, 5), (700, 100, 0), (900, 124, 6)]),
    ):
        for page, pages, byte in writes:
            guest.fill(page, pages, byte)
            expected[page:page + pages] = [byte] * pages
        async with guest.prepared(target, number, mode) as plan:
            await guest.carry_out(plan)
            assert guest.show(0, LARGE) == expected
        assert guest.show(0, LARGE) == expected
        statistics = await guest.layer.statistics(guest.address, LARGE * PAGE_BYTES)
        assert statistics.private_pages == 0 or rig.scan is ScanMethod.PAGEMAP
        clone = rig.guest(LARGE)
        await clone.load(guest.map, {1: first, 2: second})
        assert clone.show(0, LARGE) == expected
    assert stored_pages(second) == 500 + 100 + 100 + 124, "100 to 649, 650 to 699, 800 to 899 less nothing, 900 to 1023"


@run
async def test_a_row_that_cannot_be_mapped_comes_back(rig: Rig) -> None:
    guest, target = rig.guest(LARGE), rig.memfd(LARGE * PAGE_BYTES)
    guest.fill(100, 600, 1)
    async with guest.prepared(target, 1) as plan:
        assert guest.tell("refuse", OVER_A_FILE) == "0"
        result = await guest.layer.carry_out(guest.address, plan)
        assert not result.remapped and result.remap_step is PagingStep.MMAP and result.stored_pages == 600
        assert guest.show(0, LARGE) == [*[0] * 100, *[1] * 600, *[0] * 324]
    assert guest.show(0, LARGE) == [*[0] * 100, *[1] * 600, *[0] * 324] and stored_pages(target) == 600


@run
async def test_nothing_is_left_of_a_preparation_without_a_commit(rig: Rig) -> None:
    guest, target, other = rig.guest(LARGE), rig.memfd(LARGE * PAGE_BYTES), rig.memfd(LARGE * PAGE_BYTES)
    guest.fill(0, 300, 1)
    await guest.layer.settle()  # of nothing
    before = (await guest.layer.statistics(guest.address, LARGE * PAGE_BYTES)).mappings
    async with guest.prepared(target, 1):
        assert stored_pages(target) == 300
    assert stored_pages(target) == 0
    # A preparation for another target is given up by the commit, and by the next one.
    with CommitPlan(guest.map, target, 1) as plan:
        await guest.layer.prepare(guest.address, plan)
        await guest.layer.prepare(guest.address, plan)
        assert (await guest.commit(other, 2)).stored_pages == 300
    assert (stored_pages(target), stored_pages(other)) == (0, 300)
    after = (await guest.layer.statistics(guest.address, LARGE * PAGE_BYTES)).mappings
    assert guest.mappings() == 2 and after <= before + 20, "the sanitizers' own come and go"
    assert guest.show(0, LARGE) == [*[1] * 300, *[0] * 724]
    files = os.listdir(f"/proc/{guest.process.pid}/fd")
    guest.fill(0, 300, 2)
    for _ in range(5):
        async with guest.prepared(target, 1):
            pass
    assert len(os.listdir(f"/proc/{guest.process.pid}/fd")) == len(files)


@run
async def test_one_preparation_serves_one_commit(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 40, 1)
    with CommitPlan(guest.map, target, 1) as plan:
        await guest.layer.prepare(guest.address, plan)
        result = await guest.layer.carry_out(guest.address, plan)
        guest.map = guest.map.apply(result.runs, 1)
    guest.fill(10, 2, 2)
    guest.fill(50, 2, 2)
    await guest.commit(target, 1, CommitMode.IN_PLACE)
    assert stored_pages(target) == 42 and guest.show() == [*[1] * 10, 2, 2, *[1] * 28, *[0] * 10, 2, 2, *[0] * 12]


@run
async def test_a_commit_that_fails_after_preparing_leaves_memory_intact(rig: Rig) -> None:
    guest, target = rig.guest(), rig.memfd()
    guest.fill(0, 40, 1)
    async with guest.prepared(target, 1) as plan:
        guest.fill(60, 1, 2)  # not prepared, so it is written, which may not be
        guest.tell("limit", 8 * PAGE_BYTES)
        error = await refused(guest.layer.carry_out(guest.address, plan), errno.EFBIG, PagingStep.WRITE)
        assert error.memory_intact
    assert guest.show() == [*[1] * 40, *[0] * 20, 2, *[0] * 3]
    assert stored_pages(target) == 0
    guest.tell("limit", 1 << 40)
    async with guest.prepared(target, 1) as plan:
        assert (await guest.carry_out(plan)).stored_pages == 41
    assert guest.show() == [*[1] * 40, *[0] * 20, 2, *[0] * 3]


@pytest.mark.needs("root")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_without_room_the_commit_decides(rig: Rig, tmp_path: Path) -> None:
    async def scenario() -> None:
        with small_tmpfs(tmp_path, 48 * PAGE_BYTES) as folder, open(folder / "layer", "w+b") as file:
            file.truncate(BYTES)
            guest = rig.guest()
            guest.fill(0, 60, 1)
            with CommitPlan(guest.map, file.fileno(), 1) as plan:
                with pytest.raises(PagingRefused) as caught:
                    await guest.layer.prepare(guest.address, plan)
                assert caught.value.step is PagingStep.POPULATE and caught.value.memory_intact
                assert stored_pages(file.fileno()) == 0
                await refused(guest.layer.carry_out(guest.address, plan), errno.ENOSPC, PagingStep.WRITE)
                assert guest.show() == [*[1] * 60, *[0] * 4]
                await guest.layer.settle()
            guest.fill(30, 30, 0)
            async with guest.prepared(file.fileno(), 1, CommitMode.IN_PLACE) as plan:
                assert (await guest.carry_out(plan)).stored_pages == 30
            assert guest.show() == [*[1] * 30, *[0] * 34] and stored_pages(file.fileno()) == 30
            guest.layer.close()
            guest.process.wait(HANG_S)

    asyncio.run(scenario())


@run
async def test_preparations_that_nobody_should_ask_for(rig: Rig) -> None:
    guest, target, short = rig.guest(), rig.memfd(), rig.memfd(BYTES - 1)
    guest.fill(0, 3, 1)
    for memory_map, fd, number, step in (
        (MemoryMap([1] * PAGES), target, errno.EINVAL, PagingStep.SOURCES),
        (guest.map, short, errno.ENODATA, PagingStep.FILES),
    ):
        with CommitPlan(memory_map, fd, 1) as plan:
            await refused(guest.layer.prepare(guest.address, plan), number, step)
    # What was prepared in place is no licence for a commit that is not.
    with CommitPlan(MemoryMap([1] * PAGES), target, 1, CommitMode.IN_PLACE) as plan:
        await guest.layer.prepare(guest.address, plan)
        plan.mode = CommitMode.FRESH
        await refused(guest.layer.carry_out(guest.address, plan), errno.EINVAL, PagingStep.SOURCES)
    assert guest.show(0, 4) == [1, 1, 1, 0]


Write = tuple[int, int, int]
Round = tuple[list[Write], bool, list[Write], str, bool]
WRITES = st.lists(st.tuples(st.integers(0, 191), st.integers(1, 100), st.integers(0, 3)), max_size=5)
ROUND = st.tuples(WRITES, st.booleans(), WRITES, st.sampled_from(["fresh", "in place", "none"]), st.booleans())


def write(guest: Guest, expected: list[int], writes: list[Write]) -> None:
    for page, pages, byte in writes:
        count = min(pages, len(expected) - page)
        guest.fill(page, count, byte)
        expected[page:page + count] = [byte] * count


@pytest.mark.parametrize("scan", list(ScanMethod), ids=lambda method: method.value)
@given(rounds=st.lists(ROUND, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_against_an_array(program: Path, scan: ScanMethod, rounds: list[Round]) -> None:
    """Writes, preparing or not, more writes, a commit or none: memory, image and what the target stores are as they must be."""

    async def scenario(rig: Rig) -> None:
        pages = 192
        guest, clone, layers = rig.guest(pages), rig.guest(pages), {1: rig.memfd(pages * PAGE_BYTES)}
        expected = [0] * pages
        await guest.commit(layers[1], 1)
        for before, prepare, after, kind, compare in rounds:
            write(guest, expected, before)
            mode = CommitMode.FRESH if kind == "fresh" else CommitMode.IN_PLACE
            number = len(layers) + 1 if kind == "fresh" else len(layers)
            if kind == "fresh":
                layers[number] = rig.memfd(pages * PAGE_BYTES)
            with CommitPlan(guest.map, layers[number], number, mode, layers=layers if compare else None) as plan:
                if prepare:
                    await guest.layer.prepare(guest.address, plan)
                write(guest, expected, after)
                if kind != "none":
                    await guest.carry_out(plan)
                await guest.layer.settle()
                await guest.layer.hello()
            assert guest.show(0, pages) == expected
            assert stored_pages(layers[number]) == guest.map.pages_of(number)
        # Last: a clone that reads short gaps of zeros gets them from the layer around them, which then has a page there.
        await guest.commit(layers[len(layers)], len(layers), CommitMode.IN_PLACE)
        await clone.load(guest.map, layers)
        assert clone.show(0, pages) == expected

    with ExitStack() as stack:
        rig = Rig(program, scan, stack)
        asyncio.run(asyncio.wait_for(scenario(rig), HANG_S))
        rig.check_stderr()
