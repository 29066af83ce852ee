"""A VM whose guest is a test: a real `Vm` with a process in QEMU's place, and the far ends of its sockets.

So a test says what only a guest can that has been taken over, byte by byte, and leaves unread what it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator

from sfparallel.vmm.paging import PagingStep
from sfparallel.vmm.vm import Sockets, Vm, VmState
from sfparallel.wire import Frame, FrameParser, FrameType
from tests.conftest import HANG_S

PATIENCE_S = HANG_S


class HostileGuest:
    """The guest's and QEMU's side of a VM.

    Attributes:
        vm: as the supervisor holds it, running.
        port: the guest's end of the agent port.
        monitor: QEMU's end of its monitor.
        paging: that of its paging layer.
        console: what QEMU appends its console to.
        lost: the cause of its end, once there is one.
    """

    def __init__(self, vm: Vm, port: socket.socket, monitor: socket.socket, paging: socket.socket, console: int) -> None:
        self.vm = vm
        self.port = port
        self.monitor = monitor
        self.paging = paging
        self.console = console
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._parser = FrameParser()
        vm.events.on_gone = lambda _, cause: self.lost.set_result(cause)

    async def say(self, data: bytes, *, to_monitor: bool = False) -> None:
        """Write bytes to the port (or as QEMU to the monitor's connection), or as many as it takes before the VM is ended."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await asyncio.get_running_loop().sock_sendall(self.monitor if to_monitor else self.port, data)

    async def send(self, kind: FrameType, payload: bytes = b"", channel: int = 0) -> None:
        await self.say(Frame(kind, payload, channel).encode())

    async def hear(self) -> list[Frame]:
        """What the next piece of the stream completes."""
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.port, 1 << 20), PATIENCE_S)
        return list(self._parser.feed(data))

    async def obey(self, *answers: str) -> None:
        """As QEMU: answer so many commands, and wait for one more, which has no answer. Its descriptors are dropped."""
        loop = asyncio.get_running_loop()
        for answer in (*answers, ""):
            await asyncio.wait_for(loop.sock_recv(self.monitor, 1 << 16), PATIENCE_S)
            if answer:
                await self.say(f'{{"return": {answer}}}\n'.encode(), to_monitor=True)

    async def refuse(self, step: PagingStep) -> None:
        """Answer the next request to the paging layer with ENOMEM, its guest's memory being intact."""
        request = await asyncio.get_running_loop().sock_recv(self.paging, 1 << 10)
        magic, version, operation, serial = struct.unpack_from("<IHHI", request)
        self.paging.send(struct.pack("<IHHIiII8Q", magic, version, operation, serial, -errno.ENOMEM, step, 1, *[0] * 8))

    async def end(self) -> str:
        """Wait until the supervisor has ended the VM; returns the cause."""
        return await asyncio.wait_for(asyncio.shield(self.lost), PATIENCE_S)


@contextlib.asynccontextmanager
async def hostile_guest(name: str = "clone 1", number: int = 1) -> AsyncIterator[HostileGuest]:
    """A VM that runs."""
    with contextlib.ExitStack() as theirs:
        ours, ends = [], []
        for kind in (socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            mine, other = socket.socketpair(socket.AF_UNIX, kind)
            other.setblocking(False)
            ends.append(theirs.enter_context(other))
            ours.append(mine)
        console = os.memfd_create("console", os.MFD_CLOEXEC)
        appending = os.open(f"/proc/self/fd/{console}", os.O_WRONLY | os.O_APPEND)
        theirs.callback(os.close, appending)
        process = subprocess.Popen(["sleep", "infinity"])
        process.returncode = 0  # the VM waits for it, as for every QEMU
        monitor, port, paging = ours
        vm = Vm(name, process.pid, Sockets(monitor, port, paging, console), child=True, number=number)
        await vm.connect_port()
        vm.state = VmState.RUNNING
        guest = HostileGuest(vm, ends[1], ends[0], ends[2], appending)
        try:
            yield guest
        finally:
            vm.kill()
            await guest.end()
