"""The environment of a program: start and end, versions, clocks, abort, memory."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

from sfparallel.runtime import lowlevel
from sfparallel.runtime.here import HERE
from sfparallel.runtime.mpi import buffered
from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi.buffers import BottomType, BufferAutomaticType, InPlaceType, buffer, byte_array
from sfparallel.runtime.mpi.comm import COMM_SELF, COMM_WORLD, Comm, Intracomm
from sfparallel.runtime.mpi.errhandler import Errhandler, set_initial
from sfparallel.runtime.mpi.errors import ERR_DIMS, ERR_NAME, ERR_PORT, MPIException
from sfparallel.runtime.mpi.handle import Handle
from sfparallel.runtime.mpi.info import INFO_NULL, Info
from sfparallel.runtime.mpi.intercomm import Intercomm, local_comm
from sfparallel.runtime.mpi.status import Status
from sfparallel.runtime.mpi.unsupported import unsupported


class _Process:
    """What MPI remembers of this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """This process has become another one."""
        self.finalized = False
        self.initialized = True
        self.abort_status: object = None
        self.buffer: Any = None


_process = _Process()
HERE.forgetful.append(_process.forget)


def abort(errorcode: int) -> NoReturn:
    """End all ranks; the region (or the job) fails with this error code."""
    lowlevel.abort(errorcode & 0xFF or 1, f"called Abort({errorcode})")


def await_init() -> None:
    """The program wants to call `Init` itself (`mpi4py.rc.initialize`)."""
    _process.initialized = False


def begin_with(errhandler: Errhandler) -> None:
    """What COMM_WORLD, COMM_SELF and sessions do about errors, until the program says otherwise (`mpi4py.rc.errors`)."""
    set_initial(errhandler)
    for comm in (COMM_WORLD, COMM_SELF):
        comm._core.errhandler = errhandler._core  # one that nobody has used yet begins with it anyway


def Init() -> None:
    """MPI is there from the beginning; afterwards `Is_initialized`."""
    _process.initialized = True


def Init_thread(required: int = c.THREAD_MULTIPLE) -> int:
    Init()
    return c.THREAD_MULTIPLE


def Finalize() -> None:
    """Wait for all ranks; afterwards `Is_finalized`."""
    if not _process.finalized:
        COMM_WORLD.barrier()
        _process.finalized = True


def Is_initialized() -> bool:
    return _process.initialized


def Is_finalized() -> bool:
    return _process.finalized


def Query_thread() -> int:
    return c.THREAD_MULTIPLE


def Is_thread_main() -> bool:
    import threading
    return threading.current_thread() is threading.main_thread()


def Get_version() -> tuple[int, int]:
    """The version of the standard whose calls are here."""
    return c.VERSION, c.SUBVERSION


def Get_library_version() -> str:
    return "sfparallel: MPI among clones of a virtual machine"


def get_vendor() -> tuple[str, tuple[int, int, int]]:
    return "sfparallel", (0, 1, 0)


def Get_abi_version() -> tuple[int, int]:
    """There is no C library: (-1, -1)."""
    return -1, -1


def Get_abi_info() -> Info:
    return Info.Create()


Get_abi_fortran_info = Get_abi_info
Get_hw_resource_info = Get_abi_info


def Get_processor_name() -> str:
    return socket.gethostname()


def Wtime() -> float:
    """Seconds since some moment."""
    return time.perf_counter()


def Wtick() -> float:
    return time.get_clock_info("perf_counter").resolution


def Pcontrol(level: int) -> None:
    """Profiling is not controlled by this."""


def Get_address(location: Any) -> int:
    """Where memory lies."""
    if location is None or isinstance(location, BottomType | InPlaceType | BufferAutomaticType):
        return int(location or 0)
    return int(byte_array(location, readonly=True).ctypes.data)


def Aint_add(base: int, disp: int) -> int:
    return base + disp


def Aint_diff(addr1: int, addr2: int) -> int:
    return addr1 - addr2


def handle_of(arg: Any) -> int:
    """The handle of an object as an integer (mpi4py's `_handleof`)."""
    if isinstance(arg, Status):
        return address_of(arg)
    if not isinstance(arg, Handle):
        raise TypeError(f"expecting an MPI object, got {type(arg).__name__}")
    return arg.handle


