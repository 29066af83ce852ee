"""The launcher, with sleep(1) in the place of QEMU: what it makes is our child, has what it was given, and outlives nobody."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from sfparallel.errors import VMError
from sfparallel.vmm import launcher
from sfparallel.vmm.launcher import Launcher
from sfparallel.vmm.native_parts import LIBRARY
from sfparallel.vmm.paging import PagingLayer, control_pair

CONTROL, EXTRA = 5, 4


@dataclass
class Bench:
    """A launcher and its children."""

    launcher: Launcher
    stack: ExitStack
    pids: list[int] = field(default_factory=list)

    async def child(self) -> tuple[int, PagingLayer, str]:
        """Process id, its paging layer, and the name of the pipe that it prints to. It has become what it is to be."""
        ours, theirs = control_pair()
        reader, writer = os.pipe()
        layer = PagingLayer(ours)
        self.stack.callback(layer.close)
        self.stack.callback(os.close, reader)
        extra = os.memfd_create("extra")
        try:
            pid = await self.launcher.launch({1: writer, 2: writer, EXTRA: extra, CONTROL: theirs.fileno()}, CONTROL)
        finally:
            theirs.close()
            os.close(writer)
            os.close(extra)
        self.pids.append(pid)
        await layer.hello()
        return pid, layer, os.readlink(f"/proc/self/fd/{reader}")

    @property
    def pid(self) -> int:
        return self.launcher._pid


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        bench = Bench(Launcher(["sleep", "1000"], str(LIBRARY)), stack)
        yield bench
        bench.launcher.close()
        for pid in bench.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def files_of(pid: int) -> dict[int, str]:
    return {int(number): os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}


def test_a_shell_is_our_child_and_has_no_descriptors_beyond_those_named(bench: Bench) -> None:
    async def scenario() -> None:
        for _ in range(2):
            pid, _layer, output = await bench.child()
            files = files_of(pid)
            assert files.pop(CONTROL).startswith("socket:")
            assert files.pop(EXTRA).startswith("/memfd:extra")
            assert [files.pop(number) for number in range(3)] == ["/dev/null", output, output]
            # The library has opened this one itself.
            assert [file.rpartition("/")[2] for file in files.values()] == ["pagemap"]
            assert os.getsid(pid) == pid
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    asyncio.run(scenario())


def test_a_shell_ends_with_its_control_socket(bench: Bench) -> None:
    pid, layer, _ = asyncio.run(bench.child())
    layer.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    bench.pids.remove(pid)


def test_the_answer_to_an_order_that_was_cancelled_is_not_taken_for_another(bench: Bench) -> None:
    async def scenario() -> None:
        os.kill(bench.pid, signal.SIGSTOP)
        first = asyncio.create_task(bench.child())
        while not first.done() and bench.launcher._serial == 0:
            await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        os.kill(bench.pid, signal.SIGCONT)
        pid, _, output = await bench.child()
        assert files_of(pid)[1] == output

    asyncio.run(scenario())


def test_a_launcher_that_was_killed_is_replaced(bench: Bench) -> None:
    async def scenario() -> None:
        first, _, _ = await bench.child()
        killed = bench.pid
        os.kill(killed, signal.SIGKILL)
        pid, _, output = await bench.child()
        assert files_of(pid)[1] == output and bench.pid != killed
        os.kill(first, 0)  # its shells live on

    asyncio.run(scenario())


def test_a_launcher_that_stands_still_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "ANSWER_TIMEOUT_S", 3.0)
    os.kill(bench.pid, signal.SIGSTOP)
    pid, _, output = asyncio.run(bench.child())
    assert files_of(pid)[1] == output


def test_a_program_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Launcher(["false"], "/no/such/library.so")
    try:
        with pytest.raises(VMError, match="launcher of shells is gone"):
            asyncio.run(broken.launch({}, CONTROL))
    finally:
        broken.close()


def test_a_launcher_that_was_closed_is_not_started_anew(bench: Bench) -> None:
    closed = bench.pid
    bench.launcher.close()
    with pytest.raises(VMError, match="closed: the job ends"):
        asyncio.run(bench.child())
    assert bench.pid == closed


def test_close_ends_a_launcher_that_stands_still(bench: Bench) -> None:
    os.kill(bench.pid, signal.SIGSTOP)
    bench.launcher.close()
    with pytest.raises(ProcessLookupError):
        os.kill(bench.pid, 0)
