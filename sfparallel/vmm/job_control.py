"""Job control, as of any program: Ctrl-Z stops the job with its VMs, `fg` and `bg` continue it.

The terminal sends SIGTSTP to the whole foreground process group: to `sfrun`, which the shell waits for, and to the job, which
stops its VMs, what else it has started, and then itself. `sfrun` stops last, because the shell takes the terminal when it does:

    job   SIGTSTP: stop VMs, give the terminal's modes back, stop everything below, stop itself
    init  is told by the kernel that the job has stopped; tells `sfrun` by a pipe (process 1 cannot stop, and sees nobody outside)
    sfrun SIGTSTP is blocked until then, and taken now, as it would be by any program

SIGCONT comes to all of them in the same way, or is passed on by those that were continued alone.

Who types Ctrl-Z, `fg` and Ctrl-Z again is faster than a busy machine. `sfrun` may stop a second time before it has run at all,
and be continued while the job still makes ready for its second stop: that stop must not come any more, as nobody would expect
it. So the job means to stop from the moment when it has SIGTSTP, by a pending SIGTTIN, which it blocks: SIGCONT takes that away,
whenever it comes (kernel/signal.c, prepare_signal), and what is left at the end of the preparations stops the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

from sfparallel.vmm import processes, signals

STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""What stops a program that does not say otherwise, and can be caught."""
MEANT = signal.SIGTTIN
"""Pending in a job that is about to stop. All threads block it: who reads a terminal in the background gets EIO instead."""
_STOP_LIMIT_S = 0.5


class PausableLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while the job is stopped: no time limit runs out because of it."""

    _away_s = 0.0

    def time(self) -> float:
        return super().time() - self._away_s

    def stand_still(self) -> None:
        """Stop all that this process has started, and itself, until somebody continues it; unless that has happened already."""
        stopped = _stop_all_below()
        began = time.monotonic()
        _take(MEANT)
        self._away_s += time.monotonic() - began
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def run(job: Coroutine[Any, Any, int]) -> int:
    """Run a job to its end, in a loop that can stand still."""
    with asyncio.Runner(loop_factory=PausableLoop) as runner:
        return runner.run(job)


def _stop_all_below() -> set[int]:
    stopped: set[int] = set()
    # Until there are no new ones: what was not stopped yet may have forked.
    while fresh := processes.below(os.getpid()) - stopped:
        for pid in fresh:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= fresh
    # The signal is obeyed when its process runs next. Nobody but parents could wait for that (waitpid(2)), and a process that
    # hangs in the kernel never does: it does nothing either.
    deadline = time.monotonic() + _STOP_LIMIT_S
    while any(processes.runs(pid) for pid in stopped) and time.monotonic() < deadline:
        time.sleep(0.001)
    return stopped


def watch(pause: Callable[[], Coroutine[None, None, None]], go_on: Callable[[], None]) -> None:
    """In the job: obey the signals that stop a program. MEANT must be blocked in all threads.

    Args:
        pause: makes ready for it; `go_on` undoes that.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, PausableLoop)
    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        try:
            await pause()
            loop.stand_still()
            go_on()
        finally:  # whatever fails, the next Ctrl-Z is to work
            stopping.clear()

    def signalled() -> None:
        os.kill(os.getpid(), MEANT)
        if not stopping:
            stopping.append(loop.create_task(stop()))

    def continued() -> None:
        # It may have come after the signal to stop, but before that was dealt with above.
        if stopping:
            signal.signal(MEANT, signal.SIG_IGN)  # which discards it
            signal.signal(MEANT, signal.SIG_DFL)

    signal.signal(MEANT, signal.SIG_DFL)
    for number in signals.obeyed(set(STOPPING) - {MEANT}):
        loop.add_signal_handler(number, signalled)
    loop.add_signal_handler(signal.SIGCONT, continued)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOPPING) - {MEANT})


class Notice:
    """By which those below `sfrun` tell it something: bytes in a pipe, and the kernel sends SIGIO for them.

    Attributes:
        ended: the exit code of the job, when that is over. Its process may be there for longer: see `confinement.wait_for`.
    """

    _STOPPED, _ENDED = b"s", b"e"

    def __init__(self) -> None:
        """In `sfrun`, before the fork of the init; SIGIO must be blocked."""
        self.ended: int | None = None
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._reader, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._reader, fcntl.F_SETFL, fcntl.fcntl(self._reader, fcntl.F_GETFL) | os.O_ASYNC)

    def stopped(self) -> None:
        """From the init: the job has stopped."""
        self._give(self._STOPPED)

    def end(self, code: int) -> None:
        """From the job: it is over."""
        self._give(self._ENDED + bytes([code & 0xFF]))

    def _give(self, message: bytes) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full of notices that were not taken yet
            os.write(self._writer, message)

    def take(self) -> bool:
        """Take what was given; whether the job has stopped."""
        try:
            message = os.read(self._reader, 1 << 16)
        except BlockingIOError:
            return False
        stops, end, code = message.partition(self._ENDED)
        if end:
            self.ended = code[0]
        return bool(stops)


def stop_as_any_program(number: signal.Signals) -> None:
    """Stop this process by a signal that stops programs, which it blocks; returns when it is continued.

    Where nobody could continue it, because no shell is there for its process group, the kernel does not stop it (setpgid(2),
    "orphaned process group"), and this returns at once.
    """
    os.kill(os.getpid(), number)
    _take(number)


def _take(number: signal.Signals) -> None:
    """Take a blocked signal, if it is pending."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
