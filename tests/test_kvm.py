"""The fork under KVM, with the engine's own code: a guest of a few instructions, and a stand-in for its agent.

KVM may run such a guest where it cannot run Linux (vmm.kvm). The same test under TCG shows that the stand-in is not at fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from sfparallel import native
from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm import engine, manifest
from sfparallel.vmm.checkpoint import Checkpoint, LayerStore
from sfparallel.vmm.kvm import offered_cpuid
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap
from sfparallel.vmm.machine import Accelerator, Boot, Endpoints, MachineSpec, arguments
from sfparallel.vmm.native_parts import LIBRARY
from sfparallel.vmm.pool import ImageAhead
from sfparallel.vmm.qmp import reopened
from sfparallel.vmm.record import ForkReport, Phase
from sfparallel.vmm.template import template_key
from sfparallel.vmm.vm import Sockets, Vm, VmState
from sfparallel.wire import Frame, FrameParser, FrameType, pack
from tests.conftest import PATIENCE

pytestmark = pytest.mark.needs("qemu")

IN_REGISTER, IN_MEMORY = 0x1000, 0x2000
# 16-bit code. What runs in a clone must be in RAM: firmware is not part of a clone's memory image.
_START = bytes.fromhex(
    "31c0 8ec0"  # xor ax,ax; mov es,ax
    "8cc8 8ed8"  # mov ax,cs; mov ds,ax
    "be4000 bf0006 b92000"  # mov si,loop; mov di,0x600; mov cx,0x20
    "fc f3a4"  # cld; rep movsb
    "31c0 8ed8"  # xor ax,ax; mov ds,ax
    "6631db"  # xor ebx,ebx
    "ea00060000"  # ljmp 0:0x600
)
_LOOP = bytes.fromhex(
    "6643"  # 1: inc ebx
    "66891e0010"  # mov [0x1000],ebx
    "66ff060020"  # inc dword [0x2000]
    "ebf2"  # jmp 1b
)
_RESET = bytes.fromhex("ea000000f0")  # ljmp 0xf000:0
FIRMWARE = _START.ljust(0x40, b"\0") + _LOOP.ljust(0xFFF0 - 0x40, b"\0") + _RESET.ljust(16, b"\0")


class Agent(asyncio.Protocol):
    """The other end of a VM's agent port: freezes and wakes at once, since no program runs in the guest."""

    def __init__(self) -> None:
        self._parser = FrameParser()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport
        for frame in self._parser.feed(data):
            answer, payload = {
                FrameType.FREEZE: (FrameType.FROZEN, {"oom_kills": 0, "agent": "1"}),
                FrameType.THAW: (FrameType.WOKEN, {"cpu_ns": 1, "wall_ns": 1}),
            }[frame.type]
            self._transport.write(Frame(answer, pack(payload)).encode())


