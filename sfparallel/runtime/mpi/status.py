"""What is known of a message that was received."""

from __future__ import annotations

from array import array
from typing import Any, Self

from sfparallel.runtime.mpi.constants import ANY_SOURCE, ANY_TAG, UNDEFINED
from sfparallel.runtime.mpi.datatype import check_type
from sfparallel.runtime.mpi.errors import SUCCESS
from sfparallel.runtime.mpi.types import BYTE, Datatype

_SOURCE, _TAG, _ERROR, _BYTES, _CANCELLED = range(5)


class Status:
    """Source, tag, length and error of a message."""

    __hash__ = None  # type: ignore[assignment]

    def __new__(cls, status: Status | None = None) -> Self:
        self = super().__new__(cls)
        if status is None:
            self._fields = array("q", (ANY_SOURCE, ANY_TAG, SUCCESS, 0, 0, 0, 0, 0))
        elif isinstance(status, Status):
            self._fields = array("q", status._fields)
        else:
            raise TypeError(f"Status() takes another Status, not {type(status).__name__}")
        return self

    _fields: array[int]

    def set_all(self, source: int, tag: int, nbytes: int, cancelled: bool = False, error: int = SUCCESS) -> None:
        """Fill it in."""
        fields = self._fields
        fields[0], fields[1], fields[2], fields[3], fields[4] = source, tag, error, nbytes, cancelled

    def clear(self) -> None:
        """Make it the empty status."""
        self.set_all(ANY_SOURCE, ANY_TAG, 0)

    def __eq__(self, other: object) -> bool:
        return self._fields == other._fields if isinstance(other, Status) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), self.__getstate__()

    def __getstate__(self) -> dict[str, int]:
        return {"source": self.source, "tag": self.tag, "error": self.error, "nbytes": self._fields[_BYTES],
                "cancelled": self._fields[_CANCELLED]}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.set_all(state["source"], state["tag"], state["nbytes"], bool(state["cancelled"]), state["error"])

    def Get_source(self) -> int:
        return self._fields[_SOURCE]

    def Set_source(self, source: int) -> None:
        self._fields[_SOURCE] = source

    def Get_tag(self) -> int:
        return self._fields[_TAG]

    def Set_tag(self, tag: int) -> None:
        self._fields[_TAG] = tag

    def Get_error(self) -> int:
        return self._fields[_ERROR]

    def Set_error(self, error: int) -> None:
        self._fields[_ERROR] = error

    def Get_count(self, datatype: Datatype = BYTE) -> int:
        """Number of whole elements; UNDEFINED if there is a part of one."""
        core = check_type(datatype._core)
        nbytes = self._fields[_BYTES]
        if not core.size:
            return 0
        return UNDEFINED if nbytes % core.size else nbytes // core.size

    def Get_elements(self, datatype: Datatype) -> int:
        """Number of elementary items."""
        return check_type(datatype._core).basic_count(self._fields[_BYTES])

    def Set_elements(self, datatype: Datatype, count: int) -> None:
        """Set the number of elementary items."""
        core = check_type(datatype._core)
        sizes = core.basic_sizes()
        whole, rest = divmod(count, len(sizes)) if sizes else (0, 0)
        self._fields[_BYTES] = whole * core.size + sum(sizes[:rest])

    def Is_cancelled(self) -> bool:
        return bool(self._fields[_CANCELLED])

    def Set_cancelled(self, flag: bool) -> None:
        self._fields[_CANCELLED] = bool(flag)

    def tomemory(self) -> memoryview:
        """The fields as memory."""
        return memoryview(self._fields)

    def py2f(self) -> list[int]:
        return list(self._fields)

    @classmethod
    def f2py(cls, arg: list[int]) -> Self:
        status = cls()
        status._fields = array("q", arg)
        return status

    source = property(Get_source, Set_source)
    tag = property(Get_tag, Set_tag)
    error = property(Get_error, Set_error)
    cancelled = property(Is_cancelled, Set_cancelled)

    @property
    def count(self) -> int:
        return self.Get_count(BYTE)

    @count.setter
    def count(self, value: int) -> None:
        self.Set_elements(BYTE, value)
