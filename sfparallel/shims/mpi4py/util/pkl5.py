"""Communicators that send large buffers beside the pickle: all of ours do, so these are the very same classes."""

from __future__ import annotations

from typing import Any, Self

from sfparallel.runtime.mpi.comm import Comm, Intracomm
from sfparallel.runtime.mpi.intercomm import Intercomm
from sfparallel.runtime.mpi.p2p import Message
from sfparallel.runtime.mpi.pickling import Pickle, pickle
from sfparallel.runtime.mpi.request import Request
from sfparallel.runtime.mpi.types import BYTE, Datatype

__all__ = ["Comm", "Intercomm", "Intracomm", "Message", "Pickle", "Request", "pickle"]


class _BigMPI:
    """mpi4py's way around counts of 32 bits; counts have 64 here, so that it does nothing.

    Attributes:
        blocksize: from where on mpi4py would make a type of a block.
    """

    blocksize = (1 << 63) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, buf: Any) -> tuple[memoryview, int, Datatype]:
        view = memoryview(buf)
        return view, view.nbytes, BYTE


_bigmpi = _BigMPI()
