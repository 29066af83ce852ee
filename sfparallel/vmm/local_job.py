"""`sfrun --local`: one job of processes on this host, for development; the program's side is `sfparallel.runtime.local`.

`sfrun` forks. The child is the supervisor: it starts the program, shows what clones print, and is the "subreaper" of all that the
job starts (prctl(2)): whoever loses its parent becomes its child. So it can end every process of the job without knowing any, and
needs no privilege for it. It does so when the program has ended, and when `sfrun` is killed. If the supervisor itself is killed,
`sfrun`, which is a subreaper too, does the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sfparallel import bootstrap, native
from sfparallel.text import printable
from sfparallel.vmm import job_control, processes, signals
from sfparallel.vmm.command_errors import errors_told
from sfparallel.vmm.confinement import block_waited, unblock_waited, wait_for
from sfparallel.vmm.exits import EXIT_OUTPUT_LOST, EXIT_TIMEOUT, exit_code
from sfparallel.vmm.options import JobOptions
from sfparallel.vmm.output import STDERR, STDOUT, LabelledOutput, Output
from sfparallel.wire import MAX_MESSAGE_BYTES, unpack

log = logging.getLogger("sfparallel")

NOTICE = "sfrun --local: clones are processes of this host; nothing is isolated, and files are written directly"

EXIT_NOT_STARTED = 2
_PIECE_BYTES = 64 << 10
_LAST_WORDS_S = 0.5
_FRONT_IS_DEAD = signal.SIGUSR1
_DESCRIPTORS = 3
"""At most so many come with a message: a clone's stdout and stderr, and its pidfd."""


def run(options: JobOptions, say: Callable[[str], None]) -> int:
    """Run a program whose clones are processes of this host. Call it before any thread starts: it forks.

    Returns:
        its exit code.
    """
    if log.isEnabledFor(logging.WARNING):
        say(NOTICE)
    block_waited()
    native.set_subreaper()
    front = os.getpid()
    interrupts = signals.Interrupts()
    child = os.fork()
    if child == 0:
        _supervise(options, front, interrupts)
    code = wait_for(child, interrupts)
    end_descendants()
    return code


def _supervise(options: JobOptions, front: int, interrupts: signals.Interrupts) -> NoReturn:
    """The supervisor's whole life. It ends with os._exit: what `sfrun` registered to happen at its exit happens there."""
    code = 1
    try:
        native.set_subreaper()

        async def job() -> int:
            return await LocalSupervisor(options, front, interrupts).run()

        with errors_told("sfrun"):
            code = job_control.run(job())
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        print(printable(traceback.format_exc()), file=sys.stderr)
    finally:
        end_descendants()
        os._exit(code)


