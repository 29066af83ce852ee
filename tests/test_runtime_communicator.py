"""barrier and bcast among clones of the double."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel.runtime.mpi.transport import Transport
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def test_outside_a_region(double: Doubles) -> None:
    comm = sf.comm()
    assert (comm.rank, comm.size, comm.Get_rank(), comm.Get_size()) == (0, 1, 0, 1)
    comm.barrier()
    assert comm.bcast("x") == "x"
    with pytest.raises(sf.MPI.Exception):
        comm.bcast("x", root=1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_bcast_from_every_root(double: Doubles, n: int) -> None:
    @sf.parallel(n=n)
    def work() -> list[Any]:
        comm = sf.comm()
        return [comm.bcast((comm.rank, "x") if comm.rank == root else None, root=root) for root in range(n)]

    assert work() == [[(root, "x") for root in range(n)]] * n


def test_bcast_of_arrays(double: Doubles) -> None:
    @sf.parallel(n=4)
    def work() -> bool:
        comm = sf.comm()
        array = comm.bcast(np.arange(500_000.0) if comm.rank == 2 else None, root=2)
        array += 1
        return bool((array == np.arange(1, 500_001)).all())

    assert work() == [True] * 4


def _extend(x: list[int], y: list[int]) -> list[int]:
    x.extend(y)
    return x


def _prepend(x: list[int], y: list[int], _: object) -> None:
    y[:0] = x


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", ["function", "operation"])
def test_an_operation_may_change_its_operands(double: Doubles, n: int, kind: str) -> None:
    @sf.parallel(n=n)
    def work() -> tuple[Any, ...]:
        comm, op = sf.comm(), _extend if kind == "function" else sf.MPI.Op.Create(_prepend)
        mine = [comm.rank]
        found = (comm.reduce(mine, op, n - 1), comm.allreduce(mine, op), comm.scan(mine, op), comm.exscan(mine, op))
        assert mine == [comm.rank], "the operand is the caller's"
        return found

    for rank, (reduced, everything, until, before) in enumerate(work()):
        assert reduced == (list(range(n)) if rank == n - 1 else None)
        assert everything == list(range(n))
        assert until == list(range(rank + 1))
        assert before == (list(range(rank)) if rank else None)


def test_nobody_leaves_a_barrier_before_all_have_come(double: Doubles) -> None:
    reader, writer = os.pipe()

    @sf.parallel(n=4)
    def work() -> bytes:
        os.write(writer, b"%d" % sf.comm().rank)
        sf.comm().barrier()
        return os.read(reader, 1)

    assert sorted(work()) == [b"0", b"1", b"2", b"3"]
    os.close(reader)
    os.close(writer)


def test_a_root_may_leave_before_others_receive(double: Doubles) -> None:
    reader, writer = os.pipe()

    @sf.parallel(n=3)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank == 0:
            os.write(writer, b"xx")
        else:
            os.read(reader, 1)
        return comm.bcast(np.ones(1_000_000) if comm.rank == 0 else None).sum()

    assert work() == [1e6] * 3
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_barrier_that_times_out_names_the_missing(double: Doubles, absent: int) -> None:
    reader, writer = os.pipe()

    @sf.parallel(n=3, on_error="return")
    def work() -> None:
        comm = sf.comm()
        comm.barrier()  # the time limits below begin together, on a busy machine too
        try:
            if comm.rank == absent:
                os.read(reader, 1)
                os.read(reader, 1)
            else:
                comm.barrier(timeout=1.0)
        finally:
            os.write(writer, b"x")

    answers = work()
    for rank in {0, 1, 2} - {absent}:
        error = answers[rank]
        assert isinstance(error, sf.RegionTimeout)
        assert error.missing == [absent]
        assert f"barrier took longer than 1.0 s; no answer from rank {absent}" in str(error)
    os.close(reader)
    os.close(writer)


def test_bcast_that_times_out_names_the_sender(double: Doubles) -> None:
    @sf.parallel(n=2, on_error="return")
    def work() -> None:
        if sf.comm().rank:
            sf.comm().bcast(None, timeout=0.3)

    error = work()[1]
    assert isinstance(error, sf.RegionTimeout)
    assert error.missing == [0]


@pytest.mark.parametrize("how", ["SIGKILL", "raise"])
def test_a_rank_that_is_gone_is_an_error_in_those_that_wait(double: Doubles, how: str) -> None:
    @sf.parallel(n=3, on_error="return")
    def work() -> None:
        if sf.comm().rank == 1:
            if how == "raise":
                raise ValueError("x")
            os.kill(os.getpid(), signal.SIGKILL)
        sf.comm().barrier()

    first, second, third = work()
    assert isinstance(second, ValueError if how == "raise" else sf.CloneLost)
    for error in (first, third):
        assert isinstance(error, sf.CloneLost)
        assert error.rank == 1
        assert ("raised builtins.ValueError" if how == "raise" else "was lost") in str(error)


def test_freed_communicators_leave_nothing(double: Doubles) -> None:
    @sf.parallel(n=2)
    def work() -> bool:
        comm = sf.comm()

        def once() -> None:
            other = comm.Dup()
            other.barrier()
            other.sendrecv("x", 1 - comm.rank, 0, None, 1 - comm.rank, 0)
            other.Free()

        once()
        endpoint = comm._core.endpoint
        tables = (endpoint.engine._posted, endpoint.engine._unexpected, endpoint.entered)
        before = sum(len(table) for table in tables)
        for _ in range(20):
            once()
        # The other rank may be ahead, now or before.
        return sum(len(table) for table in tables) - before < 5

    assert work() == [True, True]


@pytest.mark.parametrize(("item", "step", "offset"), [("d", 3, 0), ("d", 3, 1), ("f", 5, 3), ("B", 7, 2), ("H", 3, 1)])
def test_memory_with_gaps(double: Doubles, item: str, step: int, offset: int) -> None:
    """Of any alignment; a message that is too short leaves the rest as it is."""
    @sf.parallel(n=2)
    def work() -> list[int]:
        comm, basic = sf.comm(), sf.MPI.Datatype.fromcode(item)
        count = 1000
        column = basic.Create_vector(count, 2, step).Commit()
        array = np.zeros(count * step * basic.size + offset, np.uint8)[offset:]
        values = array.view(item)
        if comm.rank == 0:
            values[:] = np.arange(len(values)) % 250
            comm.Send([array, 1, column], 1)
            comm.Send([array, 3, basic], 1)
            return []
        comm.Recv([array, 1, column], 0)
        found = [int((values[i::step] != (np.arange(len(values)) % 250)[i::step]).sum()) for i in (0, 1)]
        found += [int(values[i::step].sum()) for i in range(2, step)]
        array[:] = 77
        comm.Recv([array, 1, column], 0)
        found.append(int((array != 77).sum()) - int(np.count_nonzero(np.arange(3, dtype=item).view(np.uint8) != 77)))
        return found

    assert set(work()[1]) <= {0}


def test_a_rank_that_listens_to_one_peer_goes_on_with_others(double: Doubles) -> None:
    """The only thread of a rank waits for one peer in the kernel. Meanwhile another peer's large message needs an answer."""
    large = 8 << 20

    @sf.parallel(n=3, timeout=60)
    def work() -> tuple[int, int]:
        comm, heard = sf.comm(), 0
        hear = Transport.hear

        def counted(transport: Transport, peer: int) -> None:
            nonlocal heard
            heard += 1
            hear(transport, peer)

        Transport.hear = counted  # type: ignore[method-assign]
        if comm.rank == 2:
            comm.recv(source=0)
            comm.Send(np.ones(large, np.uint8), 0, 5)  # returns when all of it has been taken
            comm.send("taken", 1)
        elif comm.rank == 1:
            for _ in range(20):
                comm.send(comm.recv(source=0), 0)
            comm.send(comm.recv(source=2), 0)
        else:
            place = np.zeros(large, np.uint8)
            request = comm.Irecv(place, 2, 5)
            comm.send("go", 2)
            for i in range(20):
                comm.send(i, 1)
                assert comm.recv(source=1) == i
            assert comm.recv(source=1) == "taken"
            request.Wait()
            return heard, int(place.sum())
        return heard, 0

    answers = work()
    assert answers[0][1] == large
    assert answers[0][0] > 0
