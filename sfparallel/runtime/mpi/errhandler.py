"""Error handlers: what happens when a call on a communicator fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from sfparallel.runtime.mpi.errors import ERR_ERRHANDLER, MPIException
from sfparallel.runtime.mpi.handle import Core, Handle, predefined


class ErrhandlerCore(Core):
    """What an error handler does.

    Args:
        function: called with (object, error code); None raises the exception only.
        fatal: ends the program.
    """

    def __init__(self, function: Callable[[Any, int], None] | None = None, *, fatal: bool = False) -> None:
        self.function = function
        self.fatal = fatal
        self.wrap: Callable[[Any], Any] = lambda core: core

    def handle(self, core: Any, code: int) -> None:
        """An error has happened on the object of `core`."""
        if self.fatal:
            from sfparallel.runtime.mpi.environment import abort
            abort(code)
        elif self.function is not None:
            self.function(self.wrap(core), code)


class Errhandler(Handle):
    """An error handler (mpi4py's `MPI.Errhandler`)."""

    _invalid: ClassVar[int] = ERR_ERRHANDLER
    _null_name = "ERRHANDLER_NULL"

    def Free(self) -> None:
        """Forget it; where it is set it stays."""
        if self._core is None:
            raise MPIException(ERR_ERRHANDLER, "null error handler")
        self._core = None


ERRHANDLER_NULL: Errhandler = predefined(Errhandler(), "ERRHANDLER_NULL")
ERRORS_RETURN: Errhandler = predefined(Errhandler._of(ErrhandlerCore()), "ERRORS_RETURN")
ERRORS_ABORT: Errhandler = predefined(Errhandler._of(ErrhandlerCore(fatal=True)), "ERRORS_ABORT")
ERRORS_ARE_FATAL: Errhandler = predefined(Errhandler._of(ErrhandlerCore(fatal=True)), "ERRORS_ARE_FATAL")


_initial: ErrhandlerCore = ERRORS_RETURN._core


def initial() -> ErrhandlerCore:
    """The handler that COMM_WORLD, COMM_SELF and sessions begin with: exceptions are raised, unless a program chose another."""
    return _initial


def set_initial(errhandler: Errhandler) -> None:
    global _initial
    _initial = errhandler._core


class WithErrhandler:
    """The calls of objects that have an error handler."""

    _core: Any

    if TYPE_CHECKING:
        def _live(self) -> Any: ...

    @classmethod
    def _wrapped(cls, core: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def Create_errhandler(cls, errhandler_fn: Callable[[Any, int], None]) -> Errhandler:
        """A handler that calls a function with the object and the error code; then the exception is raised."""
        core = ErrhandlerCore(errhandler_fn)
        core.wrap = cls._wrapped
        return Errhandler._of(core)

    def Get_errhandler(self) -> Errhandler:
        return Errhandler._of(self._live().errhandler)

    def Set_errhandler(self, errhandler: Errhandler) -> None:
        core = self._live()
        if errhandler._core is None:
            raise MPIException(ERR_ERRHANDLER, "null error handler")
        core.errhandler = errhandler._core

    def Call_errhandler(self, errorcode: int) -> None:
        """Do what the handler does for an error."""
        core = self._live()
        core.errhandler.handle(core, errorcode)
