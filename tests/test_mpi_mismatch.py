"""Ranks that disagree about a call are told so: no wrong numbers, no endless wait. And details as with mpi4py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel import MPI
from sfparallel.runtime.mpi.collectives import LARGE_BYTES
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture

# Once is enough: how answers travel does not matter here.
pytestmark = pytest.mark.parametrize("double", [64 << 10], indirect=True, ids=["relayed"])

LARGE = LARGE_BYTES // 8
"""Doubles that travel by another algorithm than few of them."""


def array(count: int) -> Any:
    return np.arange(float(count))


def gather(comm: Any, mine: int, theirs: int) -> None:
    comm.Gather(array(theirs if comm.rank == 1 else mine), np.empty(3 * mine) if not comm.rank else None)


def gatherv(comm: Any, mine: int, theirs: int) -> None:
    comm.Gatherv(array(theirs if comm.rank == 1 else mine), [np.empty(3 * mine), [mine] * 3] if not comm.rank else None)


def scatter(comm: Any, mine: int, theirs: int) -> None:
    comm.Scatter(array(3 * mine) if not comm.rank else None, np.empty(theirs if comm.rank == 1 else mine))


def bcast(comm: Any, mine: int, theirs: int) -> None:
    comm.Bcast(array(theirs if comm.rank == 1 else mine))


def allgather(comm: Any, mine: int, theirs: int) -> None:
    comm.Allgather(array(theirs if comm.rank == 1 else mine), np.empty(3 * mine))


def alltoall(comm: Any, mine: int, theirs: int) -> None:
    count = theirs if comm.rank == 1 else mine
    comm.Alltoallv([array(3 * count), [count] * 3], [np.empty(3 * mine), [mine] * 3])


def reduction(name: str) -> Callable[[Any, int, int], None]:
    def call(comm: Any, mine: int, theirs: int) -> None:
        count = theirs if comm.rank == 1 else mine
        getattr(comm, name)(array(count), np.empty(count))

    call.__qualname__ = name
    return call


def neighbours(comm: Any, mine: int, theirs: int) -> None:
    ring = comm.Create_cart([3], [True])
    ring.Neighbor_allgather(array(theirs if comm.rank == 1 else mine), np.empty(2 * mine))


REDUCTIONS = ["Reduce", "Allreduce", "Scan", "Exscan"]
CALLS = [gather, gatherv, scatter, bcast, allgather, alltoall, neighbours, *map(reduction, REDUCTIONS)]
COUNTS = [(3, 1), (1, 3), (LARGE, LARGE - 8), (LARGE - 8, LARGE), (LARGE, 1), (3 * LARGE, LARGE), (2, 0)]


def test_counts_that_differ_among_ranks_are_errors(double: Doubles) -> None:
    """In all collective calls on buffers; one such array among many would be added to each element of the others."""
    wrong = []
    for call in CALLS:
        for mine, theirs in COUNTS:
            def work(call: Any = call, mine: int = mine, theirs: int = theirs) -> None:
                call(sf.comm(), mine, theirs)

            try:
                sf.parallel(work, n=3, timeout=60)()
            except MPI.Exception as error:
                if error.Get_error_class() == MPI.ERR_TRUNCATE:
                    continue
                wrong.append((call.__qualname__, mine, theirs, str(error)))
            except sf.RegionTimeout:
                wrong.append((call.__qualname__, mine, theirs, "waits"))
            else:
                wrong.append((call.__qualname__, mine, theirs, "silent"))
    assert not wrong


def test_the_error_names_the_rank(double: Doubles) -> None:
    def work() -> None:
        gather(sf.comm(), 3, 1)

    assert "rank 1 gave 8 bytes" in str(sf.parallel(work, n=3, on_error="return")()[0])

    def receive() -> None:
        comm = sf.comm()
        if comm.rank == 2:
            comm.Send(array(3), 0, tag=5)
        elif not comm.rank:
            comm.Recv(np.empty(2))

    error = sf.parallel(receive, n=3, on_error="return")()[0]
    assert "24 bytes from rank 2 of COMM_WORLD" in str(error) and error.Get_error_class() == MPI.ERR_TRUNCATE


def test_alike_counts_are_right(double: Doubles) -> None:
    def work() -> list[Any]:
        for call in CALLS:
            for count in (0, 1, 3, LARGE - 8, LARGE):
                call(sf.comm(), count, count)
        data = array(LARGE) if sf.comm().rank == 1 else np.empty(LARGE)
        sf.comm().Bcast(data, 1)
        return [bool((data == array(LARGE)).all())]

    assert sf.parallel(work, n=3, timeout=300)() == [[True]] * 3


def test_what_comes_from_nobody(double: Doubles) -> None:
    def work() -> list[Any]:
        comm, found = sf.comm(), []
        for replace in (False, True):
            status = MPI.Status()
            status.source, status.tag = 5, 5
            dest, source = (1, MPI.PROC_NULL) if comm.rank == 0 else (MPI.PROC_NULL, 0)
            if replace:
                comm.Sendrecv_replace(array(2), dest, source=source, status=status)
            else:
                comm.Sendrecv(array(2), dest, 0, np.empty(2), source, status=status)
            found.append((status.source, status.tag, status.Get_count(MPI.DOUBLE)))
        return found

    assert sf.parallel(work, n=2, timeout=60)() == [[(MPI.PROC_NULL, MPI.ANY_TAG, 0)] * 2, [(0, 0, 2)] * 2]


def test_tags_that_are_floats(double: Doubles) -> None:
    """They are cut, as by Cython's conversion."""
    def work() -> list[Any]:
        comm = sf.comm()
        if comm.rank == 0:
            comm.send("a", 1, 7.0)
            comm.isend("b", 1, 8.9).wait()
            comm.Send(array(1), 1.0, tag=np.float64(9))  # type: ignore[arg-type]
            return []
        status, data = MPI.Status(), np.empty(1)
        assert comm.probe(0, 7.5, status) and status.tag == 7
        comm.Recv(data, 0, 9.0)
        return [comm.recv(source=0.0, tag=7), comm.irecv(source=0, tag=8.0).wait()]  # type: ignore[arg-type]

    assert sf.parallel(work, n=2, timeout=60)() == [[], ["a", "b"]]


