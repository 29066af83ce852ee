"""`mpi4py.futures` on clones: `MPIPoolExecutor` is an `sf.Executor`; its workers are clones of the rank that made it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    InvalidStateError,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    TimeoutError,
    as_completed,
    wait,
)
from types import TracebackType
from typing import Any

from sfparallel.errors import UsageError
from sfparallel.runtime import executor as executors
from sfparallel.runtime.communicator import comm as world
from sfparallel.runtime.here import HERE

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "BrokenExecutor",
    "CancelledError",
    "Executor",
    "Future",
    "InvalidStateError",
    "MPICommExecutor",
    "MPIPoolExecutor",
    "ProcessPoolExecutor",
    "ThreadPoolExecutor",
    "TimeoutError",
    "as_completed",
    "get_comm_workers",
    "wait",
]

others_run = True
"""Whether the program runs in all ranks; not with `-m mpi4py.futures`."""

_NO_EFFECT = {"python_exe", "python_args", "mpi_info", "globals", "main", "path", "wdir", "use_pkl5", "backoff"}
"""Options for programs that have to be started: clones are there already, with all that the program has."""


class MPIPoolExecutor(executors.Executor):
    """mpi4py's executor, on clones.

    Args:
        max_workers: number of clones; default: MPI4PY_FUTURES_MAX_WORKERS, else one for each other rank of the program, and for
            a program of one rank what `sf.Executor` has by default.
        initializer, initargs: as for `sf.Executor`.
        options: mpi4py's others; `env` sets environment variables in the workers, most have no effect here.
    """

    def __init__(self, max_workers: int | None = None, initializer: Callable[..., object] | None = None,
                 initargs: Iterable[Any] = (), **options: Any) -> None:
        unknown = options.keys() - _NO_EFFECT - {"env"}
        if unknown:
            raise TypeError(f"MPIPoolExecutor has no option {min(unknown)!r}")
        if max_workers is None and (variable := os.environ.get("MPI4PY_FUTURES_MAX_WORKERS")):
            max_workers = int(variable)
        if max_workers is None and world().size > 1:
            max_workers = world().size - 1
        environment = dict(options.get("env") or {})
        users, arguments = initializer, tuple(initargs)

        def prepare() -> None:
            os.environ.update(environment)
            if users is not None:
                users(*arguments)

        super().__init__(max_workers, initializer=prepare if environment or users is not None else None)

    @property
    def num_workers(self) -> int:
        """How many clones work for this executor."""
        return self._max_workers or HERE.require_vm().default_n or os.cpu_count() or 1

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
            unordered: bool = False, **options: Any) -> Iterator[Any]:
        """As `sf.Executor.map`; `unordered` is mpi4py's word."""
        return super().map(fn, *iterables, timeout=timeout, chunksize=chunksize, ordered=not unordered, **options)

    def starmap(self, fn: Callable[..., Any], iterable: Iterable[Iterable[Any]], timeout: float | None = None,
                chunksize: int = 1, unordered: bool = False) -> Iterator[Any]:
        """`itertools.starmap` in clones."""
        return self.map(_Star(fn), iterable, timeout=timeout, chunksize=chunksize, unordered=unordered)

    def bootup(self, wait: bool = True) -> MPIPoolExecutor:
        """Make the clones now."""
        future = self.submit(time.monotonic)
        if wait:
            future.result()
        return self


class _Star:
    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, items: Iterable[Any]) -> Any:
        return self._fn(*items)


class MPICommExecutor:
    """A context for the ranks of a communicator: the root gets an executor, the others get None, and wait for its end.

    With mpi4py the other ranks are the workers. Here clones of the root are: they have its memory, not that of the others.
    """

    def __init__(self, comm: Any = None, root: int = 0, **options: Any) -> None:
        self._comm = world() if comm is None else comm
        if self._comm.Is_inter():
            raise UsageError("MPICommExecutor takes an intracommunicator")
        if not 0 <= root < self._comm.size:
            raise UsageError(f"root= must be a rank of the communicator, not {root}")
        self._root = root
        self._options = options
        self._executor: MPIPoolExecutor | None = None

    def __enter__(self) -> MPIPoolExecutor | None:
        if self._comm.rank == self._root:
            workers = self._options.pop("max_workers", None) or max(1, self._comm.size - 1)
            self._executor = MPIPoolExecutor(workers, **self._options)
        return self._executor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._executor is not None:
            self._executor.__exit__(kind, error, trace)
            self._executor = None
        if others_run:
            self._comm.barrier()


def get_comm_workers() -> Any:
    """Not offered: tasks are independent of each other here.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("workers of an executor have no communicator; use sf.parallel, whose ranks have one (sf.comm())")
