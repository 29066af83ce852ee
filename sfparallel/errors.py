"""Every error that sfparallel raises.

    SfError
    ├── UsageError              invalid arguments, or an invalid combination of them
    │   └── OutsideVMError      a runtime call outside a VM started by sfrun
    ├── StateError              the object is in another state than the call requires
    ├── EnvironmentProblem      the machine lacks something (`sf doctor` says what)
    │   ├── ImageMissing        no such guest image
    │   ├── ImageBuildError     `sf image build` failed
    │   └── CapacityError       the clones do not fit in the host's memory (`.fits` clones would)
    ├── VMError                 a virtual machine, or the program that runs it, failed
    │   ├── QmpError            QEMU refused a monitor command
    │   ├── PagingError         the paging layer inside QEMU failed (vmm.paging.PagingRefused: it refused an operation)
    │   ├── GuestError          the guest agent failed or broke the protocol
    │   └── CloneLost           a clone ended before it answered, or violated the protocol (`.rank`, `.cause`)
    │       └── PeerLost        a rank that an MPI call waits for (runtime.mpi.errors); also an MPI.Exception
    ├── NetworkError            the clone network could not be set up or used
    ├── ProtocolError           a peer violated the wire protocol
    ├── RegionError             a parallel region ended without all of its results
    │   ├── RankError           the function raised in one or more ranks (`.errors`)
    │   ├── RankExit            the function called sys.exit or sf.exit in a rank (`.rank`, `.code`)
    │   ├── RegionTimeout       not all ranks answered in time (`.missing`)
    │   └── CollectConflict     two ranks wrote the same collected file
    ├── ExecutorBroken          the initializer of an Executor failed in a clone (`.rank`); also a BrokenExecutor
    ├── RemoteError             replaces an exception of a rank that cannot be pickled, or must not be raised as it is
    │                           (`.type_name`, `.traceback_text`); also a RuntimeError
    ├── ResultNotPicklable      a rank's result cannot be pickled
    └── Closed                  a call on something that you closed, joined or killed; also a RuntimeError

Errors cross clones, so all of them pickle: they keep their constructor's keyword arguments in attributes.
Every message says what happened and, where there is one, what to do next (`hint`).
"""

from __future__ import annotations

from concurrent.futures import BrokenExecutor
from typing import Any

from sfparallel.text import printable


def _rebuild(cls: type[SfError], message: str, state: dict[str, Any]) -> SfError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class SfError(Exception):
    """Base of all errors of this package.

    Args:
        message: what happened, to which rank or VM.
        hint: what to do next; printed on a line of its own.
    """

    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        # Messages quote what guests, their consoles and files say.
        return printable(f"{text}\n  hint: {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args[0] if self.args else "", dict(self.__dict__))


class UsageError(SfError, ValueError):
    """Invalid arguments."""


class OutsideVMError(UsageError):
    """A runtime call was made outside a VM of sfparallel."""


class StateError(SfError):
    """The object is in another state than the call requires."""


class EnvironmentProblem(SfError):
    """The machine lacks something that is needed."""


class ImageMissing(EnvironmentProblem):
    """There is no such guest image."""


class ImageBuildError(EnvironmentProblem):
    """A guest image could not be built."""


class CapacityError(EnvironmentProblem):
    """The clones do not fit in the host's memory.

    Attributes:
        fits: the number of clones that would fit now.
    """

    def __init__(self, message: str, *, fits: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.fits = fits


class VMError(SfError):
    """A virtual machine, or the program that runs it, failed."""


class QmpError(VMError):
    """QEMU refused a monitor command."""


class PagingError(VMError):
    """The paging layer inside QEMU refused an operation."""


class GuestError(VMError):
    """The guest agent failed or broke the protocol."""


class CloneLost(VMError):
    """A clone died before it answered.

    Attributes:
        rank: its rank in the parallel region.
        cause: why it was lost, as reported by the hypervisor, the agent or the console.
        host: name of the host on which it ran.
        console: the end of its console output, possibly empty.
        results: results of the ranks that answered, by rank (filled in by the region).
    """

    def __init__(self, message: str, *, rank: int, cause: str, host: str = "", console: str = "",
                 hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank = rank
        self.cause = cause
        self.host = host
        self.console = console
        self.results: dict[int, Any] = {}


class NetworkError(SfError):
    """The clone network could not be set up or used."""


class ProtocolError(SfError):
    """A peer violated the wire protocol."""


class RegionError(SfError):
    """A parallel region ended without all of its results.

    Attributes:
        results: results of the ranks that answered, by rank (or by item index, in a map).
    """

    def __init__(self, message: str, *, results: dict[int, Any] | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.results: dict[int, Any] = results or {}


class RankError(RegionError):
    """The function raised in one or more ranks and the exceptions were gathered (`on_error="gather"`).

    Attributes:
        errors: the exceptions by rank.
    """

    def __init__(self, message: str, *, errors: dict[int, BaseException], results: dict[int, Any] | None = None,
                 hint: str | None = None) -> None:
        super().__init__(message, results=results, hint=hint)
        self.errors = errors


class RankExit(RegionError):
    """The function ended its rank by `sys.exit` or `sf.exit` instead of returning a result.

    Attributes:
        rank: the rank that ended.
        code: the argument of the call (None without one).
    """

    def __init__(self, message: str, *, rank: int, code: object, results: dict[int, Any] | None = None,
                 hint: str | None = None) -> None:
        super().__init__(message, results=results, hint=hint)
        self.rank = rank
        self.code = code


class RegionTimeout(RegionError, TimeoutError):
    """Not all ranks answered in time.

    Attributes:
        missing: the ranks that had not answered.
    """

    def __init__(self, message: str, *, missing: list[int], results: dict[int, Any] | None = None,
                 hint: str | None = None) -> None:
        super().__init__(message, results=results, hint=hint)
        self.missing = missing


class CollectConflict(RegionError):
    """Two ranks, or items of a map, or tasks, wrote the same collected file.

    Attributes:
        path: the file, relative to the folder of the glob.
        ranks: the ranks that wrote it; in a map the indexes of the items, in an Executor the numbers of the tasks.
    """

    def __init__(self, message: str, *, path: str, ranks: tuple[int, int], results: dict[int, Any] | None = None,
                 hint: str | None = None) -> None:
        super().__init__(message, results=results, hint=hint)
        self.path = path
        self.ranks = ranks


class ExecutorBroken(SfError, BrokenExecutor):
    """The clones of an Executor cannot work: its initializer failed in one of them.

    Attributes:
        rank: the clone in which it failed.
    """

    def __init__(self, message: str, *, rank: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank = rank


class RemoteError(SfError, RuntimeError):
    """Replaces an exception of a rank that cannot be pickled or unpickled, so that only its text arrives, or one that would
    control the flow of the receiving code, such as StopIteration, which is then its `__cause__`.

    Attributes:
        type_name: module and name of the original exception's type.
        traceback_text: the formatted traceback in the rank.
    """

    def __init__(self, message: str, *, type_name: str, traceback_text: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.type_name = type_name
        self.traceback_text = traceback_text


class ResultNotPicklable(SfError):
    """A rank's result cannot be sent to the parent."""


class Closed(SfError, RuntimeError):
    """A call on an object that the program has closed, joined, killed or shut down."""
