"""The fork: save a running VM without copying it, and start shells from what was saved.

Order and reasons (DESIGN: "The fork, on stock QEMU"): the guest agent brings its port to a clean cut and freezes the user's
programs; the virtual CPUs stop; device state goes to a memfd; pages dirtied since the last fork go to a layer; the VM
resumes. From there on clones map the layers privately and load the device state, all at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sfparallel.errors import Closed, PagingError, SfError, VMError
from sfparallel.vmm.checkpoint import Checkpoint, LayerStore
from sfparallel.vmm.layers import MemoryMap, Records
from sfparallel.vmm.paging import CommitResult, PagingRefused
from sfparallel.vmm.plans import CommitMode, CommitPlan, MapPlan, copy_pages
from sfparallel.vmm.record import ForkReport, Phase
from sfparallel.vmm.shells import plug_data_disks
from sfparallel.vmm.vm import FREEZE_TIMEOUT_S, Vm, VmState
from sfparallel.vmm.waiting import step_limit_s, within

log = logging.getLogger(__name__)

MAX_LAYERS = 64
"""Of an image of more layers, the small ones are merged; each layer costs every clone mappings and a descriptor at its load."""

_MANY_EXTENTS = 8192
"""More is not laid over what a shell has mapped already: both count against vm.max_map_count (65530, usually)."""

WAKE_TIMEOUT_S = 60.0
"""A clone whose agent has not answered within this time is given up."""

WAKING_S = 1.0
"""How long a clone that does not wake up keeps the next one from being resumed."""

_SLOW_BYTES_PER_S = 32 << 20
"""Of a guest's memory, all of which a save may have to look at and to copy: on a machine that swaps."""

MUSTER_TIMEOUT_S = 2.0
"""How long clones that are loaded wait for the others of their fork."""


def _plan_commit(vm: Vm, store: LayerStore) -> CommitPlan:
    """Into a layer that nobody else holds, to be written in place; else into a new one.

    Of several the one that holds most: a page that comes from there already is only overwritten, any other needs memory anew
    and a mapping.
    """
    assert vm.memory is not None
    layers = store.descriptors(vm.memory.layers)
    own = [number for number in vm.memory.layers if store.exclusive(number, vm)]
    number = max(own, key=vm.memory.pages_of) if own else store.create(vm.ram_bytes, vm)
    mode = CommitMode.IN_PLACE if own else CommitMode.FRESH
    return CommitPlan(vm.memory, store.descriptors([number])[number], number, mode, layers=layers)


async def _commit(vm: Vm, plan: CommitPlan) -> CommitResult:
    """Move a stopped VM's dirty pages into the target and let the VM share it.

    Raises:
        PagingError: the pages could not be written (no memory, say); the VM may go on as it was.
    """
    assert vm.memory is not None
    try:
        return await vm.paging.carry_out(vm.ram_address, plan)
    except PagingRefused:
        if plan.mode is CommitMode.IN_PLACE:
            # Some pages may have been written where the map says zero.
            vm.memory = vm.memory.distrusted()
        raise


