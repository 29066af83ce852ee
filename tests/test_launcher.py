"""The launcher, with sleep(1) in the place of QEMU: what it makes is our child, has what it was given, and outlives nobody."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.errors import VMError
from sfparallel.vmm import launcher
from sfparallel.vmm.launcher import Launcher
from sfparallel.vmm.native_parts import LIBRARY
from sfparallel.vmm.paging import PagingLayer, control_pair

CONTROL, EXTRA = 5, 4
ANSWER = struct.Struct("<IHHii")
_SYS_PIDFD_GETFD = 438  # <asm/unistd.h>


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


def control_of(pid: int) -> socket.socket:
    """The end of a launcher's control socket that is in its process."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        fd = libc.syscall(_SYS_PIDFD_GETFD, process, 3, 0)
    finally:
        os.close(process)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return socket.socket(fileno=fd)


CHILD, LAUNCHER, OURS = -1, -2, -3
"""Stand for process ids that only the running test knows, in `answers`."""
answers = st.lists(st.one_of(
    st.tuples(st.sampled_from([0x47504653] * 9 + [0]), st.sampled_from([1] * 9 + [2]), st.sampled_from([1, 1, 1, 0, 2]),
              st.sampled_from([0, 0, 0, -11, -4095, -4096, 1, -(1 << 31), (1 << 31) - 1]),
              st.sampled_from([CHILD, CHILD, LAUNCHER, OURS, 0, 1, -4, (1 << 31) - 1, -(1 << 31)])),
    st.binary(min_size=1, max_size=40)), max_size=3)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(answers)
def test_any_answer_of_a_launcher(answers: list[tuple[int, int, int, int, int] | bytes]) -> None:
    """What stands for it is a process that has its socket and does nothing: a shell is a child of ours, or there is none. Kill(2)
    takes 0 and negative numbers for many processes, and an end of a VM begins with one."""
    child = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
    mute = Launcher(["sleep", "1000"], "")
    pids = {CHILD: child, LAUNCHER: mute._pid, OURS: os.getpid()}
    with control_of(mute._pid) as control:
        for answer in answers:
            control.send(answer if isinstance(answer, bytes) else ANSWER.pack(*answer[:4], pids.get(answer[4], answer[4])))
        control.shutdown(socket.SHUT_WR)
    try:
        status, pid = asyncio.run(mute._order({}, CONTROL))
        assert (pid == child) if status == 0 else os.strerror(-status)
    except VMError as error:
        assert "launcher of shells" in error.message and len(str(error)) < 500
    finally:
        mute.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_launcher_that_answers_nonsense_is_replaced(bench: Bench) -> None:
    async def scenario() -> None:
        await bench.child()
        lying = bench.pid
        with control_of(lying) as control:
            control.send(b"nonsense")
        _, _, output = await bench.child()
        assert files_of(bench.pids[-1])[1] == output and bench.pid != lying

    asyncio.run(scenario())
