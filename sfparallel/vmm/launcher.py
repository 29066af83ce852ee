"""The launcher of a job: a QEMU that was loaded and relocated once, and makes shells by forking (native/launcher.c)."""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence

from sfparallel import native
from sfparallel.errors import ProtocolError, VMError
from sfparallel.vmm import native_parts
from sfparallel.vmm.command_errors import hint_for

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 30.0
"""To load QEMU takes a second, to fork it milliseconds."""

_MAGIC = 0x47504653
_VERSION = 1
_MAX_FDS = 10
_ORDER = struct.Struct(f"<IHHII{_MAX_FDS}i")
_ANSWER = struct.Struct("<IHHii")
_MAX_ERRNO = 4095
_SOCKET = 3


def _decode(data: bytes) -> tuple[int, int, int]:
    """Serial number, status and pid of an answer.

    Raises:
        ProtocolError: no launcher says this.
    """
    if len(data) != _ANSWER.size:
        size = f"more than {_ANSWER.size}" if len(data) > _ANSWER.size else str(len(data))
        raise ProtocolError(f"an answer of {size} bytes")
    magic, version, serial, status, pid = _ANSWER.unpack(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ProtocolError("the paging layer is of another version", hint=native_parts.remedy(native_parts.LIBRARY))
    if not -_MAX_ERRNO <= status <= 0:
        raise ProtocolError(f"an answer with the status {status}")
    return serial, status, pid


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:  # EINVAL for numbers that kill(2) takes for many processes
        return False
    return True


class Launcher:
    """Makes shells that all have the same command line. `close` ends it; shells live on.

    A launcher that has been killed, stands still or answers nonsense is replaced when the next shell is needed.

    Args:
        argv: of the shells; descriptors in it are those of `launch`.
        library: path of the paging layer.

    Raises:
        VMError: the program cannot be run.
    """

    def __init__(self, argv: Sequence[str], library: str) -> None:
        self._argv = argv
        self._environment = {"PATH": os.environ.get("PATH", ""), "LD_PRELOAD": library, "SFPAGE_LAUNCHER": str(_SOCKET)}
        self._serial = 0
        self._closed = False
        self._turn = asyncio.Lock()
        self._start()

    def _start(self) -> None:
        """Start the process; it makes its first shell as soon as it is loaded."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                self._pid = native.spawn(self._argv, output=2, fds={_SOCKET: theirs.fileno()}, env=self._environment)
            except OSError as error:
                ours.close()
                raise VMError(f"cannot run {self._argv[0]}: {error}", hint=hint_for(error)) from error
        self._control = ours
        self._unanswered: deque[int] = deque()

    async def launch(self, fds: Mapping[int, int], control: int) -> int:
        """Make a shell.

        Args:
            fds: its descriptors, as {number in the shell: descriptor here}; standard input is empty.
            control: the number, among them, of its paging layer's socket.

        Returns:
            The pid: a child of this process. It ends with the thread that started the launcher.

        Raises:
            VMError: there is no shell.
        """
        async with self._turn:
            try:
                status, pid = await self._order(fds, control)
            except VMError as error:
                if self._closed:
                    raise
                log.warning("%s; starting another one", error.message)
                self._end_process()
                self._start()
                status, pid = await self._order(fds, control)
        if status:
            raise VMError(f"no further shell could be started: {os.strerror(-status)}",
                          hint="free memory or processes on the host")
        return pid

    async def _order(self, fds: Mapping[int, int], control: int) -> tuple[int, int]:
        """Have it make a shell; its status and pid.

        Raises:
            VMError: it is gone, or does not answer, or not as a launcher does.
        """
        targets = [*fds, *[0] * (_MAX_FDS - len(fds))]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds.values()))]
        self._serial = (self._serial + 1) & 0xFFFF
        if self._closed:
            raise VMError("the launcher of shells is closed: the job ends")
        try:
            self._control.sendmsg([_ORDER.pack(_MAGIC, _VERSION, self._serial, control, len(fds), *targets)], rights)
            self._unanswered.append(self._serial)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._answer()
        except TimeoutError:
            raise VMError(f"the launcher of shells has not answered for {ANSWER_TIMEOUT_S:.0f} s",
                          hint="check whether that process was stopped (SIGSTOP)") from None
        except OSError as error:
            raise VMError(f"the launcher of shells is gone: {error.strerror}", hint="start the job again") from error
        except ProtocolError as error:
            raise VMError(f"the launcher of shells violated the protocol: {error.message}", hint=error.hint) from error

    async def _answer(self) -> tuple[int, int]:
        """Status and pid of the answer to the last order."""
        while True:
            answer = await asyncio.get_running_loop().sock_recv(self._control, _ANSWER.size + 1)
            if not answer:
                raise VMError("the launcher of shells is gone", hint="`sfrun` printed why, if QEMU could not be loaded")
            serial, status, pid = _decode(answer)
            if serial not in self._unanswered:
                raise ProtocolError("an answer to what was not ordered")
            while self._unanswered.popleft() != serial:
                pass
            # Another one is the answer to an order whose sender was cancelled. That shell has ended with its sockets.
            if serial != self._serial:
                continue
            # Shells are waited for and killed by this number.
            if status == 0 and (pid == self._pid or not _is_child(pid)):
                raise ProtocolError(f"process {pid}, which is no shell of this job's")
            return status, pid

    def close(self) -> None:
        """End the launcher and wait for it; its shells live on. There will be no other."""
        self._closed = True
        self._end_process()

    def _end_process(self) -> None:
        self._control.close()
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # it would end by itself, unless somebody has stopped it
            os.waitpid(self._pid, 0)
