"""Reduction operations: on Python objects, and on packed memory of a datatype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np

from sfparallel.runtime.mpi.buffers import Bytes, buffer
from sfparallel.runtime.mpi.datatype import TypeCore
from sfparallel.runtime.mpi.errors import ERR_OP, MPIException
from sfparallel.runtime.mpi.handle import Core, Handle, predefined
from sfparallel.runtime.mpi.types import LOGICAL_NAMES, NAMED, Datatype


class OpCore(Core):
    """What an operation does.

    Attributes:
        on_objects: of two Python objects.
        on_memory: numpy arrays (left, right), result into right; None for operations of the program.
        kinds: numpy kinds of the types it is defined for (MPI 4.0, 6.9.2).
        function: of the program: (in, inout, datatype).
    """

    def __init__(self, on_objects: Callable[[Any, Any], Any], on_memory: Callable[[Any, Any], None] | None, kinds: str,
                 commutative: bool = True, function: Callable[[Any, Any, Any], None] | None = None) -> None:
        self.on_objects = on_objects
        self.on_memory = on_memory
        self.kinds = kinds
        self.commutative = commutative
        self.function = function

    def combine(self, core: TypeCore, left: Bytes, right: Bytes) -> Bytes:
        """left op right, of packed elements; the memory of `right` may be used."""
        if not right.flags.writeable:
            right = right.copy()
        if self.function is not None:
            return self._combine_by_function(core, left, right)
        dtype = self.require(core)
        if len(right) and self.on_memory is not None:
            # MPI computes as the processor does: what the program wants of numpy (`seterr`, warnings) is not for this.
            with np.errstate(all="ignore"):
                self.on_memory(np.frombuffer(left, dtype), np.frombuffer(right, dtype))
        return right

    def require(self, core: TypeCore) -> np.dtype[Any]:
        """The numpy type for a datatype.

        Raises:
            MPIException: the operation is not defined for it.
        """
        if core.dtype is None or not self._is_defined(core):
            raise MPIException(ERR_OP, f"{self.constant} is not defined for {core.name or 'a derived datatype'}")
        return core.dtype

    def _is_defined(self, core: TypeCore) -> bool:
        if self.kinds == "*":
            return True
        if core.kind == "pair":
            return "p" in self.kinds
        assert core.dtype is not None
        if core.name in _LOGICAL_TYPES and core.dtype.kind != "b":
            return "l" in self.kinds or core.name.endswith(("LOGICAL2", "LOGICAL4", "LOGICAL8"))
        if core.name in ("MPI_BYTE", "MPI_PACKED"):
            return "B" in self.kinds
        return core.dtype.kind in self.kinds

    def _combine_by_function(self, core: TypeCore, left: Bytes, right: Bytes) -> Bytes:
        assert self.function is not None
        datatype = _OBJECTS.get(core) or Datatype._of(core)
        count = len(right) // core.size if core.size else 0
        if core.is_contiguous:
            self.function(buffer(left), buffer.frombuffer(right), datatype)
            return right
        # Whole elements, with what fills up the end of the last one.
        first, end = core.span(count)
        first, end = min(0, first), max(end, count * core.extent)
        inputs, result = np.zeros(end - first, np.uint8), np.zeros(end - first, np.uint8)
        core.unpack(left, inputs, -first, count)
        core.unpack(right, result, -first, count)
        self.function(buffer(inputs), buffer.frombuffer(result), datatype)
        return core.pack(result, -first, count)


_LOGICAL_TYPES = {f"MPI_{name}" for name in LOGICAL_NAMES}
_OBJECTS = {each._core: each for each in NAMED.values() if each._core is not None}


def _ufunc(function: Any) -> Callable[[Any, Any], None]:
    def apply(left: Any, right: Any) -> None:
        function(left, right, out=right)

    return apply


def _logical(function: Any) -> Callable[[Any, Any], None]:
    def apply(left: Any, right: Any) -> None:
        right[...] = function(left, right)

    return apply


def _located(better: Any) -> Callable[[Any, Any], None]:
    def apply(left: Any, right: Any) -> None:
        values, others = left["value"], right["value"]
        take = better(values, others) | ((values == others) & (left["index"] < right["index"]))
        right[take] = left[take]

    return apply


def _copy(left: Any, right: Any) -> None:
    right[...] = left


def _nothing(left: Any, right: Any) -> None:
    """NO_OP."""


def _max_location(x: Any, y: Any) -> Any:
    return _location(x, y, x[0] > y[0])


def _min_location(x: Any, y: Any) -> Any:
    return _location(x, y, x[0] < y[0])


def _location(x: Any, y: Any, first: bool) -> Any:
    if x[0] == y[0]:
        first = not y[1] < x[1]
    return (x[0], x[1]) if first else (y[0], y[1])


_CORES = {
    "MAX": OpCore(lambda x, y: y if y > x else x, _ufunc(np.maximum), "iufb"),
    "MIN": OpCore(lambda x, y: y if y < x else x, _ufunc(np.minimum), "iufb"),
    "SUM": OpCore(lambda x, y: x + y, _ufunc(np.add), "iufcb"),
    "PROD": OpCore(lambda x, y: x * y, _ufunc(np.multiply), "iufcb"),
    "LAND": OpCore(lambda x, y: bool(x) & bool(y), _logical(np.logical_and), "iubl"),
    "BAND": OpCore(lambda x, y: x & y, _ufunc(np.bitwise_and), "iubB"),
    "LOR": OpCore(lambda x, y: bool(x) | bool(y), _logical(np.logical_or), "iubl"),
    "BOR": OpCore(lambda x, y: x | y, _ufunc(np.bitwise_or), "iubB"),
    "LXOR": OpCore(lambda x, y: bool(x) ^ bool(y), _logical(np.logical_xor), "iubl"),
    "BXOR": OpCore(lambda x, y: x ^ y, _ufunc(np.bitwise_xor), "iubB"),
    "MAXLOC": OpCore(_max_location, _located(np.greater), "p"),
    "MINLOC": OpCore(_min_location, _located(np.less), "p"),
    "REPLACE": OpCore(lambda x, y: y, _copy, "*", commutative=False),
    "NO_OP": OpCore(lambda x, y: x, _nothing, "*", commutative=False),
}


class Op(Handle):
    """A reduction operation (mpi4py's `MPI.Op`)."""

    _invalid: ClassVar[int] = ERR_OP
    _null_name = "OP_NULL"
    _core: OpCore | None

    def __call__(self, x: Any, y: Any, /) -> Any:
        if self._core is None:
            raise ValueError("cannot call user-defined operation")
        return self._core.on_objects(x, y)

    @classmethod
    def Create(cls, function: Callable[[Any, Any, Datatype], None], commute: bool = False) -> Self:
        """An operation of the program's: function(in, inout, datatype) changes `inout`."""

        def on_objects(x: Any, y: Any) -> Any:
            function(x, y, None)  # type: ignore[arg-type]
            return y

        return cls._of(OpCore(on_objects, None, "*", commute, function))

    def __reduce__(self) -> str | tuple[Any, ...]:
        if self._core is not None and self._core.function is not None:
            return type(self).Create, (self._core.function, self._core.commutative)
        return super().__reduce__()

    def Free(self) -> None:
        if self._live().constant:
            raise MPIException(ERR_OP, "a predefined operation cannot be freed")
        self._core = None

    def Is_commutative(self) -> bool:
        return bool(self._live().commutative)

    is_commutative = property(Is_commutative)

    @property
    def is_predefined(self) -> bool:
        return self._core is None or bool(self._core.constant)

    def Reduce_local(self, inbuf: Any, inoutbuf: Any) -> None:
        """inoutbuf = inbuf op inoutbuf, here."""
        from sfparallel.runtime.mpi.messages import simple
        core = self._live()
        left, right = simple(inbuf, readonly=True), simple(inoutbuf, readonly=False)
        if left.core is not right.core:
            raise ValueError("mismatch in send and receive MPI datatypes")
        if left.count != right.count:
            raise ValueError(f"mismatch in send count {left.count} and receive count {right.count}")
        right.put(memoryview(core.combine(right.core, left.read(), right.read())))


OPS: dict[str, Op] = {name: predefined(Op._of(core), name) for name, core in _CORES.items()}
OP_NULL: Op = predefined(Op(), "OP_NULL")
SUM = OPS["SUM"]