class Rig:
    """Starts VMs with the counting guest, and forks them as the supervisor does."""

    def __init__(self, spec: MachineSpec, firmware: Path, stack: contextlib.AsyncExitStack) -> None:
        self._spec, self._firmware, self._stack = spec, firmware, stack
        self.store = LayerStore()
        stack.callback(self._close_store)

    def _close_store(self) -> None:
        left = len(self.store)
        self.store.close()
        assert left == 0, "with the VMs and checkpoints, all layers have gone"

    async def start(self, name: str, *, boots: bool) -> Vm:
        """A VM that is to boot the firmware, stopped before its first instruction; or a shell."""
        with contextlib.ExitStack() as theirs:
            pairs = [socket.socketpair(socket.AF_UNIX, kind)
                     for kind in (socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM)]  # fmt: skip
            (qmp, their_qmp), (unused, their_port), (paging, their_paging), (agent, their_agent) = pairs
            self._stack.callback(unused.close)
            for end in (their_qmp, their_port, their_paging):
                theirs.callback(end.close)
            console = os.memfd_create("console", os.MFD_CLOEXEC)
            output = theirs.enter_context(reopened(console, os.O_WRONLY | os.O_APPEND))
            argv = arguments(self._spec, Endpoints(qmp=3, agent=4, console=6, tap=None))
            # Not the host's processor: a KVM without hardware behind it may be unable to set all that it has (seen: MSR 0x10a).
            argv[argv.index("-cpu") + 1] = "qemu64"
            if boots:
                argv[argv.index("-incoming"):argv.index("-incoming") + 2] = ["-bios", str(self._firmware)]
            fds = {3: their_qmp.fileno(), 4: their_port.fileno(), 5: their_paging.fileno(), 6: output}
            environment = {"PATH": os.environ["PATH"], "LD_PRELOAD": str(LIBRARY), "SFPAGE_FD": "5"}
            pid = native.spawn(argv, output=output, fds=fds, env=environment)
        vm = Vm(name, pid, Sockets(qmp, agent, paging, console), child=True)
        gone = asyncio.get_running_loop().create_future()
        vm.events.on_gone = lambda vm, cause: gone.set_result(cause)

        async def end() -> None:
            vm.kill()
            await gone
            self.store.release(vm)

        self._stack.push_async_callback(end)
        transport, _ = await asyncio.get_running_loop().create_unix_connection(Agent, sock=their_agent)
        self._stack.callback(transport.close)
        await vm.prepare(self._spec.memory_bytes)
        if boots:
            vm.memory = MemoryMap.zero(self._spec.memory_bytes // PAGE_BYTES)
            await vm.qmp.execute("cont")
            vm.state = VmState.RUNNING
        return vm

    async def save(self, vm: Vm) -> tuple[Checkpoint, ForkReport]:
        report = ForkReport(0, 0.0)
        checkpoint = await engine.save(vm, self.store, report)
        self._stack.callback(checkpoint.close)
        vm.thaw({})
        return checkpoint, report

    async def launch(self, checkpoint: Checkpoint, n: int, name: str) -> list[Vm]:
        shells = [await self.start(f"{name}{i}", boots=False) for i in range(n)]
        await self.launch_in(shells, checkpoint)
        return shells

    async def launch_in(self, shells: list[Vm], checkpoint: Checkpoint) -> list[int]:
        """Make clones of shells; returns how many pieces of memory were mapped or kept in each."""
        n = len(shells)
        report = ForkReport(n, 0.0)
        await engine.launch([engine.Birth(shell, {}) for shell in shells], checkpoint, report,
                            lambda vm, cause: pytest.fail(f"{vm.name}: {cause}"))  # fmt: skip
        assert len(report.loads) == len(list(report.of(Phase.WAKE))) == n
        return [int(phase.values["extents"]) for phase in report.of(Phase.MAP)]


async def counters(vm: Vm) -> tuple[int, int]:
    """Both counters of a guest, which stands still meanwhile."""
    await vm.qmp.execute("stop")
    values = []
    for address in (IN_REGISTER, IN_MEMORY):
        text = await vm.qmp.monitor(f"xp /1wx {address:#x}")
        found = re.search(r": 0x([0-9a-f]+)", text)
        assert found, text
        values.append(int(found[1], 16))
    await vm.qmp.execute("cont")
    return values[0], values[1]


async def past(vm: Vm, count: int) -> int:
    """Wait until a guest has counted past `count`; its counters must agree: one passed through a register, one through memory."""
    async with asyncio.timeout(60 * PATIENCE):
        while True:
            register, memory = await counters(vm)
            assert 0 <= register - memory <= 1, "CPU state and memory are of two different moments"
            if register > count:
                return register
            await asyncio.sleep(0)


def saved_count(checkpoint: Checkpoint) -> int:
    """The counter in the layers of a checkpoint."""
    page = IN_REGISTER // PAGE_BYTES
    number = int(checkpoint.memory.source[page])
    (count,) = struct.unpack("<I", os.pread(checkpoint.store.descriptors([number])[number], 4, page * PAGE_BYTES))
    return int(count)


@contextlib.asynccontextmanager
async def rig_of(accelerator: Accelerator, folder: Path) -> AsyncIterator[Rig]:
    disk, firmware = folder / "disk", folder / "firmware"
    disk.write_bytes(bytes(1 << 20))
    firmware.write_bytes(FIRMWARE)
    spec = MachineSpec(accelerator, cpus=1, memory_bytes=64 << 20, root_image=disk)
    async with contextlib.AsyncExitStack() as stack:
        yield Rig(spec, firmware, stack)


async def fork_again_and_again(rig: Rig) -> None:
    parent = await rig.start("parent", boots=True)
    reached = await past(parent, 1000)
    first, report = await rig.save(parent)
    begin = saved_count(first)
    assert begin >= reached
    assert report.commit and 0 < report.commit.stored_pages < 1024, "64 MiB of zeros are not stored"
    clones = await rig.launch(first, 2, "clone")
    for clone in clones:
        await past(clone, begin)
    # A second fork with the first clones alive, and one of a clone: into layers of their own, a few pages each.
    await past(parent, begin)
    second, report = await rig.save(parent)
    assert report.commit and report.commit.stored_pages <= 16
    third, report = await rig.save(clones[0])
    assert report.commit and report.commit.stored_pages <= 16
    assert len({*first.layers, *second.layers, *third.layers}) == 3
    grandchildren = [*await rig.launch(second, 1, "second"), *await rig.launch(third, 1, "grandchild")]
    for clone, checkpoint in zip(grandchildren, (second, third), strict=True):
        await past(clone, saved_count(checkpoint))
    # The old checkpoint is what it was.
    assert saved_count(first) == begin < min(saved_count(second), saved_count(third))
    (late,) = await rig.launch(first, 1, "late")
    await past(late, begin)
    for vm in (parent, *clones, *grandchildren):
        await past(vm, (await counters(vm))[0])


async def fork_into_shells_that_are_mapped(rig: Rig) -> None:
    parent = await rig.start("parent", boots=True)
    await past(parent, 1000)
    first, _ = await rig.save(parent)
    first.close()
    assert parent.memory
    layers = len(rig.store)
    with contextlib.closing(ImageAhead(rig.store)) as image:
        image.follow(parent.memory)
        shells = [await rig.start(f"shell{i}", boots=False) for i in range(3)]
        for shell in shells:
            assert not image.fits(shell)
            await image.lay(shell)
            assert image.fits(shell)
        # The parent goes on to write to the layer by which the shells are mapped: nobody needs yet what it holds.
        begin = await past(parent, (await counters(parent))[0] + 1000)
        second, report = await rig.save(parent)
        assert second.layers == first.layers and len(rig.store) == layers
        assert await rig.launch_in(shells[:2], second) == [1, 1], "all of the image is mapped already"
        for clone in shells[:2]:
            assert await past(clone, begin) >= saved_count(second) >= begin
        # With clones alive it does not. A fork of a clone goes into a shell that was mapped as the parent was, too.
        _, report = await rig.save(parent)
        assert report.commit and report.commit.stored_pages <= 16 and len(rig.store) == layers + 1
        image.follow(parent.memory)
        assert image.fits(shells[2])
        third, _ = await rig.save(shells[0])
        assert await rig.launch_in(shells[2:], third) == [3], "what the clone has written, and what is kept before and behind it"
        await past(shells[2], saved_count(third))
        for vm in (parent, *shells):
            await past(vm, (await counters(vm))[0])


@pytest.mark.parametrize("accelerator", [Accelerator.TCG, pytest.param(Accelerator.KVM, marks=pytest.mark.needs("kvm"))])
@pytest.mark.parametrize("course", [fork_again_and_again, fork_into_shells_that_are_mapped], ids=lambda course: course.__name__)
def test_fork_of_a_firmware_guest(
    course: Callable[[Rig], Coroutine[Any, Any, None]], accelerator: Accelerator, tmp_path: Path
) -> None:
    async def test() -> None:
        async with asyncio.timeout(120 * PATIENCE), rig_of(accelerator, tmp_path) as rig:
            await course(rig)

    asyncio.run(test())


@pytest.mark.needs("kvm")
def test_what_kvm_offers_is_the_same_on_each_core() -> None:
    """And is one of the processor: the answer is computed from CPUID of the core that asks."""
    allowed = os.sched_getaffinity(0)
    digests = {}
    try:
        for core in allowed:
            os.sched_setaffinity(0, {core})
            digests[core] = offered_cpuid()
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.needs("kvm", "qemu")
def test_a_template_under_kvm_is_one_of_this_processor_and_kernel(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"")
    boot = Boot(tmp_path, tmp_path / "initrd", "")
    key, kvm = template_key(MachineSpec(Accelerator.KVM, 1, 1 << 30, tmp_path), boot, "image")
    _, tcg = template_key(MachineSpec(Accelerator.TCG, 1, 1 << 30, tmp_path), boot, "image")
    assert "host" not in tcg, "an emulated processor is the same everywhere"
    host = kvm["host"]
    assert isinstance(host, dict) and host["kernel"] == os.uname().release and len(host["cpuid"]) == 64
    assert all(host[name] for name in ("vendor_id", "cpu_family", "model", "stepping"))
    other = {**kvm, "host": {**host, "cpuid": "0" * 64, "microcode": "0x1"}}
    manifest.write(tmp_path, other, {}, (), MemoryMap.zero(1))
    with pytest.raises(EnvironmentProblem, match=r"does not match: host\.cpuid: wanted .* host\.microcode"):
        manifest.check(tmp_path, kvm, {}, ())
    assert template_key(MachineSpec(Accelerator.KVM, 1, 1 << 30, tmp_path), boot, "image")[0] == key
