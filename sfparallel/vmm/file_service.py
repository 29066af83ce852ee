"""Files for all VMs of a job: requests from their agent ports to the file server, each VM as fast as it reads the answers."""

from __future__ import annotations

from collections import deque

from sfparallel.errors import ProtocolError
from sfparallel.vmm.files import FileServer
from sfparallel.vmm.vm import Vm
from sfparallel.wire import FrameType

MOST_WAITING_BYTES = 4 << 20
"""Requests of one VM that wait until it has read earlier answers. A kernel has 64 read-aheads under way per folder, and a request
of some 100 bytes for each thread that waits for a file."""

_REQUEST_COST_BYTES = 100


class FileService:
    """Answers file requests. An answer may be 1,500 times as long as its request: it is made only when the VM takes it.

    Args:
        server: what knows the files.
    """

    def __init__(self, server: FileServer) -> None:
        self._server = server
        self._waiting: dict[Vm, deque[tuple[int, bytes]]] = {}
        self._bytes: dict[Vm, int] = {}

    def request(self, vm: Vm, tag: int, request: bytes) -> None:
        """Answer a request, now or when the VM has read.

        Raises:
            ProtocolError: it is none, or more wait than a guest can have that reads.
        """
        if not vm.congested and vm not in self._waiting:
            self._answer(vm, tag, request)
            return
        self._waiting.setdefault(vm, deque()).append((tag, request))
        waiting = self._bytes[vm] = self._bytes.get(vm, 0) + len(request) + _REQUEST_COST_BYTES
        if waiting > MOST_WAITING_BYTES:
            self.forget(vm)
            raise ProtocolError("it asks for files and does not read the answers")

    def go_on(self, vm: Vm) -> None:
        """The VM has room again.

        Raises:
            ProtocolError: what it had sent was no request.
        """
        waiting = self._waiting.get(vm)
        while waiting and not vm.congested:
            tag, request = waiting.popleft()
            self._bytes[vm] -= len(request) + _REQUEST_COST_BYTES
            self._answer(vm, tag, request)
        if not waiting:
            self.forget(vm)

    def forget(self, vm: Vm) -> None:
        """Answer it no more: it is gone, or has nothing left to ask."""
        self._waiting.pop(vm, None)
        self._bytes.pop(vm, None)

    def _answer(self, vm: Vm, tag: int, request: bytes) -> None:
        answer = self._server.handle(tag, request)
        if answer is not None:
            vm.send(FrameType.FUSE_REPLY, answer, tag)