def _to_merge(memory: MemoryMap) -> list[int]:
    """Three quarters of an image's layers: those that hold least. What is copied is little then, and each page is copied
    seldom, however many forks there are."""
    by_size = sorted(memory.layers, key=memory.pages_of)
    return by_size[: len(by_size) * 3 // 4]


async def _flatten(vm: Vm, store: LayerStore, only: Sequence[int] | None) -> None:
    """Merge layers of a stopped VM into one, and lay the image over its memory anew.

    Args:
        only: layers to merge; None for all, when it is their mappings that have become too many.

    Raises:
        PagingError: the VM's mappings do not match its image any more; it is ended.
    """
    assert vm.memory is not None
    number = store.create(vm.ram_bytes, vm)
    try:
        plan = vm.memory.flatten(number, only)
        copy_pages(plan, store.descriptors(vm.memory.layers), store.descriptors([number])[number])
        with MapPlan(plan.memory_map, store.descriptors(plan.memory_map.layers)) as mapping:
            await vm.paging.map(vm.ram_address, mapping)
            vm.memory = mapping.memory_map
    except (VMError, OSError) as error:
        vm.kill()
        raise PagingError(f"{vm.name}: its memory layers could not be merged: {error}") from error


async def save(vm: Vm, store: LayerStore, report: ForkReport, *, freeze_limit_s: float = FREEZE_TIMEOUT_S) -> Checkpoint:
    """Make a checkpoint of a running VM and let its virtual CPUs go on; its programs stay frozen until `thaw`.

    Everything that can be done before the CPUs stop, or after they run again, is done then.

    Args:
        report: told of each phase, and of what was committed.
        freeze_limit_s: how long its programs may take to come to rest.

    Raises:
        StateError: it does not run.
        VMError: nothing was saved. The VM runs on, freezing or frozen, if it could; the caller thaws it.
    """
    vm.require(VmState.RUNNING)
    try:
        with _plan_commit(vm, store) as plan:
            try:
                await _prepare(vm, plan, report)
                return await _freeze_and_save(vm, store, plan, report, freeze_limit_s)
            finally:
                with contextlib.suppress(PagingError, Closed):
                    await vm.paging.settle()
    finally:
        # A new layer that was not written holds nothing; one that was written is in the map by now.
        store.release(vm, keep=vm.memory.layers if vm.memory else ())


def _save_limit_s(vm: Vm) -> float:
    return step_limit_s() + vm.ram_bytes / _SLOW_BYTES_PER_S


@contextlib.asynccontextmanager
async def _saved_in_time(vm: Vm) -> AsyncIterator[None]:
    """End a VM that stands still while it is saved. Its guest does not run then, and to give up without its end would be to wait
    for the same QEMU to let it run again."""
    limit_s = _save_limit_s(vm)
    timer = asyncio.get_running_loop().call_later(limit_s, vm.end, f"waited {limit_s:g} s for its QEMU to save it, and gave up")
    try:
        yield
    finally:
        timer.cancel()


async def _prepare(vm: Vm, plan: CommitPlan, report: ForkReport) -> None:
    begun = time.monotonic()
    try:
        async with within(_save_limit_s(vm), f"the QEMU of {vm.name} to prepare a save", hint="has somebody stopped it?"):
            pages = await vm.paging.prepare(vm.ram_address, plan)
    except PagingRefused as error:
        log.info("%s; its pause will be longer", error)
        pages = 0
    report.note(vm.name, Phase.PREPARE, begun, prepared_pages=pages)


async def _freeze_and_save(
    vm: Vm, store: LayerStore, plan: CommitPlan, report: ForkReport, freeze_limit_s: float
) -> Checkpoint:
    assert vm.memory is not None
    begun = time.monotonic()
    await vm.freeze(freeze_limit_s)
    device_state = os.memfd_create("sf-devices", os.MFD_CLOEXEC)
    try:
        async with _saved_in_time(vm), vm.devices_to(device_state) as devices:
            frozen = time.monotonic()
            runs: Records | None = None
            try:
                saving = await vm.stop_and_save(devices)
                stopped = time.monotonic()
                try:
                    with vm.ended_if_cancelled():
                        result = await _commit(vm, plan)
                        if result.remapped and len(vm.memory.layers) < MAX_LAYERS:
                            runs = result.runs
                        else:
                            vm.memory = vm.memory.apply(result.runs, plan.target_number)
                            await _flatten(vm, store, _to_merge(vm.memory) if result.remapped else None)
                    committed = time.monotonic()
                finally:
                    await asyncio.wait([saving])
                    saving.exception()
            finally:
                try:
                    await vm.resume()
                finally:
                    # Also when the devices could not be saved: a VM is remembered by the map that it is mapped by.
                    if runs is not None and vm.memory:
                        vm.memory = vm.memory.apply(runs, plan.target_number)
            resumed = time.monotonic()
            saved = await saving
        vm.require(VmState.FROZEN)  # it may have ended together with the last answer
        checkpoint = Checkpoint(vm.memory, device_state, store, vm.disks)
    except BaseException:
        os.close(device_state)
        raise
    report.commit = result
    report.note(vm.name, Phase.FREEZE, begun, frozen)
    report.note(vm.name, Phase.STOP, frozen, stopped)
    # At the same time as the commit.
    report.note(vm.name, Phase.DEVICES, stopped, saved)
    report.note(vm.name, Phase.COMMIT, stopped, committed, dirty_pages=result.dirty_pages, stored_pages=result.stored_pages,
                zero_pages=result.zero_pages, runs=len(result.runs), layers=len(vm.memory.layers),
                layers_of_job=len(store), scan_ms=result.scan_ns / 1e6, copy_ms=result.copy_ns / 1e6,
                remap_ms=result.remap_ns / 1e6)  # fmt: skip
    report.note(vm.name, Phase.RESUME, max(saved, committed), resumed)
    return checkpoint


@dataclass(frozen=True)
class Birth:
    """One clone to be: the shell and the message that its guest wakes up to."""

    shell: Vm
    thaw: dict[str, Any]


class _Muster:
    """Clones that are loaded wait here until all are: one that runs takes processor time from those that still load."""

    def __init__(self, clones: int) -> None:
        self._missing = clones
        self._complete = asyncio.Event()

    def arrive(self) -> None:
        """One more is loaded, or will never be."""
        self._missing -= 1
        if self._missing == 0:
            self._complete.set()

    async def wait(self) -> None:
        """Wait for the others, but not for one that is stuck."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._complete.wait(), MUSTER_TIMEOUT_S)


async def _plan_for(shell: Vm, checkpoint: Checkpoint) -> MapPlan:
    """What a shell is to be mapped by, on top of what is mapped ahead; if that is much, there is nothing beneath it any more."""
    plan = checkpoint.plan(shell.memory)
    if not shell.memory or plan.extents.array.size <= _MANY_EXTENTS:
        return plan
    with MapPlan(MemoryMap.zero(shell.memory.page_count), {}) as nothing:
        await shell.map_ahead(nothing)
    return checkpoint.plan()


async def launch(
    births: Sequence[Birth],
    checkpoint: Checkpoint,
    report: ForkReport,
    lost: Callable[[Vm, str], None],
) -> None:
    """Start a clone in each shell; a clone that cannot be started is reported to `lost` and killed, the others go on."""

    muster = _Muster(len(births))
    # As many as there are processors wake at a time: more would only evict each other's data from the caches (measured with 32
    # clones on 2 cores under TCG: a sixth more processor time for each, and the first answer six times as late).
    waking = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def load(shell: Vm) -> None:
        try:
            if missing := checkpoint.disks[len(shell.disks):]:
                await plug_data_disks(shell, missing)
            plan = await _plan_for(shell, checkpoint)
            shell.require(VmState.SHELL)  # for one that has ended nobody would let the layers go
            checkpoint.store.hold(shell, checkpoint.layers)
            times = await shell.load(plan, checkpoint.device_state)
            checkpoint.store.release(shell, keep=checkpoint.layers)  # of what was mapped ahead
        finally:
            muster.arrive()
        report.note(shell.name, Phase.MAP, times.begun, times.mapped, extents=plan.extents.array.size)
        report.note(shell.name, Phase.LOAD, times.mapped, times.loaded)

    async def start(birth: Birth) -> None:
        shell = birth.shell
        try:
            async with within(step_limit_s(), f"{shell.name} to load the state"):
                await load(shell)
            await muster.wait()
            async with waking:
                resuming = time.monotonic()
                async with within(step_limit_s(), f"{shell.name} to run"):
                    await shell.resume()
                resumed = time.monotonic()
                report.note(shell.name, Phase.CONT, resuming, resumed)
                shell.thaw(birth.thaw)
                await asyncio.wait([shell.woken], timeout=WAKING_S)
            woken = await asyncio.wait_for(asyncio.shield(shell.woken), WAKE_TIMEOUT_S)
            # Not now: frames that came with WOKEN may have been dealt with before this task went on.
            report.note(shell.name, Phase.WAKE, resumed, shell.woken_at,
                        guest_cpu_ms=woken.cpu_ns / 1e6, guest_wall_ms=woken.wall_ns / 1e6)  # fmt: skip
        except TimeoutError:
            lost(shell, f"its agent did not wake up within {WAKE_TIMEOUT_S:.0f} s")
            shell.kill()
        except (SfError, OSError) as error:  # whatever it is, it must not cost the others; OSError: no descriptors, say
            lost(shell, str(error))
            shell.kill()

    with checkpoint.in_use():
        starts = [asyncio.ensure_future(start(birth)) for birth in births]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            # A mistake of ours in one of them, or the end of the job: none may go on with descriptors that are about to be
            # closed.
            for task, birth in zip(starts, births, strict=True):
                if task.cancel():
                    birth.shell.kill()
            await asyncio.wait(starts)
            raise
