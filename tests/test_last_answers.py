"""VMs that end, or stand still, while somebody waits for an answer of theirs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from sfparallel.errors import SfError, VMError
from sfparallel.vmm import engine, template
from sfparallel.vmm.checkpoint import Checkpoint, LayerStore
from sfparallel.vmm.console import Console
from sfparallel.vmm.engine import Birth
from sfparallel.vmm.layers import MemoryMap
from sfparallel.vmm.record import ForkReport
from sfparallel.vmm.vm import Sockets, Vm, VmState
from tests.hostile_guest import PATIENCE_S, hostile_guest

PAGES = 16


def test_a_vm_that_ends_with_its_last_answer_stays_gone() -> None:
    """Else a signal would be sent to it, by a descriptor that is closed, and may be another VM's by then."""
    async def scenario() -> None:
        async with hostile_guest() as guest:
            guest.vm.state = VmState.STOPPED
            resuming = asyncio.create_task(guest.vm.resume())
            await guest.obey()
            guest.monitor.send(b'{"return": {}}\n')
            os.kill(guest.vm.pid, signal.SIGKILL)
            os.waitid(os.P_PID, guest.vm.pid, os.WEXITED | os.WNOWAIT)  # both are there when the loop looks
            with pytest.raises(VMError, match="clone 1: "):
                await resuming
            await guest.end()
            assert guest.vm.state is VmState.GONE

    asyncio.run(scenario())


@pytest.mark.parametrize("answers", [[], ['{"fdset-id": 1}']], ids=["before it is stopped", "when it is to stop"])
def test_a_save_that_is_cancelled_ends_its_vm(tmp_path: Path, answers: list[str]) -> None:
    """By --timeout, say, while its QEMU stands still."""
    async def scenario() -> None:
        async with hostile_guest("template", 0) as guest:
            guest.vm.state = VmState.FROZEN
            saving = asyncio.create_task(template._save(guest.vm, PAGES << 12, tmp_path))
            await guest.obey(*answers)
            saving.cancel()
            await asyncio.wait([saving], timeout=PATIENCE_S)
            assert saving.cancelled()
            await guest.end()

    asyncio.run(scenario())


def test_a_killed_qemu_that_does_not_end_keeps_nobody() -> None:
    """One that a libvirt daemon has started, which is in another PID namespace and stands still."""
    async def scenario() -> str:
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM,) * 2 + (socket.SOCK_SEQPACKET,)]
        vm = Vm("parent", 0, Sockets(*(pair[0] for pair in pairs), os.memfd_create("console")), child=False)
        gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        vm.events.on_gone = lambda _, cause: gone.set_result(cause)
        command = vm.qmp.send("stop")
        vm.end("the job is over")
        with pytest.raises(VMError, match="'stop' has no answer"):
            await asyncio.wait_for(command, PATIENCE_S)
        cause = await asyncio.wait_for(gone, PATIENCE_S)
        for pair in pairs:
            pair[1].close()
        return cause

    assert asyncio.run(scenario()) == "the job is over"


def test_a_console_that_was_closed_says_what_it_said_last() -> None:
    """And not what another file says that has its descriptor's number."""
    console = os.memfd_create("console")
    os.write(console, b"its last words\n")
    tail = Console(console)
    tail.close()
    other = os.memfd_create("other")
    try:
        assert other == console
        os.write(other, b"of another VM\n")
        assert tail.tail() == "its last words"
    finally:
        os.close(other)


def test_what_one_clone_fails_with_does_not_cost_the_others() -> None:
    """Its paging layer says what none does: neither a VMError nor a StateError."""
    async def scenario() -> dict[str, str]:
        lost: dict[str, str] = {}
        store = LayerStore()
        checkpoint = Checkpoint(MemoryMap.zero(PAGES), os.memfd_create("devices"), store)
        async with hostile_guest("clone 1") as liar, hostile_guest("clone 2", 2) as silent:
            for guest in (liar, silent):
                guest.vm.state = VmState.SHELL
            liar.paging.send(b"no answer")
            silent.paging.close()
            births = [Birth(guest.vm, {}) for guest in (liar, silent)]
            try:
                await engine.launch(births, checkpoint, ForkReport(2, 0.0), lambda vm, cause: lost.update({vm.name: cause}))
            except SfError as error:
                lost["all"] = str(error)
            checkpoint.close()
        return lost

    lost = asyncio.run(scenario())
    assert sorted(lost) == ["clone 1", "clone 2"]
    assert "a reply of 9 bytes" in lost["clone 1"] and "QEMU ended" in lost["clone 2"]
