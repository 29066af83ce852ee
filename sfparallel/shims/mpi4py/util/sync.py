"""`mpi4py.util.sync`: ranks that wait for each other. What needs windows (memory that all ranks access) is not offered."""

from __future__ import annotations

from typing import Any, NoReturn, Self

from sfparallel.runtime.mpi.comm import Intracomm
from sfparallel.runtime.mpi.unsupported import unsupported

__all__ = ["Condition", "Counter", "Mutex", "Semaphore", "Sequential"]


class Sequential:
    """A block that the ranks of a communicator run one after the other, in their order.

    Args:
        comm: the ranks.
        tag: of the messages by which each lets the next one go on.
    """

    def __init__(self, comm: Intracomm, tag: int = 0) -> None:
        self.comm = comm
        self.tag = int(tag)

    def begin(self) -> None:
        """Wait for the rank before."""
        if self.comm.rank > 0:
            self.comm.Recv(bytearray(), self.comm.rank - 1, self.tag)

    def end(self) -> None:
        """Let the next rank go on."""
        if self.comm.rank + 1 < self.comm.size:
            self.comm.Send(b"", self.comm.rank + 1, self.tag)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class _NeedsWindows:
    _instead = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._refuse()

    @classmethod
    def _refuse(cls) -> NoReturn:
        unsupported(f"mpi4py.util.sync.{cls.__name__}", cls._instead)


class Counter(_NeedsWindows):
    """Not offered."""

    _instead = "count in one rank and query it by messages, or distribute work with sf.parallel_map, which balances it"


class Mutex(_NeedsWindows):
    """Not offered."""

    _instead = "let one rank grant turns by messages, or use Sequential"


class Condition(_NeedsWindows):
    """Not offered."""

    _instead = "send a message to the waiting ranks"


class Semaphore(_NeedsWindows):
    """Not offered."""

    _instead = "let one rank grant turns by messages"
