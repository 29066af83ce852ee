"""Files for all VMs of a job: what comes from their agent ports, as work on the host's files, each VM as fast as it reads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from sfparallel.vmm import fuse_wire
from sfparallel.vmm.copy_back import CopyBack, request_id, shown
from sfparallel.vmm.exports import may_hang
from sfparallel.vmm.files import FileServer
from sfparallel.vmm.host_work import MOST_THREADS, HostWork, Piece, Way
from sfparallel.vmm.rank_files import RankFiles
from sfparallel.vmm.vm import Vm
from sfparallel.wire import FrameType, pack, unpack

_END_LIMIT_S = 0.5


class FileService:
    """Answers file requests, and applies changes of files. An answer may be 1,500 times as long as its request: it is made only
    when the VM takes it.

    Args:
        exports: host folders by tag.
        tell: shows the user a line.
        slow: those whose requests are dealt with in threads; by default those that may hang.
        most_threads: at most, of all VMs.

    Raises:
        UsageError: a folder cannot be opened.
    """

    def __init__(self, exports: Mapping[int, Path], tell: Callable[[str], None], *, slow: Collection[int] | None = None,
                 most_threads: int = MOST_THREADS) -> None:
        self._exports = dict(exports)
        self._slow = frozenset(tag for tag, folder in exports.items() if may_hang(folder)) if slow is None else frozenset(slow)
        self._server = FileServer(exports, slow=self._slow)
        self._copy_back = CopyBack(exports)
        self._rank_files = RankFiles(exports)
        self._work = HostWork(tell, most_threads)
        self.go_on = self._work.go_on
        self.forget = self._work.forget
        self.hanging = self._work.hanging

    def request(self, vm: Vm, tag: int, payload: bytes) -> None:
        """Answer a FUSE request.

        Raises:
            ProtocolError: it is none, or more wait than a guest can have that reads.
        """
        request = fuse_wire.parse(payload)
        if request.opcode in fuse_wire.NO_REPLY:
            return
        if tag not in self._slow and self._work.is_free(vm):
            # A piece of work for each, which this is most of the time, would cost a third as much again.
            vm.send(FrameType.FUSE_REPLY, self._server.answer(tag, request), tag)
        else:
            self._work.add(vm, Way.ASIDE if tag in self._slow else Way.HERE, Piece(
                len(payload), lambda: self._server.answer(tag, request),
                lambda answer: vm.send(FrameType.FUSE_REPLY, answer, tag),
                lambda: self._server.where(tag, request), self._server.surplus))  # fmt: skip

    def change(self, vm: Vm, channel: int, rank: int | None, payload: bytes) -> None:
        """Apply a change that the copy-back of a program reports; of a rank of a whole program, if it has one.

        Raises:
            ProtocolError: it is no message, or more wait than a guest of ours sends at a time.
        """
        request = unpack(payload)
        handle = self._copy_back.handle if rank is None else functools.partial(self._rank_files.handle, rank)
        self._work.add(vm, Way.IN_ORDER if self._slow else Way.HERE, Piece(
            len(payload), lambda: pack(handle(request)),
            lambda answer: vm.send(FrameType.REPLY, answer, channel),
            lambda: self._changed(request)))  # fmt: skip

    def _changed(self, request: Mapping[Any, Any]) -> str:
        tag, path = request.get("tag"), request.get("path")
        if isinstance(tag, int) and isinstance(path, bytes):
            return shown(self._exports.get(tag, Path()), path)
        return f"change {request_id(request)}"

    async def end(self) -> tuple[bool, list[str]]:
        """Take nothing more, and remove what is not whole; what hangs is left behind.

        Returns:
            Whether changes were brought to the host; and, one line each, what could not be written, and which files the host did
            not answer for.
        """
        hanging = await self._work.end(_END_LIMIT_S)
        used = self._copy_back.used or self._rank_files.used
        problems = [*self._copy_back.problems, *self._rank_files.problems]
        if not await self._closed():
            hanging.append("the file system of files that were being written; their parts remain as .*.sf-part")
        return used, problems + [f"the host did not answer for {where}" for where in dict.fromkeys(hanging)]

    async def _closed(self) -> bool:
        """Close all files; False if that hangs."""
        if not self._slow:
            self._copy_back.close()
            self._rank_files.close()
            self._server.close()
            return True
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def close() -> None:
            self._copy_back.close()
            self._rank_files.close()
            with contextlib.suppress(RuntimeError):  # the loop is closed: it was not waited for
                loop.call_soon_threadsafe(closed.set)
            self._server.close()  # which nobody needs to wait for: it has only read

        threading.Thread(target=close, name="close files", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), _END_LIMIT_S)
        return closed.is_set()
