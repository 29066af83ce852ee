"""Info objects: hints as pairs of strings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from sfparallel.runtime.mpi.constants import MAX_INFO_KEY, MAX_INFO_VAL
from sfparallel.runtime.mpi.errors import (
    ERR_ARG,
    ERR_INFO,
    ERR_INFO_KEY,
    ERR_INFO_NOKEY,
    ERR_INFO_VALUE,
    MPIException,
)
from sfparallel.runtime.mpi.handle import Core, Handle, predefined


class InfoCore(Core):
    """The pairs."""

    def __init__(self, items: Mapping[str, str]) -> None:
        self.items = dict(items)


class Info(Handle):
    """An info object (mpi4py's `MPI.Info`)."""

    _invalid: ClassVar[int] = ERR_INFO
    _null_name = "INFO_NULL"
    _core: InfoCore | None

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self._core is None or self._core.constant:
            return super().__reduce__()
        return type(self).Create, (dict(self._core.items),)

    @classmethod
    def Create(cls, items: Info | Mapping[str, str] | Iterable[tuple[str, str]] | None = None) -> Self:
        """A new object, with pairs if some are given."""
        info = cls._of(InfoCore({}))
        if items is not None:
            info.update(items)
        return info

    @classmethod
    def Create_env(cls, args: Sequence[str] | None = None) -> Self:
        """What is known of how the program was started."""
        return cls._of(InfoCore(_environment(list(args) if args is not None else sys.argv)))

    def Free(self) -> None:
        self._live()
        if self._is_constant:
            raise MPIException(ERR_INFO, "a predefined info object cannot be freed")
        self._core = None

    def Dup(self) -> Self:
        return type(self)._of(InfoCore(self._pairs()))

    def Get(self, key: str) -> str | None:
        return self._pairs().get(_check_key(key))

    def Set(self, key: str, value: str) -> None:
        _check_key(key)
        if not value or len(value) > MAX_INFO_VAL:
            raise MPIException(ERR_INFO_VALUE, repr(value))
        self._pairs()[key] = value

    def Delete(self, key: str) -> None:
        pairs = self._pairs()
        if _check_key(key) not in pairs:
            raise MPIException(ERR_INFO_NOKEY, key)
        del pairs[key]

    def Get_nkeys(self) -> int:
        return len(self._pairs())

    def Get_nthkey(self, n: int) -> str:
        keys = list(self._pairs())
        if not 0 <= n < len(keys):
            raise MPIException(ERR_ARG, f"there is no key {n}")
        return keys[n]

    def _pairs(self) -> dict[str, str]:
        pairs: dict[str, str] = self._live().items
        return pairs

    # The interface of dictionaries; a null object is empty.

    def __len__(self) -> int:
        return 0 if self._core is None else len(self._core.items)

    def __contains__(self, key: str) -> bool:
        return self._core is not None and key in self._core.items

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str) -> str:
        if key not in self:
            raise KeyError(key)
        return self._pairs()[key]

    def __setitem__(self, key: str, value: str) -> None:
        if self._core is None:
            raise KeyError(key)
        self.Set(key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.Delete(key)

    def get(self, key: str, default: str | None = None) -> str | None:
        return self._pairs()[key] if key in self else default

    def keys(self) -> list[str]:
        return [] if self._core is None else list(self._core.items)

    def values(self) -> list[str]:
        return [] if self._core is None else list(self._core.items.values())

    def items(self) -> list[tuple[str, str]]:
        return [] if self._core is None else list(self._core.items.items())

    def update(self, items: Info | Mapping[str, str] | Iterable[tuple[str, str]] = (), **kwds: str) -> None:
        if self._core is None:
            raise KeyError("null Info")
        pairs = items.items() if isinstance(items, Info | Mapping) else items
        for key, value in [*pairs, *kwds.items()]:
            self.Set(key, value)

    def pop(self, key: str, *default: str) -> str:
        if key in self:
            return self._pairs().pop(key)
        if default:
            return default[0]
        raise KeyError(key)

    def popitem(self) -> tuple[str, str]:
        if not len(self):
            raise KeyError("popitem(): null or empty Info")
        return self._pairs().popitem()

    def copy(self) -> Self:
        return type(self)() if self._core is None else self.Dup()

    def clear(self) -> None:
        if self._core is not None:
            self._core.items.clear()


def _check_key(key: str) -> str:
    if not key or len(key) > MAX_INFO_KEY:
        raise MPIException(ERR_INFO_KEY, repr(key))
    return key


def _environment(argv: list[str]) -> dict[str, str]:
    pairs = {"command": sys.executable, "argv": " ".join(argv), "wdir": os.getcwd(), "thread_level": "MPI_THREAD_MULTIPLE"}
    return {key: value[:MAX_INFO_VAL] for key, value in pairs.items() if value}


INFO_NULL: Info = predefined(Info(), "INFO_NULL")
INFO_ENV: Info = predefined(Info._of(InfoCore({})), "INFO_ENV")
