"""MPI's error classes, codes and strings, and the exceptions that carry them."""

from __future__ import annotations

import itertools
import traceback
from typing import Any

from sfparallel.errors import CloneLost

_STRINGS = {
    "SUCCESS": "no error", "ERR_BUFFER": "invalid buffer pointer", "ERR_COUNT": "invalid count argument",
    "ERR_TYPE": "invalid datatype", "ERR_TAG": "invalid tag", "ERR_COMM": "invalid communicator", "ERR_RANK": "invalid rank",
    "ERR_ROOT": "invalid root", "ERR_GROUP": "invalid group", "ERR_OP": "invalid operation", "ERR_TOPOLOGY": "invalid topology",
    "ERR_DIMS": "invalid dimension argument", "ERR_ARG": "invalid argument", "ERR_UNKNOWN": "unknown error",
    "ERR_TRUNCATE": "message truncated: the receive buffer is too small", "ERR_OTHER": "other error",
    "ERR_INTERN": "internal error", "ERR_IN_STATUS": "see the status array for the errors", "ERR_PENDING": "request pending",
    "ERR_REQUEST": "invalid request", "ERR_ACCESS": "permission denied", "ERR_AMODE": "invalid access mode",
    "ERR_BAD_FILE": "invalid file name", "ERR_CONVERSION": "error in a conversion function",
    "ERR_DUP_DATAREP": "data representation is defined already", "ERR_FILE_EXISTS": "file exists",
    "ERR_FILE_IN_USE": "file is in use", "ERR_FILE": "invalid file", "ERR_INFO": "invalid info object",
    "ERR_INFO_KEY": "invalid key", "ERR_INFO_VALUE": "invalid value", "ERR_INFO_NOKEY": "no such key", "ERR_IO": "I/O error",
    "ERR_NAME": "no such service name", "ERR_NO_MEM": "out of memory", "ERR_NOT_SAME": "arguments differ among ranks",
    "ERR_NO_SPACE": "no space on device", "ERR_NO_SUCH_FILE": "no such file", "ERR_PORT": "invalid port name",
    "ERR_QUOTA": "quota exceeded", "ERR_READ_ONLY": "read-only file or file system", "ERR_SERVICE": "cannot publish that name",
    "ERR_SPAWN": "processes cannot be spawned", "ERR_UNSUPPORTED_DATAREP": "unsupported data representation",
    "ERR_UNSUPPORTED_OPERATION": "unsupported operation", "ERR_WIN": "invalid window", "ERR_BASE": "invalid base address",
    "ERR_LOCKTYPE": "invalid lock type", "ERR_KEYVAL": "invalid key value",
    "ERR_RMA_CONFLICT": "conflicting accesses to a window",
    "ERR_RMA_SYNC": "wrong synchronization of a window", "ERR_SIZE": "invalid size", "ERR_DISP": "invalid displacement",
    "ERR_ASSERT": "invalid assertion", "ERR_RMA_RANGE": "target memory is not part of the window",
    "ERR_RMA_ATTACH": "memory cannot be attached", "ERR_RMA_SHARED": "memory cannot be shared",
    "ERR_RMA_FLAVOR": "wrong flavor of window", "ERR_PROC_ABORTED": "a peer process has aborted",
    "ERR_VALUE_TOO_LARGE": "value is too large to store", "ERR_SESSION": "invalid session",
    "ERR_ERRHANDLER": "invalid error handler", "ERR_ABI": "unsupported ABI",
    "ERR_PROC_FAILED": "a process has failed", "ERR_PROC_FAILED_PENDING": "a process that might send has failed",
    "ERR_REVOKED": "the communicator is revoked",
}
"""Error classes in the order of their numbers, from 0."""

CODES = {name: number for number, name in enumerate(_STRINGS)}

SUCCESS, ERR_BUFFER, ERR_COUNT, ERR_TYPE = (CODES[name] for name in ("SUCCESS", "ERR_BUFFER", "ERR_COUNT", "ERR_TYPE"))
ERR_TAG, ERR_COMM, ERR_RANK, ERR_ROOT = (CODES[name] for name in ("ERR_TAG", "ERR_COMM", "ERR_RANK", "ERR_ROOT"))
ERR_GROUP, ERR_OP, ERR_TOPOLOGY, ERR_DIMS = (CODES[name] for name in ("ERR_GROUP", "ERR_OP", "ERR_TOPOLOGY", "ERR_DIMS"))
ERR_ARG, ERR_UNKNOWN, ERR_TRUNCATE = (CODES[name] for name in ("ERR_ARG", "ERR_UNKNOWN", "ERR_TRUNCATE"))
ERR_OTHER, ERR_INTERN, ERR_REQUEST = (CODES[name] for name in ("ERR_OTHER", "ERR_INTERN", "ERR_REQUEST"))
ERR_PENDING, ERR_INFO, ERR_KEYVAL, ERR_PORT = (CODES[name] for name in ("ERR_PENDING", "ERR_INFO", "ERR_KEYVAL", "ERR_PORT"))
ERR_IN_STATUS, ERR_INFO_KEY, ERR_INFO_VALUE = (CODES[name] for name in ("ERR_IN_STATUS", "ERR_INFO_KEY", "ERR_INFO_VALUE"))
ERR_INFO_NOKEY, ERR_ERRHANDLER, ERR_SESSION = (CODES[name] for name in ("ERR_INFO_NOKEY", "ERR_ERRHANDLER", "ERR_SESSION"))
ERR_PROC_FAILED, ERR_REVOKED = (CODES[name] for name in ("ERR_PROC_FAILED", "ERR_REVOKED"))
ERR_PROC_FAILED_PENDING, ERR_NAME = (CODES[name] for name in ("ERR_PROC_FAILED_PENDING", "ERR_NAME"))
ERR_LASTCODE = 0x3FFF

