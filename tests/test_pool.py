"""What a pool does with its shells. The shells are stand-ins: tests/test_kvm.py and the tests of forks have real ones."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest

from sfparallel.errors import PagingError, StateError
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap
from sfparallel.vmm.plans import MapPlan
from sfparallel.vmm.pool import ImageAhead, Pool
from sfparallel.vmm.vm import Vm, VmState

PAGES = 8


@dataclass(eq=False)
class Shell:
    state: VmState = VmState.SHELL
    memory: MemoryMap | None = None
    maps: list[list[int]] = field(default_factory=list)
    refuses: bool = False
    warmed: int = 0

    def require(self, *states: VmState) -> None:
        if self.state not in states:
            raise StateError("gone")

    async def warm(self) -> None:
        self.require(VmState.SHELL)
        self.warmed += 1

    async def map_ahead(self, plan: MapPlan) -> None:
        assert len({os.fstat(fd).st_ino for fd in plan.fds}) == len(plan.fds)
        await asyncio.sleep(0)
        if self.refuses:
            raise PagingError("no more mappings")
        self.memory = plan.memory_map
        self.maps.append(list(plan.memory_map.layers))

    def kill(self) -> None:
        self.state = VmState.GONE


class Rig:
    def __init__(self) -> None:
        self.store = LayerStore()
        self.parent = object()
        self.shells: list[Shell] = []
        self.refusing = itertools.repeat(False)
        self.image = ImageAhead(self.store)
        self.pool = Pool(self.start, self.image)

    async def start(self) -> Vm:
        self.shells.append(Shell(refuses=next(self.refusing)))
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
        assert len(rig.store) == 2 and len(rig.pool) == 2 and [shell.warmed for shell in rig.shells] == [1, 1]
        taken = await rig.pool.take(2)
        assert taken == rig.shells
        for shell in taken:
            rig.store.release(shell)
        rig.pool.close()
        rig.store.release(rig.parent)
        assert len(rig.store) == 0

    asyncio.run(test())


def test_shell_that_cannot_be_mapped_is_ended_and_told_of() -> None:
    async def test() -> None:
        rig = Rig()
        rig.refusing = itertools.chain([True], itertools.repeat(False))
        rig.pool.follow(image_of(rig.layer()))
        rig.pool.aim(1)
        await rig.pool.wait_full()
        assert rig.shells[0].state is VmState.GONE and len(rig.pool) == 0 and "no more mappings" in str(rig.pool.error)
        await rig.pool.wait_full()
        assert len(rig.pool) == 1
        rig.pool.close()

    asyncio.run(test())


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
        async with asyncio.timeout(10):
            for _ in range(2):  # the first may end with what has befallen the shell
                await rig.pool.wait_full()
        assert len(rig.pool) == 1 and rig.shells[1].maps
        rig.pool.close()

    asyncio.run(test())
