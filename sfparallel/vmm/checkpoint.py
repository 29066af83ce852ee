"""Checkpoints and the memory layers that they are made of.

A layer is a sparse file of the size of guest RAM that holds some of its pages, at their own offsets: a template's file on
disk, or a memfd. A VM's memory is a `MemoryMap`: for each page the layer that holds it. Layers are shared by all VMs that
were forked from the same state and go away with the last holder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sfparallel.errors import StateError
from sfparallel.vmm.layers import MemoryMap
from sfparallel.vmm.plans import MapPlan

MAX_LAYERS = 65535

_MAX_PLANS = 8
"""Of a checkpoint, each with descriptors: shells that wait may have been mapped by as many images as there are shells."""


class LayerStore:
    """All layers of a job, each with its holders (VMs and checkpoints)."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._holders: dict[int, set[Hashable]] = {}
        self._fixed: set[int] = set()
        self._waiting: set[Hashable] = set()

    def add(self, fd: int, holder: Hashable, *, fixed: bool = False) -> int:
        """Take over a layer's descriptor; returns its number (the lowest free one).

        A fixed layer is a template's file, which other jobs map too: it is never written in place.
        """
        number = next(n for n in range(1, MAX_LAYERS) if n not in self._fds)
        self._fds[number] = fd
        self._holders[number] = {holder}
        if fixed:
            self._fixed.add(number)
        return number

    def create(self, size_bytes: int, holder: Hashable) -> int:
        """A new, empty layer in memory."""
        fd = os.memfd_create("sf-layer", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
        except OSError:
            os.close(fd)
            raise
        return self.add(fd, holder)

    def hold(self, holder: Hashable, numbers: Iterable[int], *, waiting: bool = False) -> None:
        """Keep these layers for `holder` until it lets go of them.

        Args:
            waiting: it has no use yet for what they hold, for any of its layers: they may be written in place.
        """
        (self._waiting.add if waiting else self._waiting.discard)(holder)
        for number in numbers:
            self._holders[number].add(holder)

    def release(self, holder: Hashable, keep: Iterable[int] = ()) -> None:
        """`holder` needs only `keep` from here on; layers that nobody holds are freed."""
        kept = set(keep)
        if not kept:
            self._waiting.discard(holder)
        for number in [n for n, holders in self._holders.items() if holder in holders and n not in kept]:
            self._holders[number].discard(holder)
            if not self._holders[number]:
                del self._holders[number]
                self._fixed.discard(number)
                os.close(self._fds.pop(number))

    def exclusive(self, number: int, holder: Hashable) -> bool:
        """Whether `holder` alone holds the layer, but for those that wait, so that it may be written in place."""
        return number not in self._fixed and self._holders.get(number, set()) - self._waiting == {holder}

    def descriptors(self, numbers: Iterable[int]) -> Mapping[int, int]:
        """Layer number to descriptor; the store keeps them."""
        return {number: self._fds[number] for number in numbers}

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._holders.clear()

    def __len__(self) -> int:
        return len(self._fds)


@dataclass(eq=False)
class Checkpoint:
    """One immutable state of a VM: memory image and device state.

    It holds its layers in the job's store until it is closed.

    Attributes:
        disks: data disks that the VM had, in the order of their slots.
    """

    memory: MemoryMap
    device_state: int
    store: LayerStore
    disks: tuple[Path, ...] = ()
    _plans: list[MapPlan] = field(default_factory=list, init=False)
    _closed: bool = field(default=False, init=False)
    _users: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.store.hold(self, self.layers)

    @property
    def layers(self) -> list[int]:
        return list(self.memory.layers)

    def plan(self, base: MemoryMap | None = None) -> MapPlan:
        """The image as the paging layer maps it; made once for all clones of the same base.

        Args:
            base: map by which the shells are mapped already; its layers must have been held since. With too many of them, some
                get a plan of the whole image.
        """
        if self._closed and not self._users:
            raise StateError("this checkpoint is closed")
        plans = {id(plan.base): plan for plan in self._plans}
        if id(base) not in plans and len(plans) >= _MAX_PLANS:
            base = None
        if id(base) not in plans:
            memory = self._plans[0].memory_map if self._plans else self.memory  # whose gaps are filled already
            self._plans.append(MapPlan(memory, self.store.descriptors(self.layers), base))
            return self._plans[-1]
        return plans[id(base)]

    def forget_plans(self) -> None:
        """Give the plans' descriptors back, of which each has one for each layer that it maps; `plan` makes new ones."""
        while self._plans:
            self._plans.pop().close()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Its descriptors stay open as long as this is, also when it is closed meanwhile: its VM may end during a launch."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._closed and not self._users:
                self._let_go()

    def close(self) -> None:
        """Let go of layers and descriptors; clones made from it go on."""
        if self._closed:
            return
        self._closed = True
        if not self._users:
            self._let_go()

    def _let_go(self) -> None:
        self.forget_plans()
        os.close(self.device_state)
        self.store.release(self)
