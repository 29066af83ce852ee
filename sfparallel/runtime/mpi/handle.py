"""What all MPI objects have in common: a Python object that refers to a core, or to nothing (the null handle).

Several objects may refer to one core (`MPI.Comm(comm)`); they are equal. Freeing one makes that object null.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, ClassVar, Self

from sfparallel.runtime.mpi.errors import ERR_ARG, MPIException

_cores: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Core:
    """What an MPI object refers to.

    Attributes:
        constant: the name of the predefined constant that it is, or empty.
    """

    constant = ""
    _number = 0

    @property
    def number(self) -> int:
        """The handle as an integer."""
        if not self._number:
            self._number = next(_numbers)
            _cores[self._number] = self
        return self._number


_constants: dict[str, Any] = {}


def constant(name: str) -> Any:
    """The predefined object of that name (for pickles)."""
    return _constants[name]


class Handle:
    """Base of all MPI objects."""

    _invalid: ClassVar[int] = ERR_ARG
    _null_name: ClassVar[str] = ""
    _core: Any
    _is_constant = False

    def __new__(cls, handle: Any = None) -> Self:
        self = super().__new__(cls)
        self._core = None
        if handle is not None:
            if not isinstance(handle, Handle) or not cls._accepts(handle):
                raise TypeError(f"{cls.__name__}() takes another {cls.__name__}, not {type(handle).__name__}")
            self._core = handle._core
        return self

    @classmethod
    def _accepts(cls, handle: Handle) -> bool:
        """Whether an object may be made from another one."""
        return isinstance(handle, cls) or issubclass(cls, type(handle))

    @classmethod
    def _of(cls, core: Any) -> Self:
        self = cls.__new__(cls)
        self._core = core
        return self

    def _live(self) -> Any:
        """The core.

        Raises:
            MPIException: this is a null handle.
        """
        core = self._core
        if core is None:
            raise MPIException(self._invalid, f"null {type(self).__name__}")
        return core

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handle) or not isinstance(other, type(self)._family()):
            return NotImplemented
        return self._core is other._core

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        # As in mpi4py: objects that can be changed in place have no hash, see `Datatype` and others for exceptions.
        raise TypeError(f"unhashable type: {type(self).__name__!r}")

    def __bool__(self) -> bool:
        return self._core is not None

    def __reduce__(self) -> str | tuple[Any, ...]:
        name = self._core.constant if self._core is not None else self._null_name
        if name and self._is_constant:
            return constant, (name,)
        if name:
            return type(self), (constant(name),)
        raise ValueError(f"cannot pickle {type(self).__name__}: it is valid in this process only")

    def __copy__(self) -> Self:
        return self if self._is_constant else type(self)._of(self._core)

    @classmethod
    def _family(cls) -> type[Handle]:
        """The class whose handles can be compared with those of this class."""
        family: type[Handle] = cls
        for each in cls.__mro__:
            if issubclass(each, Handle) and each is not Handle:
                family = each
        return family

    @property
    def handle(self) -> int:
        """The handle as an integer; 0 is null."""
        return 0 if self._core is None else int(self._core.number)

    @classmethod
    def fromhandle(cls, handle: int) -> Self:
        """The object of a handle."""
        return cls._of(_cores[handle] if handle else None)

    def toint(self) -> int:
        return self.handle

    @classmethod
    def fromint(cls, arg: int, /) -> Self:
        return cls.fromhandle(arg)

    def py2f(self) -> int:
        return self.handle

    @classmethod
    def f2py(cls, arg: int) -> Self:
        return cls.fromhandle(arg)

    def free(self) -> None:
        """Free it if that is allowed; never an error."""
        if self._core is not None and not self._is_constant:
            if not self._core.constant:
                self._release()
            self._core = None

    def _release(self) -> None:
        """What freeing means beyond becoming null."""


def predefined(handle: Any, name: str) -> Any:
    """Mark an object as the predefined constant `name`."""
    handle._is_constant = True
    _constants[name] = handle
    if handle._core is not None:
        handle._core.constant = name
    return handle
