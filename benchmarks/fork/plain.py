"""VMs without forks, from the same image and on the same network: booted cold, or restored from a full save of a parent.

Usage: python -m benchmarks.fork.plain PARENT boot|classic N, which prints one sample as JSON. All QEMUs but the classic way's
parent run without the paging layer, as they would with stock tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sfparallel import bootstrap, native
from sfparallel.config import QEMU
from sfparallel.errors import VMError
from sfparallel.net.network import CloneNetwork
from sfparallel.vmm import image as images
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.confinement import Places, confine
from sfparallel.vmm.job import GUEST_BOOTSTRAP, GUEST_ENVIRONMENT
from sfparallel.vmm.kvm import accelerator
from sfparallel.vmm.machine import Accelerator, Boot, Endpoints, MachineSpec, arguments
from sfparallel.vmm.paging import PagingHello, PagingLayer
from sfparallel.vmm.processes import private_bytes
from sfparallel.vmm.qmp import Qmp, reopened
from sfparallel.vmm.replies import identity
from sfparallel.vmm.shells import start_shell
from sfparallel.vmm.template import ensure_template, open_template
from sfparallel.vmm.vm import Sockets, Vm, VmState
from sfparallel.wire import Frame, FrameType, pack

MEMORY_BYTES = 1 << 30
BOOT_TIMEOUT_S = 600.0
_JOB = "bench"
_UNLIMITED = 1 << 40  # bytes a second, of a migration

# Its program has imported what every clone has, and answers with its rank when it is told it.
PROGRAM = """
import sys
import numpy as np
import sfparallel as sf
print("ready", flush=True)
rank = int(sys.stdin.readline())
print("rank", rank, flush=True)
sys.stdin.readline()
"""


class _NoPagingLayer(PagingLayer):
    """Of a QEMU that has none."""

    async def hello(self) -> PagingHello:
        return PagingHello(0, 4096, False, 0, 0)


async def _start_plain(spec: MachineSpec, number: int, network: CloneNetwork, boot: Boot | None = None) -> Vm:
    """A QEMU as `shells.start_shell` makes it, but without the paging layer; it dies with this process."""
    with contextlib.ExitStack() as theirs:
        def pair(kind: int) -> tuple[socket.socket, socket.socket]:
            mine, other = socket.socketpair(socket.AF_UNIX, kind)
            theirs.callback(other.close)
            return mine, other

        qmp, their_qmp = pair(socket.SOCK_STREAM)
        agent, their_agent = pair(socket.SOCK_STREAM)
        unused, _ = pair(socket.SOCK_SEQPACKET)
        console = os.memfd_create("console", os.MFD_CLOEXEC)
        for_qemu = theirs.enter_context(reopened(console, os.O_WRONLY | os.O_APPEND))
        fds = {3: their_qmp.fileno(), 4: their_agent.fileno(), 5: for_qemu, 6: network.add_port(number).tap_fd}
        argv = arguments(spec, Endpoints(qmp=3, agent=4, console=5, tap=6), boot)
        pid = native.spawn(argv, output=for_qemu, fds=fds, env={"PATH": os.environ.get("PATH", "")})
        vm = Vm(f"vm {number}", pid, Sockets(qmp, agent, unused, console), child=True, number=number)
    vm.paging = _NoPagingLayer(unused)
    await vm.prepare(spec.memory_bytes)
    return vm


class Guest:
    """One VM and what its program has printed."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._printed = b""
        self._changed = asyncio.Event()
        self._gone = ""
        vm.events.on_frame = self._frame
        vm.events.on_gone = self._end

    def _frame(self, vm: Vm, frame: Frame) -> None:
        if frame.type is FrameType.OUTPUT:
            self._printed += frame.payload
            self._changed.set()

    def _end(self, vm: Vm, cause: str) -> None:
        self._gone = cause
        self._changed.set()

    async def said(self, line: str) -> float:
        """Wait until the program has printed a line; returns when.

        Raises:
            VMError: the VM ended.
        """
        while f"{line}\n".encode() not in self._printed:
            if self._gone:
                raise VMError(f"{self.vm.name}: {self._gone}: {self._printed.decode(errors='replace')}")
            self._changed.clear()
            await self._changed.wait()
        return time.monotonic()

    def become(self, role: str, mtu: int) -> None:
        who = identity(role, self.vm.number, _JOB, mtu, [])
        self.vm.thaw({"identity": who, "channel": 0, "reply": None, "mounts": []})

    def run_program(self) -> None:
        self.vm.send(FrameType.RUN, pack({
            "argv": ["-c", PROGRAM], "cwd": "/", "env": bootstrap.environment(GUEST_ENVIRONMENT, {}, GUEST_BOOTSTRAP),
        }))  # fmt: skip

    async def answer(self, rank: int) -> float:
        """Tell the program its rank; returns when it has answered."""
        self.vm.send(FrameType.STDIN, f"{rank}\n".encode())
        return await self.said(f"rank {rank}")


@dataclass
class Machine:
    """What all VMs of a sample have in common."""

    spec: MachineSpec
    boot: Boot
    image_key: str
    network: CloneNetwork


@contextlib.contextmanager
def _machine() -> Iterator[Machine]:
    image = images.find("default")
    spec = MachineSpec(accelerator=Accelerator(accelerator()), cpus=1, memory_bytes=MEMORY_BYTES, root_image=image.root,
                       qemu=QEMU.get())  # fmt: skip
    network = CloneNetwork(mtu=spec.mtu, vnet_header=False)
    try:
        yield Machine(spec, Boot(image.kernel, images.guest_half(image), images.KERNEL_COMMAND_LINE), image.key, network)
    finally:
        network.close()


