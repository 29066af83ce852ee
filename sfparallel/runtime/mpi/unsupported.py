"""What is not offered: one-sided windows, MPI-IO, spawning. The classes are there, so that programs can be imported."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from sfparallel.runtime.mpi.errhandler import WithErrhandler
from sfparallel.runtime.mpi.errors import CODES
from sfparallel.runtime.mpi.handle import Handle, predefined


def unsupported(what: str, instead: str) -> NoReturn:
    """Raise NotImplementedError."""
    raise NotImplementedError(f"{what} is not supported by sfparallel; instead: {instead}")


_NO_WINDOWS = "exchange messages (Send, Recv, Isend, Irecv): memory of other ranks cannot be accessed"
_NO_FILES = "gather the data at one rank and write it there, or write one file per rank (sf.parallel needs collect= for it)"


class Win(WithErrhandler, Handle):
    """One-sided windows: not offered."""

    _invalid: ClassVar[int] = CODES["ERR_WIN"]
    _null_name = "WIN_NULL"

    @classmethod
    def Create(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("Win.Create", _NO_WINDOWS)

    @classmethod
    def Allocate(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("Win.Allocate", _NO_WINDOWS)

    @classmethod
    def Allocate_shared(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("Win.Allocate_shared", _NO_WINDOWS)

    @classmethod
    def Create_dynamic(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("Win.Create_dynamic", _NO_WINDOWS)

    @classmethod
    def Create_keyval(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("Win.Create_keyval", _NO_WINDOWS)

    def Get_name(self) -> str:
        return "MPI_WIN_NULL"

    def Free(self) -> None:
        self._live()

    name = property(Get_name)


class File(WithErrhandler, Handle):
    """MPI-IO: not offered."""

    _invalid: ClassVar[int] = CODES["ERR_FILE"]
    _null_name = "FILE_NULL"

    @classmethod
    def Open(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("File.Open", _NO_FILES)

    @classmethod
    def Delete(cls, *args: Any, **kwargs: Any) -> NoReturn:
        unsupported("File.Delete", "os.remove")

    def Close(self) -> None:
        self._live()


WIN_NULL: Win = predefined(Win(), "WIN_NULL")
FILE_NULL: File = predefined(File(), "FILE_NULL")
