"""The pool: started shells that wait to become clones, and the image by which they are mapped meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from sfparallel.errors import SfError
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.layers import MemoryMap
from sfparallel.vmm.plans import MapPlan
from sfparallel.vmm.vm import Vm, VmState

log = logging.getLogger(__name__)

_FAILURES = 3
"""So many shells in a row that cannot be had end the filling, until the next fork."""

_MOST_ROWS = 16384
"""Images of more rows are not mapped ahead: until it is replaced, what is mapped counts against vm.max_map_count (65530)."""


class ImageAhead:
    """The image that shells of a pool are mapped by while they wait: the parent's at its last fork.

    An image is a thousand mappings and more, 3 ms of a processor's time for each clone, and from one fork to the next few of
    them change. A fork lays over a shell only what differs from what it is mapped by. What the shell's layers hold does not
    matter until then: they are held as those of one who waits, and the parent goes on to write to them in place.

    Args:
        store: of the layers.
    """

    def __init__(self, store: LayerStore) -> None:
        self._store = store
        self._memory: MemoryMap | None = None
        self._plan: MapPlan | None = None
        self._planned: MemoryMap | None = None

    def follow(self, memory: MemoryMap) -> None:
        """From here on shells are mapped by this map, whose layers are held; new ones by none if it is too scattered."""
        self._store.hold(self, memory.layers, waiting=True)
        self._memory = memory if memory.row_count <= _MOST_ROWS else None
        self._let_go()

    def fits(self, shell: Vm) -> bool:
        """Whether a shell is mapped, and keeps no layer that this image can do without."""
        return self._memory is None or (shell.memory is not None and set(shell.memory.layers) <= set(self._memory.layers))

    async def lay(self, shell: Vm) -> None:
        """Map a shell by this image. Not to be called for two shells at a time.

        Raises:
            StateError: it is no shell any more.
            VMError: the paging layer refused; the shell is unusable.
        """
        if self._memory is None:
            return
        if self._planned is not self._memory:
            self._forget_plan()
            self._plan = MapPlan(self._memory, self._store.descriptors(self._memory.layers))
            self._planned = self._memory
            self._let_go()
        assert self._plan
        plan = self._plan
        shell.require(VmState.SHELL)  # for one that has ended nobody would let the layers go
        self._store.hold(shell, plan.memory_map.layers, waiting=True)
        await shell.map_ahead(plan)
        self._store.release(shell, keep=plan.memory_map.layers)

    def close(self) -> None:
        self._forget_plan()
        self._memory = None
        self._store.release(self)

    def _let_go(self) -> None:
        maps = [memory for memory in (self._memory, self._planned) if memory]
        self._store.release(self, keep={number for memory in maps for number in memory.layers})

    def _forget_plan(self) -> None:
        if self._plan:
            self._plan.close()
        self._plan = self._planned = None


class Pool:
    """Started shells, ready to become clones.

    The pool is filled in the background up to `target`; a fork takes what is there and starts what is missing.

    Args:
        start: starts a shell.
        image: what shells are mapped by while they wait.
    """

    def __init__(self, start: Callable[[], Coroutine[Any, Any, Vm]], image: ImageAhead) -> None:
        self._start = start
        self._image = image
        self._ready: deque[Vm] = deque()
        self._filler: asyncio.Task[None] | None = None
        self._holders = 0
        self._free = asyncio.Event()
        self._free.set()
        self.target = 0
        self.error: SfError | OSError | None = None

    def __len__(self) -> int:
        return len(self._ready)

    def aim(self, target: int) -> None:
        """Keep `target` shells from here on."""
        self.target = max(self.target, target)
        self._fill()

    def follow(self, memory: MemoryMap) -> None:
        """What is forked next will probably be much like this image."""
        self._image.follow(memory)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No new shells are started in the background: a fork is under way, and its clones need the processors."""
        self._holders += 1
        self._free.clear()
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._free.set()
                self._fill()

    def discard(self, vm: Vm) -> None:
        """A shell died while it waited."""
        with contextlib.suppress(ValueError):
            self._ready.remove(vm)

    async def take(self, n: int) -> list[Vm]:
        """Take n shells out.

        Raises:
            VMError: some could not be started; those that could are back in the pool.
        """
        taken: list[Vm] = []
        while self._ready and len(taken) < n:
            shell = self._ready.popleft()
            if shell.state is VmState.SHELL:  # else its end is about to be told
                taken.append(shell)
        starts = [asyncio.ensure_future(self._start()) for _ in range(n - len(taken))]
        try:
            if starts:
                await asyncio.wait(starts)
        except asyncio.CancelledError:
            for start in starts:
                start.cancel()
            results = await asyncio.gather(*starts, return_exceptions=True)
            self.give_back([*taken, *(result for result in results if not isinstance(result, BaseException))])
            raise
        errors = [error for start in starts if (error := start.exception())]
        taken += [start.result() for start in starts if not start.exception()]
        if errors:
            self.give_back(taken)
            raise errors[0]
        return taken

    def give_back(self, shells: list[Vm]) -> None:
        """Shells that were taken and are still empty; some may have ended meanwhile."""
        self._ready.extend(shell for shell in shells if shell.state is VmState.SHELL)

    def _fill(self) -> None:
        if self._filler is None or self._filler.done():
            self._filler = asyncio.get_running_loop().create_task(self._refill())

    async def _refill(self) -> None:
        failures = 0
        while failures < _FAILURES:
            await self._free.wait()
            unfit = next((shell for shell in self._ready if not self._image.fits(shell)), None)
            if unfit is None and len(self._ready) >= self.target:
                return
            try:
                if unfit:
                    self._ready.remove(unfit)
                await self._add(unfit or await self._start())
                failures = 0
            except (SfError, OSError) as error:
                # A single shell may have died. If none can be started, the fork that needs one meets the same error.
                log.info("no shell for the pool: %s", error)
                self.error = error
                failures += 1

    async def _add(self, shell: Vm) -> None:
        try:
            await self._image.lay(shell)
        except BaseException:  # OSError too: a plan needs descriptors
            shell.kill()
            raise
        if shell.state is VmState.SHELL:
            self._ready.append(shell)

    async def wait_full(self) -> None:
        """Wait until the pool has its target (benchmarks and tests: "with a warm pool")."""
        self._fill()
        if self._filler:
            await self._filler

    def close(self) -> None:
        if self._filler:
            self._filler.cancel()
        while self._ready:
            self._ready.popleft().kill()
        self._image.close()