def end_descendants() -> None:
    """Kill all children until there are none; theirs become ours as they die, because this process is a subreaper."""
    while True:
        for pid in processes.matching(lambda parent, _session: parent == os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()  # select(2) takes no number above 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


@dataclass(eq=False)
class _Clone:
    """A clone that has presented itself.

    Attributes:
        owner: process id of the one that forked it.
        outputs: its ends of pipes, by stream (1 and 2).
    """

    pid: int
    owner: int
    pidfd: int
    outputs: dict[int, int]
    shown: LabelledOutput


class LocalSupervisor:
    """One job; `run` does all of it.

    Args:
        front: process id of `sfrun`.
        interrupts: what it got.
    """

    def __init__(self, options: JobOptions, front: int, interrupts: signals.Interrupts) -> None:
        loop = asyncio.get_running_loop()
        self._options = options
        self._front = front
        self._clones: dict[int, _Clone] = {}
        self._front_interrupts = interrupts
        self._interrupted = False
        self._program = 0
        self._output = Output(self._output_has_room, self._output_lost)
        self._held: set[tuple[_Clone, int]] = set()
        self._unread: set[int] = set()
        self._settling: set[asyncio.Task[None]] = set()
        # What the program ended with; and with what the job is stopped, without waiting for anything.
        self._done: asyncio.Future[int] = loop.create_future()
        self._stopped: asyncio.Future[int] = loop.create_future()

    async def run(self) -> int:
        """Run the program; returns its exit code."""
        loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._control:
            loop.add_signal_handler(_FRONT_IS_DEAD, self._stop, 128 + signal.SIGKILL)
            native.set_death_signal(_FRONT_IS_DEAD)
            if os.getppid() != self._front:
                return 128 + signal.SIGKILL
            for number in signals.obeyed((signal.SIGTERM, signal.SIGHUP)):
                loop.add_signal_handler(number, self._stop, 128 + number)
            self._front_interrupts.watch(self._interrupt)
            loop.add_signal_handler(signal.SIGCHLD, self._reap)
            job_control.watch(self._pause, lambda: None)
            unblock_waited()
            loop.add_reader(self._control, self._message)
            if self._options.timeout_s:
                loop.call_later(self._options.timeout_s, self._timed_out)
            with theirs:
                self._program = self._start(theirs)
            self._reap()  # it may have ended before its number was known
            await self._unless_stopped(self._done)
            # A slow reader may want hours for what was printed.
            await self._unless_stopped(asyncio.create_task(self._output.written()))
            await self._say_last_words()
            return (self._stopped if self._stopped.done() else self._done).result()

    async def _unless_stopped(self, awaited: asyncio.Future[Any]) -> None:
        await asyncio.wait((awaited, self._stopped), return_when=asyncio.FIRST_COMPLETED)

    def _stop(self, code: int) -> None:
        if not self._stopped.done():
            self._stopped.set_result(code)

    def _say(self, line: str) -> None:
        self._output.write(STDERR, f"{printable(line)}\n".encode())

    async def _pause(self) -> None:
        """Ctrl-Z. The shell has the terminal next: nothing that was printed is to come later."""
        await self._say_last_words()

    async def _say_last_words(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._output.written()

    def _timed_out(self) -> None:
        if not self._stopped.done():
            self._say(f"sfrun: stopped after {self._options.timeout_s:g} s (--timeout)")
            self._stop(EXIT_TIMEOUT)

    def _start(self, control: socket.socket) -> int:
        """Start the program's interpreter; returns its process id."""
        options, program = self._options, self._options.program
        orders: dict[str, object] = {
            "control": control.fileno(), "job": f"sf{self._front}", "n": options.default_n, "labels": int(options.labels),
        }  # fmt: skip
        if options.seed is not None:
            orders["seed"] = options.seed
        environment = bootstrap.environment(program.environment_over(os.environ), orders | options.bootstrap_orders)
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                native.set_death_signal(signal.SIGKILL)
                if os.getppid() == supervisor:
                    os.setsid()
                    signal.pthread_sigmask(signal.SIG_SETMASK, [])
                    control.set_inheritable(True)
                    os.execve(sys.executable, [sys.executable, *program.words], environment)
            except OSError as error:
                print(f"sfrun: cannot start {sys.executable}: {error.strerror}", file=sys.stderr, flush=True)
            finally:
                os._exit(EXIT_NOT_STARTED)
        return pid

    # -- clones ----------------------------------------------------------------------------------------------------

    def _message(self) -> None:
        data, descriptors, _flags, _address = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, _DESCRIPTORS)
        if not data:
            asyncio.get_running_loop().remove_reader(self._control)  # no process of the job is left
            return
        message = unpack(data)
        if "clone" in message:
            self._take(message["clone"], message["owner"], message["label"], *descriptors)
            return
        task = asyncio.create_task(self._settle(descriptors))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, descriptors: list[int]) -> None:
        """Close the descriptors when all has been shown that clones printed which are gone."""
        for clone in list(self._clones.values()):
            if _has_ended(clone.pidfd):
                self._clone_ended(clone)
        await self._output.written()
        for descriptor in descriptors:
            os.close(descriptor)

    def _take(self, pid: int, owner: int, label: str, stdout: int, stderr: int, pidfd: int) -> None:
        clone = _Clone(pid, owner, pidfd, {1: stdout, 2: stderr}, LabelledOutput(label, self._output.write))
        self._clones[pid] = clone
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, self._clone_ended, clone)
        for stream, descriptor in clone.outputs.items():
            os.set_blocking(descriptor, False)
            loop.add_reader(descriptor, self._read, clone, stream)

    def _read(self, clone: _Clone, stream: int) -> bool:
        """Show what there is; returns whether there may be more."""
        descriptor = clone.outputs.get(stream)
        if descriptor is None:
            return False
        try:
            data = os.read(descriptor, _PIECE_BYTES)
        except BlockingIOError:
            return False
        if data and stream in self._unread:
            self._close(clone, stream)  # as where the reader of a pipe has gone: who prints again gets SIGPIPE or EPIPE
            return False
        if data:
            clone.shown.feed(stream, data)
            if self._output.full(stream):
                # Its prints will block, as in any pipe.
                asyncio.get_running_loop().remove_reader(descriptor)
                self._held.add((clone, stream))
        else:
            self._close(clone, stream)
        return bool(data)

    def _close(self, clone: _Clone, stream: int) -> None:
        descriptor = clone.outputs.pop(stream)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)

    def _clone_ended(self, clone: _Clone) -> None:
        """Show its last words, and end what it has left behind: its subprocesses and its own clones."""
        if self._clones.pop(clone.pid, None) is not clone:
            return
        for stream in list(clone.outputs):
            while self._read(clone, stream):
                pass
            if stream in clone.outputs:
                self._close(clone, stream)
        clone.shown.close()
        asyncio.get_running_loop().remove_reader(clone.pidfd)
        os.close(clone.pidfd)
        for pid in processes.matching(lambda _parent, session: session == clone.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for other in list(self._clones.values()):
            if other.owner == clone.pid:
                signal.pidfd_send_signal(other.pidfd, signal.SIGKILL)

    def _output_has_room(self) -> None:
        held, self._held = self._held, set()
        for clone, stream in held:
            if stream in clone.outputs:
                asyncio.get_running_loop().add_reader(clone.outputs[stream], self._read, clone, stream)

    def _output_lost(self, stream: int, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self._unread.add(stream)
        elif not self._stopped.done():
            self._say(f"sfrun: cannot write to standard {'output' if stream == STDOUT else 'error'}: {error}")
            self._stop(EXIT_OUTPUT_LOST)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._program:
                for clone in list(self._clones.values()):
                    self._clone_ended(clone)
                if not self._done.done():
                    self._done.set_result(exit_code(status))

    def _interrupt(self) -> None:
        """Ctrl-C goes to the program, which gets its KeyboardInterrupt; the second one, or another signal, ends the job."""
        if not self._interrupted and not self._done.done():
            self._interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._program, signal.SIGINT)
        else:
            self._stop(128 + signal.SIGINT)