def test_an_operation_of_the_program_sees_whole_elements(double: Doubles) -> None:
    """As long as the type's extent says, with what fills up its end, as for mpi4py."""
    item = np.dtype([("value", "f8"), ("place", "i4")], align=True)

    def better(left: Any, right: Any, _: Any) -> None:
        mine, best = np.frombuffer(left, item), np.frombuffer(right, item)
        take = mine["value"] > best["value"]
        best[take] = mine[take]

    def work() -> list[Any]:
        comm = sf.comm()
        kind = MPI.Datatype.Create_struct([1, 1], [0, 8], [MPI.DOUBLE, MPI.INT]).Create_resized(0, item.itemsize).Commit()
        mine = np.array([(float(comm.rank), comm.rank), (float(-comm.rank), comm.rank)], item)
        best = np.zeros(2, item)
        comm.Allreduce([mine, 2, kind], [best, 2, kind], MPI.Op.Create(better, commute=True))
        return best.tolist()

    assert sf.parallel(work, n=3, timeout=60)() == [[(2.0, 2), (0.0, 0)]] * 3


def test_what_a_reduction_returns_is_not_the_callers(double: Doubles) -> None:
    def work() -> bool:
        comm, mine = sf.comm(), [sf.comm().rank]
        found = [comm.allreduce(mine, MPI.MAX), comm.allreduce(mine, MPI.MIN), comm.scan(mine), comm.reduce(mine, MPI.MAX, 1)]
        for each in found:
            if each is not None:
                each.append("more")
        return mine == [comm.rank]

    assert sf.parallel(work, n=2, timeout=60)() == [True, True]


def test_the_standards_representation(double: Doubles) -> None:
    numbers = np.array([1 + 2j, 3 - 4j])
    packed = bytearray(32)
    pair = MPI.C_DOUBLE_COMPLEX.Create_contiguous(2)
    assert pair.Pack_external("external32", numbers, packed, 0) == 32
    assert np.frombuffer(packed, ">c16").tolist() == numbers.tolist()
    back = np.zeros(2, complex)
    assert pair.Unpack_external("external32", packed, 0, back) == 32 and back.tolist() == numbers.tolist()
    with pytest.raises(MPI.Exception, match="TRUNCATE"):
        pair.Unpack_external("external32", packed, 8, back)
