"""Stands in for mpi4py under `sfrun --mpi4py`: the same names, with `sfparallel.MPI` behind them.

Found only because `runtime.program` puts its folder on sys.path; nothing of sfparallel imports it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__version__ = "4.1.2"
"""The version whose names are here."""
__author__ = "the authors of sfparallel"
__credits__ = "mpi4py, whose interface this is: Lisandro Dalcin and contributors"

__all__ = ["MPI"]


class Rc:
    """mpi4py's options. `initialize` decides what `MPI.Is_initialized` says before `MPI.Init`, and `errors` which error handler
    COMM_WORLD, COMM_SELF and sessions begin with; the others can be set, and have no effect: MPI is there from the beginning,
    calls may come from any thread, and messages have no size limit."""

    initialize = True
    threads = True
    thread_level = "multiple"
    finalize: bool | None = None
    fast_reduce = True
    recv_mprobe = True
    irecv_bufsz = 32768
    errors = "exception"

    def __init__(self, **options: Any) -> None:
        self(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(self, name):
            raise TypeError(f"mpi4py.rc has no option {name!r}")
        super().__setattr__(name, value)

    def __call__(self, **options: Any) -> None:
        unknown = [name for name in options if not hasattr(self, name)]
        if unknown:
            raise TypeError(f"mpi4py.rc has no option {unknown[0]!r}")
        for name, value in options.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"<{self.__module__}.rc {vars(self)}>"


rc = Rc()
# `import mpi4py.rc` has to find it too.
sys.modules[f"{__name__}.rc"] = rc  # type: ignore[assignment]


def get_include() -> str:
    """A folder for C headers; there are none, because there is no C library behind this."""
    return os.path.join(os.path.dirname(__file__), "include")


def get_config() -> dict[str, str]:
    """How it was built: not with any MPI compiler."""
    return {}


def profile(name: str, *, path: Any = None) -> None:
    """Not offered: profiling libraries hook into a C library.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("there is no C library to profile; use `sfrun --trace`, or Python's own profilers")
