"""What a pool does with its shells. The shells are stand-ins: tests/test_kvm.py and the tests of forks have real ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest

from sfparallel.errors import PagingError, ProtocolError, StateError
from sfparallel.vmm.checkpoint import Checkpoint, LayerStore
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap
from sfparallel.vmm.plans import MapPlan
from sfparallel.vmm.pool import ImageAhead, Pool
from sfparallel.vmm.vm import Vm, VmState
from tests.conftest import HANG_S

PAGES = 8


@dataclass(eq=False)
class Shell:
    state: VmState = VmState.SHELL
    memory: MemoryMap | None = None
    maps: list[list[int]] = field(default_factory=list)
    error: Exception | None = None

    def require(self, *states: VmState) -> None:
        if self.state not in states:
            raise StateError("gone")

    async def map_ahead(self, plan: MapPlan) -> None:
        assert len({os.fstat(fd).st_ino for fd in plan.fds}) == len(plan.fds)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        self.memory = plan.memory_map
        self.maps.append(list(plan.memory_map.layers))

    def kill(self) -> None:
        self.state = VmState.GONE


class Rig:
    def __init__(self) -> None:
        self.store = LayerStore()
        self.parent = object()
        self.shells: list[Shell] = []
        self.errors: Iterator[Exception | None] = itertools.repeat(None)
        self.image = ImageAhead(self.store)
        self.pool = Pool(self.start, self.image)

    async def start(self) -> Vm:
        self.shells.append(Shell(error=next(self.errors)))
        await asyncio.sleep(0)
        return cast(Vm, self.shells[-1])

    def layer(self) -> int:
        return self.store.create(PAGES * PAGE_BYTES, self.parent)


def image_of(*layers: int) -> MemoryMap:
    return MemoryMap(np.array([*layers, *[0] * (PAGES - len(layers))], dtype=np.uint16))


def test_layers_of_shells_that_wait_may_be_written_to() -> None:
    store = LayerStore()
    number = store.create(PAGE_BYTES, "parent")
    store.hold("shell", [number], waiting=True)
    assert store.exclusive(number, "parent") and not store.exclusive(number, "shell")
    store.hold("shell", [number])
    assert not store.exclusive(number, "parent")
    store.release("shell")
    store.hold("shell", [number], waiting=True)
    store.release("shell")
    store.hold("shell", [number])
    assert not store.exclusive(number, "parent"), "that it waited once is forgotten"
    store.release("parent")
    assert store.exclusive(number, "shell") and len(store) == 1
    store.release("shell")
    assert len(store) == 0 and not store.exclusive(number, "shell")


def test_bases_without_number_do_not_mean_plans_without_number() -> None:
    store = LayerStore()
    number = store.create(PAGES * PAGE_BYTES, "parent")
    with contextlib.closing(Checkpoint(image_of(number), os.memfd_create("devices"), store)) as checkpoint:
        bases = [image_of(*[number] * (i % 3), 0, number) for i in range(20)]
        plans = [checkpoint.plan(base) for base in bases]
        most = sum(plan.base is not None for plan in plans)
        assert 4 <= most <= 8 and [plan.base for plan in plans] == [*bases[:most], *[None] * (20 - most)]
        assert plans[most:] == plans[most:most + 1] * (20 - most) and checkpoint.plan(bases[2]) is plans[2]
        checkpoint.forget_plans()
        assert checkpoint.plan(bases[9]).base is bases[9]
    store.release("parent")


def test_scattered_image_is_not_mapped_ahead() -> None:
    async def test() -> None:
        rig = Rig()
        number = rig.layer()
        scattered = np.zeros(40_000, dtype=np.uint16)
        scattered[::2] = number
        for memory, mapped in ((MemoryMap(scattered), []), (image_of(number), [[number]]), (MemoryMap(scattered), [[number]])):
            rig.pool.follow(memory)
            rig.pool.aim(1)
            await asyncio.wait_for(rig.pool.wait_full(), HANG_S)
            assert [shell.maps for shell in rig.shells] == [mapped]
        rig.pool.close()

    asyncio.run(test())


def test_shells_are_mapped_while_they_wait_and_anew_when_they_keep_a_layer_alive() -> None:
    async def test() -> None:
        rig = Rig()
        first, second = rig.layer(), rig.layer()
        rig.pool.follow(image_of(first, second))
        rig.pool.aim(2)
        await rig.pool.wait_full()
        assert [shell.maps for shell in rig.shells] == [[[first, second]]] * 2
        assert rig.store.exclusive(first, rig.parent)
        # One layer more: the shells can stay as they are.
        third = rig.layer()
        rig.pool.follow(image_of(first, second, third))
        await rig.pool.wait_full()
        assert [len(shell.maps) for shell in rig.shells] == [1, 1]
        # One that nobody but the pool holds: it goes when the shells are mapped by the new image.
        rig.pool.follow(image_of(third, first))
        rig.store.release(rig.parent, keep=[first, third])
        assert len(rig.store) == 3
        await rig.pool.wait_full()
        assert [shell.maps[1:] for shell in rig.shells] == [[[first, third]]] * 2
        assert len(rig.store) == 2 and len(rig.pool) == 2
        taken = await rig.pool.take(2)
        assert taken == rig.shells
        for shell in taken:
            rig.store.release(shell)
        rig.pool.close()
        rig.store.release(rig.parent)
        assert len(rig.store) == 0

    asyncio.run(test())


ERRORS = [PagingError("no more mappings"), ProtocolError("no answer"), OSError(errno.EMFILE, "no more descriptors")]


@pytest.mark.parametrize("error", ERRORS)
def test_shell_that_cannot_be_mapped_is_ended_told_of_and_replaced(error: Exception) -> None:
    async def test() -> None:
        rig = Rig()
        rig.errors = itertools.chain([error], itertools.repeat(None))
        rig.pool.follow(image_of(rig.layer()))
        rig.pool.aim(1)
        await rig.pool.wait_full()
        assert rig.shells[0].state is VmState.GONE and rig.pool.error is error
        assert len(rig.pool) == 1
        rig.pool.close()

    asyncio.run(test())


def test_pool_gives_up_where_no_shell_can_be_had() -> None:
    async def test() -> None:
        rig = Rig()
        rig.errors = itertools.repeat(ERRORS[0])
        rig.pool.follow(image_of(rig.layer()))
        rig.pool.aim(1)
        async with asyncio.timeout(HANG_S):
            await rig.pool.wait_full()
        assert len(rig.shells) == 3 and not len(rig.pool)
        rig.pool.close()

    asyncio.run(test())


def test_shells_of_a_fork_that_is_given_up_go_back() -> None:
    async def test() -> None:
        rig = Rig()
        go = asyncio.Event()
        start = rig.start

        async def start_slowly() -> Vm:
            if len(rig.shells) == 2:
                await go.wait()
            return await start()

        rig.pool = Pool(start_slowly, rig.image)
        taking = asyncio.create_task(rig.pool.take(3))
        while len(rig.shells) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert len(rig.pool) == len(rig.shells) == 2
        rig.pool.close()

    asyncio.run(test())


def test_pool_waits_for_all_forks_that_are_under_way() -> None:
    async def test() -> None:
        rig = Rig()
        with rig.pool.held():
            with rig.pool.held():
                rig.pool.aim(1)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not rig.shells
        await rig.pool.wait_full()
        assert len(rig.pool) == 1
        rig.pool.close()

    asyncio.run(test())


def test_a_checkpoint_in_use_is_closed_when_nobody_uses_it_any_more() -> None:
    store = LayerStore()
    number = store.create(PAGES * PAGE_BYTES, "parent")
    devices = os.memfd_create("devices")
    checkpoint = Checkpoint(image_of(number), devices, store)
    store.release("parent")
    with checkpoint.in_use(), checkpoint.in_use():
        checkpoint.close()
        plan = checkpoint.plan()
        assert os.fstat(devices) and all(os.fstat(fd) for fd in plan.fds)
    assert len(store) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(devices)
    with pytest.raises(StateError, match="closed"):
        checkpoint.plan()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shell_that_ends_before_it_is_mapped_or_meanwhile_is_left_out(steps: int) -> None:
    async def test() -> None:
        rig = Rig()
        rig.pool.follow(image_of(rig.layer()))
        rig.pool.aim(1)
        for _ in range(steps):
            await asyncio.sleep(0)
        rig.shells[0].kill()
        rig.pool.discard(cast(Vm, rig.shells[0]))
        async with asyncio.timeout(HANG_S):
            for _ in range(2):  # the first may end with what has befallen the shell
                await rig.pool.wait_full()
        assert len(rig.pool) == 1 and rig.shells[1].maps
        rig.pool.close()

    asyncio.run(test())