_class_of: dict[int, int] = {number: number for number in CODES.values()}
_string_of: dict[int, str] = {CODES[name]: f"MPI_{name}: {text}" for name, text in _STRINGS.items()}
_numbers = itertools.count(ERR_LASTCODE + 1)
_used: dict[str, int] = {"last": ERR_LASTCODE}


class MPIException(RuntimeError):
    """An error with an MPI error code (mpi4py's `MPI.Exception`).

    Args:
        ierr: an error code or class.
        detail: what exactly was wrong, for the message.
    """

    def __init__(self, ierr: int = SUCCESS, detail: str = "", /) -> None:
        self._code = ERR_UNKNOWN if int(ierr) < SUCCESS else int(ierr)
        self._detail = detail
        super().__init__(self._code)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._code, self._detail)

    def __eq__(self, other: object) -> bool:
        return self._code == other._code if isinstance(other, MPIException) else self._code == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: int) -> bool:
        return self._code < other

    def __le__(self, other: int) -> bool:
        return self._code <= other

    def __gt__(self, other: int) -> bool:
        return self._code > other

    def __ge__(self, other: int) -> bool:
        return self._code >= other

    def __hash__(self) -> int:
        return hash(self._code)

    def __bool__(self) -> bool:
        return self._code != SUCCESS

    def __int__(self) -> int:
        return self._code

    def __repr__(self) -> str:
        return f"MPI.Exception({self._code})"

    def __str__(self) -> str:
        text = get_error_string(self._code)
        return f"{text} ({self._detail})" if self._detail else text

    def Get_error_code(self) -> int:
        return self._code

    def Get_error_class(self) -> int:
        return get_error_class(self._code)

    def Get_error_string(self) -> str:
        return str(self)

    error_code = property(Get_error_code)
    error_class = property(Get_error_class)
    error_string = property(Get_error_string)


class PeerLost(CloneLost, MPIException):
    """A rank that a call waits for died or left; both a `CloneLost` and an `MPI.Exception`.

    Attributes:
        rank: in the region (in the world), whatever the communicator.
        cause: what became of it.
    """

    def __init__(self, message: str, *, rank: int, cause: str, code: int = ERR_PROC_FAILED) -> None:
        # Not by `super`: the constructors of the two bases take different arguments.
        Exception.__init__(self, message)
        self.message, self.hint = message, None
        self.rank, self.cause, self.host, self.console = rank, cause, "", ""
        self.results: dict[int, Any] = {}
        self._code = code
        self._detail = message

    # Both bases define these; the text is that of sfparallel, comparison and numbers are MPI's.
    __str__ = CloneLost.__str__
    __reduce__ = CloneLost.__reduce__
    __hash__ = MPIException.__hash__


def error(code: int, detail: str = "") -> MPIException:
    """An exception to raise."""
    return MPIException(code, detail)


def mismatch(sent: int, expected: int, who: str) -> MPIException:
    """For a collective call in which ranks disagree about how much travels. The standard wants them to agree to the byte: what is
    shorter would leave a part of the result as it was."""
    return MPIException(ERR_TRUNCATE, f"{who} gave {sent} bytes, where {expected} are expected; counts and types must agree")


def call_user(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the program's on behalf of MPI: what it raises is shown, and becomes an error code."""
    try:
        return function(*args, **kwargs)
    except Exception as failure:  # whatever the program's function may raise
        traceback.print_exc()
        raise MPIException(int(failure) if isinstance(failure, MPIException) else ERR_OTHER) from failure


def get_error_class(errorcode: int) -> int:
    """Convert an error code into an error class."""
    try:
        return _class_of[errorcode]
    except KeyError:
        raise MPIException(ERR_ARG, f"no such error code: {errorcode}") from None


def get_error_string(errorcode: int) -> str:
    """The text of an error class or code."""
    if errorcode not in _class_of:
        raise MPIException(ERR_ARG, f"no such error code: {errorcode}")
    return _string_of.get(errorcode, "")


def add_error_class() -> int:
    """Add an error class to the known ones."""
    number = next(_numbers)
    _class_of[number] = number
    _used["last"] = max(_used["last"], number)
    return number


def remove_error_class(errorclass: int) -> None:
    """Remove a class that was added."""
    _remove(errorclass)


def add_error_code(errorclass: int) -> int:
    """Add an error code to an error class."""
    get_error_class(errorclass)
    number = next(_numbers)
    _class_of[number] = errorclass
    return number


def remove_error_code(errorcode: int) -> None:
    """Remove a code that was added."""
    _remove(errorcode)


def add_error_string(errorcode: int, string: str) -> None:
    """Give a class or code that was added its text."""
    _require_added(errorcode)
    _string_of[errorcode] = string


def remove_error_string(errorcode: int) -> None:
    """Take that text away."""
    _require_added(errorcode)
    _string_of.pop(errorcode, None)


def last_used_code() -> int:
    """The attribute LASTUSEDCODE."""
    return _used["last"]


def _require_added(number: int) -> None:
    if number not in _class_of or number <= ERR_LASTCODE:
        raise MPIException(ERR_ARG, f"not an error class or code that was added: {number}")


def _remove(number: int) -> None:
    _require_added(number)
    if any(of == number for code, of in _class_of.items() if code != number) or _string_of.get(number):
        raise MPIException(ERR_OTHER, "it still has codes or strings")
    del _class_of[number]