def address_of(arg: Any) -> int:
    """Something unique to an object (mpi4py's `_addressof`: there is no C object here)."""
    if not isinstance(arg, Handle | Status):
        raise TypeError(f"expecting an MPI object, got {type(arg).__name__}")
    return id(arg)


def size_of(arg: Any) -> int:
    """Size of a handle (mpi4py's `_sizeof`)."""
    kind = arg if isinstance(arg, type) else type(arg)
    if issubclass(kind, Status):
        return 64
    if not issubclass(kind, Handle):
        raise TypeError(f"expecting an MPI object or class, got {arg!r}")
    return 8


def Alloc_mem(size: int, info: Info = INFO_NULL) -> buffer:
    """Memory for messages."""
    return buffer.allocate(size)


def Free_mem(mem: buffer) -> None:
    mem.release()


def Attach_buffer(buf: Any) -> None:
    buffered.attach(_process, buf)


def Detach_buffer() -> Any:
    return buffered.detach(_process)


Flush_buffer = buffered.flush
Iflush_buffer = buffered.begin_flush


def Compute_dims(nnodes: int, dims: int | Sequence[int]) -> list[int]:
    """A grid as square as possible; dimensions that are not 0 are kept."""
    wanted = [0] * dims if isinstance(dims, int) else list(dims)
    fixed = 1
    for each in wanted:
        if each < 0:
            raise MPIException(ERR_DIMS, f"{each}")
        fixed *= each or 1
    free = wanted.count(0)
    if nnodes < 1 or nnodes % fixed or (not free and nnodes != fixed):
        raise MPIException(ERR_DIMS, f"{nnodes} processes do not divide into {wanted}")
    found = sorted(_factors(nnodes // fixed, free), reverse=True) if free else []
    return [each or found.pop(0) for each in wanted]


def _factors(number: int, count: int) -> list[int]:
    """`count` factors of a number, as equal as possible."""
    if count == 1:
        return [number]
    best: list[int] = []
    for first in range(1, number + 1):
        if number % first == 0 and (not best or first ** count <= number):
            candidate = [first, *_factors(number // first, count - 1)]
            if not best or max(candidate) - min(candidate) < max(best) - min(best):
                best = candidate
    return best


def Open_port(info: Info = INFO_NULL) -> str:
    raise MPIException(ERR_PORT, "programs cannot connect to each other: all ranks of a region are in COMM_WORLD")


def Close_port(port_name: str) -> None:
    raise MPIException(ERR_PORT, port_name)


def Publish_name(service_name: str, port_name: str, info: Info = INFO_NULL) -> None:
    raise MPIException(ERR_NAME, service_name)


def Unpublish_name(service_name: str, port_name: str, info: Info = INFO_NULL) -> None:
    raise MPIException(ERR_NAME, service_name)


def Lookup_name(service_name: str, info: Info = INFO_NULL) -> str:
    raise MPIException(ERR_NAME, service_name)


def Register_datarep(datarep: str, read_fn: Callable[..., None], write_fn: Callable[..., None],
                     extent_fn: Callable[..., int]) -> NoReturn:
    unsupported("Register_datarep", "MPI files are not supported; use Python's own files")


def comm_lock_table(comm: Comm) -> dict[Hashable, Any]:
    """Locks of a communicator (mpi4py's `_comm_lock_table`)."""
    table: dict[Hashable, Any] = comm._live().locks
    return table


def comm_lock(comm: Comm, key: Hashable | None = None) -> Any:
    """One of them (mpi4py's `_comm_lock`)."""
    return comm._live().lock(key)


def context_within(comm: Intracomm) -> tuple[Intracomm, int]:
    """A hidden duplicate of a communicator, and a tag of its own for each call (mpi4py's `_commctx_intra`)."""
    core = comm._live()
    if core.hidden is None:
        core.hidden = Intracomm(comm).Dup()
        core.tags = itertools.count(1)
    return core.hidden, next(core.tags)


def context_between(comm: Intercomm) -> tuple[Intercomm, int, Intracomm, bool]:
    """The same for two groups; also a communicator of the own group, and whether it is the first (`_commctx_inter`)."""
    core = comm._live()
    if core.hidden is None:
        core.hidden = Intercomm(comm).Dup()
        core.tags = itertools.count(1)
    return core.hidden, next(core.tags), local_comm(comm), min(core.ranks) < min(core.remote)


def set_abort_status(status: object) -> None:
    """With what status the job ends if this rank fails (mpi4py.run uses it)."""
    _process.abort_status = status
