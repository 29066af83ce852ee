"""The monitor's client, with a real QEMU at the other end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sfparallel.errors import QmpError
from sfparallel.vmm.qmp import Qmp
from tests.conftest import HANG_S

pytestmark = pytest.mark.needs("qemu")


@asynccontextmanager
async def monitored() -> AsyncIterator[tuple[subprocess.Popen[bytes], Qmp]]:
    """A QEMU without a machine, and its monitor."""
    ours, theirs = socket.socketpair()
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
            "-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]  # fmt: skip
    process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
    theirs.close()
    qmp = Qmp(ours, "test")
    try:
        await asyncio.wait_for(qmp.negotiate(), HANG_S)
        yield process, qmp
    finally:
        qmp.close()
        process.kill()
        process.wait()


def test_commands_wait_for_a_monitor_that_does_not_read() -> None:
    """More than the socket takes, descriptors among it: all arrive whole, in order, each with its own descriptor."""

    async def scenario() -> None:
        async with monitored() as (process, qmp):
            os.kill(process.pid, signal.SIGSTOP)
            replies = []
            for number in range(3000):
                if number % 10:
                    replies.append(qmp.send("query-name"))
                    continue
                file = os.memfd_create(f"file {number}")
                replies.append(qmp.send("getfd", fds=[file], fdname=f"n{number}-{'x' * 500}"))
                os.close(file)
            assert qmp._unsent, "the socket was not filled"
            os.kill(process.pid, signal.SIGCONT)
            await asyncio.wait_for(asyncio.gather(*replies), HANG_S)
            links = os.listdir(f"/proc/{process.pid}/fd")
            names = {os.readlink(f"/proc/{process.pid}/fd/{link}") for link in links}
            assert {f"/memfd:file {number} (deleted)" for number in range(0, 3000, 10)} <= names

    asyncio.run(scenario())


def test_commands_that_wait_fail_when_the_monitor_is_gone() -> None:
    async def scenario() -> None:
        async with monitored() as (process, qmp):
            os.kill(process.pid, signal.SIGSTOP)
            replies = [qmp.send("query-name") for _ in range(20_000)]
            assert qmp._unsent
            process.kill()
            for result in await asyncio.wait_for(asyncio.gather(*replies, return_exceptions=True), HANG_S):
                assert isinstance(result, QmpError)

    asyncio.run(scenario())
