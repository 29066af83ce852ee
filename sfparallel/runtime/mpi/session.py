"""Sessions: the world by another name."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from sfparallel.runtime.mpi.buffered import Buffered
from sfparallel.runtime.mpi.comm import COMM_SELF, COMM_WORLD
from sfparallel.runtime.mpi.constants import MAX_PSET_NAME_LEN
from sfparallel.runtime.mpi.errhandler import WithErrhandler, initial
from sfparallel.runtime.mpi.errors import ERR_ARG, ERR_SESSION, MPIException
from sfparallel.runtime.mpi.group import Group
from sfparallel.runtime.mpi.handle import Core, Handle, predefined
from sfparallel.runtime.mpi.info import INFO_NULL, Info

_SETS = {"mpi://WORLD": COMM_WORLD, "mpi://SELF": COMM_SELF}


class SessionCore(Core):
    """A session."""

    def __init__(self, errhandler: Any) -> None:
        self.errhandler = errhandler
        self.buffer: Any = None

    def raise_error(self, error: MPIException) -> None:
        self.errhandler.handle(self, int(error))
        raise error


class Session(Buffered, WithErrhandler, Handle):
    """A session (mpi4py's `MPI.Session`)."""

    _invalid: ClassVar[int] = ERR_SESSION
    _null_name = "SESSION_NULL"

    @classmethod
    def _wrapped(cls, core: Any) -> Session:
        return cls._of(core)

    @classmethod
    def Init(cls, info: Info = INFO_NULL, errhandler: Any = None) -> Self:
        return cls._of(SessionCore(errhandler._core if errhandler else initial()))

    def Finalize(self) -> None:
        self._live()
        self._core = None

    def Get_num_psets(self, info: Info = INFO_NULL) -> int:
        self._live()
        return len(_SETS)

    def Get_nth_pset(self, n: int, info: Info = INFO_NULL) -> str:
        core = self._live()
        if not 0 <= n < len(_SETS):
            core.raise_error(MPIException(ERR_ARG, f"there is no process set {n}"))
        return list(_SETS)[n][:MAX_PSET_NAME_LEN]

    def Get_info(self) -> Info:
        self._live()
        return Info.Create()

    def Get_pset_info(self, pset_name: str) -> Info:
        return Info.Create({"mpi_size": str(self._set(pset_name).size)})

    def Create_group(self, pset_name: str) -> Group:
        group: Group = self._set(pset_name).Get_group()
        return group

    def _set(self, name: str) -> Any:
        core = self._live()
        if name not in _SETS:
            core.raise_error(MPIException(ERR_ARG, f"no such process set: {name}"))
        return _SETS[name]


SESSION_NULL: Session = predefined(Session(), "SESSION_NULL")
