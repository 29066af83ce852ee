"""Attributes: values that programs attach to communicators and datatypes, under keys of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from sfparallel.runtime.mpi.constants import KEYVAL_INVALID
from sfparallel.runtime.mpi.errors import ERR_KEYVAL, MPIException, call_user

_numbers = itertools.count(0x6C000001)


class Keyvals:
    """The keys of one class of objects: what happens to a value when its object is copied or freed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any, bool]] = {}

    def create(self, copy_fn: Any, delete_fn: Any, nopython: bool) -> int:
        number = next(_numbers)
        self._known[number] = (copy_fn, delete_fn, nopython)
        return number

    def free(self, keyval: int) -> int:
        # Values that are attached already stay, with what happens to them.
        self.require(keyval)
        return KEYVAL_INVALID

    def require(self, keyval: int) -> tuple[Any, Any, bool]:
        try:
            return self._known[keyval]
        except KeyError:
            raise MPIException(ERR_KEYVAL, f"{keyval}") from None


class Attributes:
    """The calls of objects with attributes; their core has a dictionary `attributes`."""

    _keyvals: ClassVar[Keyvals]
    _core: Any

    if TYPE_CHECKING:
        def _live(self) -> Any: ...

    def _predefined_attribute(self, keyval: int) -> tuple[bool, Any]:
        return False, None

    def Get_attr(self, keyval: int) -> Any:
        """The value under a key, None if there is none."""
        core = self._live()
        found, value = self._predefined_attribute(keyval)
        if found:
            return value
        self._keyvals.require(keyval)
        return core.attributes.get(keyval)

    def Set_attr(self, keyval: int, attrval: Any) -> None:
        """Attach a value."""
        core = self._live()
        _, delete_fn, nopython = self._keyvals.require(keyval)
        if nopython and not isinstance(attrval, int):
            raise TypeError("an integer is required")
        if keyval in core.attributes and delete_fn is not None and callable(delete_fn):
            call_user(delete_fn, self, keyval, core.attributes[keyval])
        core.attributes[keyval] = attrval

    def Delete_attr(self, keyval: int) -> None:
        """Remove a value."""
        core = self._live()
        _, delete_fn, _ = self._keyvals.require(keyval)
        if keyval not in core.attributes:
            raise MPIException(ERR_KEYVAL, f"{keyval} has no value here")
        value = core.attributes.pop(keyval)
        if callable(delete_fn):
            call_user(delete_fn, self, keyval, value)

    @classmethod
    def Create_keyval(cls, copy_fn: Callable[[Any, int, Any], Any] | bool | None = None,
                      delete_fn: Callable[[Any, int, Any], None] | None = None, nopython: bool = False) -> int:
        """Create a key.

        Args:
            copy_fn: called when the object is duplicated with (object, key, value); what it returns is the copy's value, unless
                it is NotImplemented. True copies the value itself, None does not copy.
            delete_fn: called with the same arguments when the value goes.
            nopython: values are integers.
        """
        return cls._keyvals.create(copy_fn, delete_fn, nopython)

    @classmethod
    def Free_keyval(cls, keyval: int) -> int:
        """Free a key."""
        return cls._keyvals.free(keyval)

    def _copy_attributes(self, core: Any, copy: Any) -> None:
        for keyval, value in list(core.attributes.items()):
            copy_fn, _, _ = self._keyvals.require(keyval)
            if copy_fn is True:
                copy.attributes[keyval] = value
            elif callable(copy_fn):
                new = call_user(copy_fn, self, keyval, value)
                if new is not NotImplemented:
                    copy.attributes[keyval] = new

    def _delete_attributes(self, core: Any) -> None:
        for keyval, value in reversed(list(core.attributes.items())):
            _, delete_fn, _ = self._keyvals.require(keyval)
            if callable(delete_fn):
                call_user(delete_fn, self, keyval, value)
        core.attributes.clear()
