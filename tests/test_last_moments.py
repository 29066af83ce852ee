"""VMs, jobs and requests that end just when something else begins: nothing is lost, stays behind, or waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sfparallel.errors import StateError, VMError
from sfparallel.vmm import image as images
from sfparallel.vmm import signals
from sfparallel.vmm.confinement import Places
from sfparallel.vmm.guest_frames import Frozen
from sfparallel.vmm.job import Job
from sfparallel.vmm.machine import Accelerator, MachineSpec
from sfparallel.vmm.options import JobOptions, Program
from sfparallel.vmm.registry import JobStatus, announce, running_jobs
from sfparallel.vmm.shells import start_launcher, start_shell
from sfparallel.vmm.tickets import Member, Tickets, TicketState
from sfparallel.vmm.vm import Sockets, Vm
from sfparallel.wire import Frame, FrameType, pack
from tests.conftest import HANG_S, Sfrun, children_of, command_of, machines_of

vms = pytest.mark.needs("qemu", "image", "root")


@contextlib.asynccontextmanager
async def sleeping_vm() -> AsyncIterator[tuple[Vm, socket.socket]]:
    """A VM whose process sleeps, and the guest's end of its port."""
    sleeper = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)  # the VM reaps it
    pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM,) * 2 + (socket.SOCK_SEQPACKET,)]
    vm = Vm("clone 1", sleeper, Sockets(*(pair[0] for pair in pairs), os.memfd_create("console")), child=True, number=1)
    await vm.connect_port()
    gone = asyncio.Event()
    told = vm.events

    try:
        yield vm, pairs[1][1]
    finally:
        before = told.on_gone
        told.on_gone = lambda *news: (before(*news), gone.set())[0]
        if vm.memory is None and vm.state.value != "gone":
            vm.kill()
            await asyncio.wait_for(gone.wait(), HANG_S)
        for _, other in pairs:
            other.close()


def test_what_a_guest_asked_for_last_is_dealt_with_before_its_end_is_told() -> None:
    async def scenario() -> None:
        order: list[str] = []
        told = asyncio.Event()
        async with sleeping_vm() as (vm, guest):

            async def serve(frame: Frame) -> None:
                order.append(frame.type.name)

            def gone(_vm: Vm, _cause: str) -> None:
                order.append("gone")
                told.set()

            tasks = []
            vm.events.on_frame = lambda _vm, frame: tasks.append(asyncio.create_task(serve(frame)))
            vm.events.on_gone = gone
            guest.sendall(Frame(FrameType.REQUEST, b"\x80", 1).encode())
            os.kill(vm.pid, signal.SIGKILL)
            os.waitid(os.P_PID, vm.pid, os.WEXITED | os.WNOWAIT)  # both are there when the loop looks
            await asyncio.wait_for(told.wait(), HANG_S)
            assert order == ["REQUEST", "gone"]

    asyncio.run(scenario())


def test_a_guest_that_freezes_at_once_is_seen() -> None:
    async def scenario() -> Frozen:
        async with sleeping_vm() as (vm, guest):
            frozen = vm.wait_frozen(HANG_S)
            guest.sendall(Frame(FrameType.FROZEN, pack({"oom_kills": 0, "agent": 1})).encode())
            await asyncio.sleep(0.1)  # it arrives
            return await frozen

    assert asyncio.run(scenario()) is not None


def test_a_vm_that_has_ended_is_not_taken_into_a_job(tmp_path: Path) -> None:
    """It may end after the last step of its start, and before the job listens."""
    async def scenario() -> None:
        options = JobOptions(Program("command", ("pass",), tmp_path, None))
        job = Job(options, Places(tmp_path, tmp_path, signals.Interrupts()), os.getpid())
        gone = asyncio.Event()
        async with sleeping_vm() as (vm, _):
            vm.events.on_gone = lambda *_: gone.set()
            vm.kill()
            await asyncio.wait_for(gone.wait(), HANG_S)
            with pytest.raises(VMError, match="ended as soon as it had started"):
                job._watch(vm)
            assert not job._vms

    asyncio.run(scenario())


@vms
def test_a_shell_that_cannot_be_had_leaves_no_process() -> None:
    """Wherever in its start the descriptors run out: also when the launcher has made it already."""
    spec = MachineSpec(Accelerator.TCG, 1, 300 << 20, images.find().root)

    async def scenario() -> None:
        launcher = start_launcher(spec)
        others = children_of(os.getpid())
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        try:
            for more in range(15):
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, before[1]))
                with pytest.raises((OSError, VMError)):  # with enough of them it lacks the tap of a network
                    await start_shell(spec, 1, None, launcher=launcher)
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                deadline = time.monotonic() + HANG_S
                while set(children_of(os.getpid())) - set(others):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            launcher.close()

    asyncio.run(scenario())


def test_two_jobs_of_the_same_number_are_both_known() -> None:
    """Of two PID namespaces in one network namespace."""
    async def scenario() -> list[str]:
        servers = [await announce(999_999_999, lambda name=name: JobStatus(1, name, 0, 0, 0.0)) for name in ("one", "other")]
        try:
            return [job.program for job in await running_jobs()]
        finally:
            for server in servers:
                server.close()

    assert {"one", "other"} <= set(asyncio.run(scenario()))


def test_clones_killed_while_they_are_made_do_not_begin() -> None:
    async def scenario() -> None:
        tickets = Tickets()
        async with sleeping_vm() as (vm, _):
            ticket = tickets.issue(vm, 1, 1)
            ticket.state = TicketState.CLONING
            ticket.discard()
            with pytest.raises(StateError, match="no longer wanted"):
                tickets.start(ticket, [Member(1, vm, "10.83.0.2", 1)])
            assert not tickets.clones()

    asyncio.run(scenario())


PROGRAM = """
import sfparallel as sf
ballast = b"x" * (100 << 20)
print("ready", flush=True)
input()
try:
    sf.parallel(n=1)(lambda: 1)()
except Exception as error:
    print("lost:", str(error).replace("\\n", " "), flush=True)
input()
while True:  # one of these forks is met in its midst
    ballast = bytearray(100 << 20)
    sf.parallel(n=1)(lambda: 1)()
"""


def _wait_for(condition: object) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _opens(pid: int, name: str) -> bool:
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if name in os.readlink(f"/proc/{pid}/fd/{number}"):
                return True
    return False


@vms
def test_qemus_that_stand_still_in_a_fork(sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone's, while it is to load its state, and then the parent's, while it is saved."""
    monkeypatch.setenv("SF_START_LIMIT", "20")
    process = sfrun.start(PROGRAM, "-n", "1", stdin=-1)
    assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"

    def shells() -> list[int]:
        found = [pid for pid in sorted(machines_of(process.pid)) if not command_of(pid).startswith("sf-launcher")]
        return [pid for pid in found[1:] if "/memory" in Path(f"/proc/{pid}/maps").read_text()]  # it is mapped ahead

    parent = min(pid for pid in machines_of(process.pid) if not command_of(pid).startswith("sf-launcher"))
    _wait_for(shells)
    os.kill(shells()[0], signal.SIGSTOP)
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line.startswith("lost:") and "waited 20 s for clone 1 to load the state" in line
    process.stdin.write("\n")
    process.stdin.flush()
    _wait_for(lambda: _opens(parent, "sf-devices"))
    os.kill(parent, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + signal.SIGTERM