class Stopwatch:
    """Milliseconds since the start of what is measured."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.milestones: dict[str, float] = {}

    def mark(self, name: str, at: float | None = None) -> None:
        self.milestones[name] = round(((time.monotonic() if at is None else at) - self._begun) * 1e3, 3)


def _sample(watch: Stopwatch, guests: list[Guest], **more: object) -> dict[str, Any]:
    private = [round(private_bytes(guest.vm.pid) / 2**20, 2) for guest in guests]
    return {"milestones_ms": watch.milestones, "private_mib": private, **more}


async def boot(n: int) -> dict[str, Any]:
    """n VMs booted at once, from the start of their QEMUs to the answers of their programs."""
    with _machine() as machine:
        watch = Stopwatch()
        starting = (_start_plain(machine.spec, number, machine.network, machine.boot) for number in range(1, n + 1))
        vms = await asyncio.gather(*starting)
        watch.mark("started")
        guests = [Guest(vm) for vm in vms]

        async def live(rank: int, guest: Guest) -> tuple[float, float]:
            booting = asyncio.ensure_future(guest.vm.wait_frozen(BOOT_TIMEOUT_S))
            await guest.vm.qmp.execute("cont")
            await booting
            booted = time.monotonic()
            guest.vm.state = VmState.FROZEN
            guest.become("parent", machine.spec.mtu)
            await guest.vm.woken
            guest.run_program()
            return booted, await guest.answer(rank)

        times = await asyncio.gather(*(live(rank, guest) for rank, guest in enumerate(guests)))
        for name, moments in zip(("loaded", "last_answer"), zip(*times, strict=True), strict=True):
            watch.mark(name, max(moments))
        watch.mark("first_answer", min(answered for _, answered in times))
        return _sample(watch, guests)


async def _start_classic_parent(machine: Machine, store: LayerStore) -> Guest:
    """A parent as the fork has it: from the template, with the program at the point where it is to be multiplied."""
    folder, manifest = await ensure_template(machine.spec, machine.boot, machine.image_key, lambda line: None)
    template = open_template(folder, manifest, store)
    vm = await start_shell(machine.spec, 0, machine.network, name="parent")
    parent = Guest(vm)
    store.hold(vm, template.layers)
    await vm.load(template.plan(), template.device_state)
    template.close()
    await vm.resume()
    parent.become("parent", machine.spec.mtu)
    await vm.woken
    parent.run_program()
    await parent.said("ready")
    return parent


async def _migration(qmp: Qmp, order: str, file: int, flags: int) -> None:
    """Let QEMU write its whole state to a file, or read it, at full speed."""
    limits: dict[str, Any] = {"max-bandwidth": _UNLIMITED}
    await qmp.execute("migrate-set-parameters", **limits)
    done = qmp.expect(lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in ("completed", "failed"))
    with reopened(file, flags) as opened:
        await qmp.execute("getfd", fds=[opened], fdname="state")
    await qmp.execute(order, uri="fd:state")
    if (await done)["data"]["status"] != "completed":
        raise VMError(f"QEMU could not {order} the whole state")


async def classic(n: int) -> dict[str, Any]:
    """A full save of a parent to a file, and n restores of it in QEMUs that are started already, as the fork's shells are."""
    store = LayerStore()
    with _machine() as machine, tempfile.TemporaryFile() as file:
        parent = await _start_classic_parent(machine, store)
        guests = [Guest(await _start_plain(machine.spec, number, machine.network)) for number in range(1, n + 1)]
        processors = asyncio.Semaphore(len(os.sched_getaffinity(0)))  # woken as the fork's clones are (engine.launch)
        watch = Stopwatch()
        await parent.vm.freeze()
        watch.mark("frozen")
        await parent.vm.qmp.execute("stop")
        await _migration(parent.vm.qmp, "migrate", file.fileno(), os.O_WRONLY)
        watch.mark("saved")
        # QEMU tells of the end before it is there itself, and of no later moment by an event.
        while (await parent.vm.qmp.execute("query-status"))["status"] == "finish-migrate":
            pass
        await parent.vm.qmp.execute("cont")
        watch.mark("resumed")
        await asyncio.gather(*(_migration(guest.vm.qmp, "migrate-incoming", file.fileno(), os.O_RDONLY) for guest in guests))
        watch.mark("loaded")

        async def live(rank: int, guest: Guest) -> tuple[float, float]:
            async with processors:
                guest.vm.state = VmState.STOPPED
                await guest.vm.resume()
                guest.become("rank", machine.spec.mtu)  # a "clone" has no input of its own
                await guest.vm.woken
            return time.monotonic(), await guest.answer(rank)

        times = await asyncio.gather(*(live(rank, guest) for rank, guest in enumerate(guests)))
        for name, moments in zip(("woken", "last_answer"), zip(*times, strict=True), strict=True):
            watch.mark(name, max(moments))
        watch.mark("first_answer", min(answered for _, answered in times))
        pause = watch.milestones["resumed"] - watch.milestones["frozen"]
        return _sample(watch, guests, pause_ms=round(pause, 3), file_mib=round(os.fstat(file.fileno()).st_size / 2**20, 1))


WAYS = {"boot": boot, "classic": classic}


def main() -> int:
    parent, way, n = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    native.set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        return 1  # it was gone before it could take this process along

    def job(places: Places, pid: int) -> int:
        sample = asyncio.run(WAYS[way](n))
        sample["median_private_mib"] = statistics.median(sample["private_mib"])
        print(json.dumps(sample), flush=True)
        return 0  # and the kernel ends the VMs, which are in this process's PID namespace

    return confine(job, public_folder=False)


if __name__ == "__main__":
    sys.exit(main())
