"""Which signals a job obeys, and how often it was interrupted.

`sfrun` and the job are in one process group (see vmm.confinement). The terminal signals all of it, kill(1) may mean `sfrun`
alone, and timeout(1), a shell's `kill %1` and many a CI system signal the group by kill(2), which looks to each process as if it
were meant alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Collection

_NEEDED = (signal.SIGCHLD, signal.SIGIO, signal.SIGCONT)
"""By these the kernel tells `sfrun` and the init what happens."""


def take_up() -> None:
    """Undo what the caller of `sfrun` ignored of what it needs: with SIGCHLD ignored there would be nobody to wait for
    (wait(2))."""
    for number in _NEEDED:
        signal.signal(number, signal.SIG_DFL)


def obeyed(numbers: Collection[signal.Signals]) -> tuple[signal.Signals, ...]:
    """These signals without those that this process was told to ignore when it began, by nohup(1) or by a shell that started it
    in the background: they are to stay ignored. It must not have set handlers yet."""
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


class Interrupts:
    """The SIGINTs that `sfrun` got, for the job.

    It makes a difference whether there was one or two: the first is the program's, the second ends the job. So none is passed on
    as a signal. `sfrun` says how many it got, the job has its own count, and the larger one is the right one.
    """

    def __init__(self) -> None:
        """In `sfrun`, before it forks."""
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def pass_on(self) -> None:
        """In `sfrun`: it got one."""
        with contextlib.suppress(BlockingIOError):  # the job has thousands already
            os.write(self._writer, b"i")

    def watch(self, obey: Callable[[], None]) -> Callable[[], None]:
        """In the job: have `obey` called for each; returns what ends that. It must be called in the event loop."""
        loop = asyncio.get_running_loop()
        told = own = obeyed_so_far = 0

        def look() -> None:
            nonlocal obeyed_so_far
            while obeyed_so_far < max(told, own):
                obeyed_so_far += 1
                obey()

        def from_front() -> None:
            nonlocal told
            with contextlib.suppress(BlockingIOError):
                told += len(os.read(self._reader, 1 << 12))
            look()

        def signalled() -> None:
            nonlocal own
            own += 1
            look()

        def end() -> None:
            loop.remove_reader(self._reader)
            loop.remove_signal_handler(signal.SIGINT)

        if obeyed([signal.SIGINT]):
            loop.add_signal_handler(signal.SIGINT, signalled)
        loop.add_reader(self._reader, from_front)
        return end
