"""Reductions give the processor's results whatever the program wants of numpy, and an interrupted one gives none."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel import MPI
from tests.fork_double import Doubles, double_fixture  # noqa: F401


def test_overflow_and_invalid_operations_are_no_errors(double: Doubles) -> None:
    def add() -> list[float]:
        comm = MPI.COMM_WORLD
        given, sums = np.array([1e308, np.inf if comm.rank else -np.inf]), np.zeros(2)
        with np.errstate(all="raise"):
            comm.Allreduce(given, sums)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            comm.Allreduce(given, sums)
        return [float(each) for each in sums]

    for first, second in sf.parallel(n=2)(add)():
        assert first == np.inf and np.isnan(second)


@pytest.mark.parametrize("kind", [np.uint8, memoryview])
def test_bytes_are_numbers_as_for_mpi4py(double: Doubles, kind: Any) -> None:
    def add() -> list[int]:
        comm = MPI.COMM_WORLD
        given, sums, most = (bytearray([comm.rank + 1, 200]), bytearray(2), bytearray(2))
        if kind is np.uint8:
            comm.Allreduce(np.frombuffer(given, np.uint8), np.frombuffer(sums, np.uint8))
            comm.Allreduce(np.frombuffer(given, np.uint8), np.frombuffer(most, np.uint8), MPI.MAX)  # type: ignore[attr-defined]
        else:
            comm.Allreduce(kind(given), kind(sums))
            comm.Allreduce(kind(given), kind(most), MPI.MAX)  # type: ignore[attr-defined]
        return [*sums, *most]

    assert sf.parallel(n=2)(add)() == [[3, 144, 2, 200]] * 2


def test_an_interrupted_reduction_has_no_result(double: Doubles) -> None:
    """Its request must not be done afterwards as if all had been well."""

    def add() -> list[Any]:
        calls: list[int] = []

        def interrupted(left: Any, right: Any, _: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt  # as a signal's handler does
            np.frombuffer(right, float)[:] += np.frombuffer(left, float)

        sums = np.full(2, -1.0)
        request = MPI.COMM_WORLD.Iallreduce(np.ones(2), sums, MPI.Op.Create(interrupted, commute=True))
        found: list[Any] = []
        for _ in range(2):
            try:
                request.Wait(timeout=60)
                found.append(sums.tolist())
            except BaseException as error:
                found.append(type(error).__name__)
        return found

    assert sf.parallel(n=2)(add)() == [["KeyboardInterrupt", "KeyboardInterrupt"]] * 2


def _refuse() -> None:
    raise ValueError("not here")


class Refuses:
    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def test_an_object_that_cannot_be_unpickled_is_an_error_each_time(double: Doubles) -> None:
    def exchange() -> list[str]:
        comm = MPI.COMM_WORLD
        comm.send(Refuses(), dest=1 - comm.rank)
        comm.send("last", dest=1 - comm.rank, tag=1)
        request = comm.irecv(source=1 - comm.rank, tag=0)
        comm.recv(source=1 - comm.rank, tag=1)  # the one before it is here, too
        found = []
        for call in (request.get_status, request.wait):
            with pytest.raises(ValueError, match="not here") as caught:
                call(MPI.Status())
            found.append(str(caught.value))
        return found

    assert sf.parallel(n=2)(exchange)() == [["not here", "not here"]] * 2
