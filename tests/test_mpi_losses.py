"""A rank that is lost, fails or returns is an error in every rank that waits for it, whatever it waits in; time limits."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel import MPI
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture

N = 5
VICTIM = 2


def _array(n: int = 1) -> np.ndarray[Any, Any]:
    return np.zeros(n)


def _large() -> np.ndarray[Any, Any]:
    return np.zeros(200_000)


CALLS: dict[str, Callable[[MPI.Intracomm], object]] = {
    "barrier": lambda c: c.barrier(),
    "bcast": lambda c: c.bcast("x", root=VICTIM),
    "bcast, large": lambda c: c.Bcast(_large(), root=VICTIM),
    "gather": lambda c: (c.gather(c.rank, root=0), c.barrier()),
    "scatter": lambda c: c.scatter([0] * N, root=VICTIM),
    "allgather": lambda c: c.allgather(c.rank),
    "Allgather, large": lambda c: c.Allgather(_large(), _array(N * 200_000)),
    "alltoall": lambda c: c.alltoall(list(range(N))),
    "reduce": lambda c: (c.reduce(c.rank, root=0), c.barrier()),
    "allreduce": lambda c: c.allreduce(c.rank),
    "Allreduce, large": lambda c: c.Allreduce(_large(), _large()),
    "Reduce_scatter_block": lambda c: c.Reduce_scatter_block(_array(N), _array()),
    "scan": lambda c: (c.scan(c.rank), c.barrier()),
    "Ibarrier": lambda c: c.Ibarrier().Wait(),
    "Iallreduce": lambda c: c.Iallreduce(_array(), _array()).Wait(),
    "recv": lambda c: c.recv(source=VICTIM),
    "recv from any source": lambda c: c.recv(),
    "irecv": lambda c: c.irecv(source=VICTIM).wait(),
    "probe": lambda c: c.probe(source=VICTIM),
    "ssend": lambda c: c.ssend("x", VICTIM),
    "send, large": lambda c: c.send(_large(), VICTIM),
    "split": lambda c: c.Split(0, c.rank).barrier(),
    "a communicator made before": lambda c: c.dup.barrier(),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("call", CALLS)
def test_a_killed_rank_is_named_in_all_others(double: Doubles, call: str) -> None:
    @sf.parallel(n=N, on_error="return", timeout=60)
    def work() -> tuple[int, str, float]:
        comm = sf.comm()
        comm.dup = comm.Dup()  # type: ignore[attr-defined]
        comm.barrier()
        if comm.rank == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            CALLS[call](comm)
        except sf.CloneLost as error:
            assert isinstance(error, MPI.Exception)
            return error.rank, error.cause, error.Get_error_class()
        return -1, "", 0

    answers = work()
    for rank in set(range(N)) - {VICTIM}:
        lost, cause, error_class = answers[rank]
        assert (lost, error_class) == (VICTIM, MPI.ERR_PROC_FAILED)
        assert "was lost" in cause


def test_what_a_lost_rank_sent_before_is_received(double: Doubles) -> None:
    reader, writer = os.pipe()

    @sf.parallel(n=2, on_error="return", timeout=60)
    def work() -> list[Any]:
        comm = sf.comm()
        if comm.rank:
            for i in range(3):
                comm.send(i, 0)
            os.write(writer, b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        comm.iprobe()
        os.read(reader, 1)
        received = [comm.recv(source=1) for _ in range(3)]
        with pytest.raises(sf.CloneLost):
            comm.recv(source=1)
        with pytest.raises(sf.CloneLost):
            comm.send("x", 1)
        return received

    assert work()[0] == [0, 1, 2]


@pytest.mark.parametrize("connected", [False, True])
def test_a_rank_that_has_returned_is_an_error_in_those_that_wait_for_it(double: Doubles, connected: bool) -> None:
    @sf.parallel(n=3, on_error="return", timeout=60)
    def work() -> str:
        comm = sf.comm()
        if connected:
            comm.barrier()
        if comm.rank == 1:
            return "done"
        with pytest.raises(sf.CloneLost) as caught:
            comm.recv(source=1)
        return f"{caught.value.rank} {caught.value.cause}"

    assert work() == ["1 has returned", "done", "1 has returned"]


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("call", ["recv", "probe"])
def test_when_all_others_have_returned_nothing_is_waited_for(double: Doubles, call: str, connected: bool) -> None:
    @sf.parallel(n=3, on_error="return", timeout=60)
    def work() -> str:
        comm = sf.comm()
        if connected:
            comm.barrier()
        if comm.rank:
            return "done"
        with pytest.raises(sf.CloneLost) as caught:
            getattr(comm, call)()
        return caught.value.cause

    assert work() == ["has returned", "done", "done"]


@pytest.mark.parametrize("call", ["alltoall", "Alltoall"])
def test_a_rank_that_has_returned_fails_a_call_that_also_waits_for_others(double: Doubles, call: str) -> None:
    """Rank 2 never comes to the call, and does not end before rank 0 has its error."""
    reader, writer = os.pipe()

    @sf.parallel(n=3, on_error="return", timeout=60)
    def work() -> str:
        comm = sf.comm()
        comm.barrier()
        if comm.rank == 1:
            return "done"
        if comm.rank == 2:
            os.read(reader, 1)
            return "done"
        with pytest.raises(sf.CloneLost) as caught:
            comm.alltoall([0] * 3) if call == "alltoall" else comm.Alltoall(_array(3), _array(3))
        os.write(writer, b"x")
        return f"{caught.value.rank} {caught.value.cause}"

    assert work() == ["1 has returned", "done", "done"]
    os.close(reader)
    os.close(writer)


def test_a_rank_may_return_while_others_finish_a_collective_call(double: Doubles) -> None:
    @sf.parallel(n=6, timeout=60)
    def work() -> list[int]:
        return list(sf.comm().allgather(sf.comm().rank))

    for _ in range(5):
        assert work() == [list(range(6))] * 6


def test_going_on_without_a_lost_rank(double: Doubles) -> None:
    @sf.parallel(n=4, on_error="return", timeout=60)
    def work() -> tuple[list[int], int, list[int], list[int]]:
        comm = sf.comm()
        comm.barrier()
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(MPI.Exception) as caught:
            comm.barrier()
        # Another rank may have noticed, and revoked, before this one did.
        assert caught.value.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_REVOKED)
        comm.Revoke()
        with pytest.raises(MPI.Exception) as caught:
            comm.send("x", 0)
        assert caught.value.Get_error_class() == MPI.ERR_REVOKED
        failed = MPI.COMM_WORLD.Get_failed()
        survivors = comm.Shrink()
        assert survivors.Agree(0b110 | comm.rank & 1) == 0b110
        return (failed.Translate_ranks(), survivors.size, survivors.allgather(comm.rank),
                survivors.Get_group().Translate_ranks())

    answers = work()
    for rank in (0, 2, 3):
        assert answers[rank][1:] == (3, [0, 2, 3], [0, 2, 3])


def test_revoking_wakes_those_that_wait(double: Doubles) -> None:
    @sf.parallel(n=3, timeout=60)
    def work() -> int:
        comm = sf.comm().Dup()
        if comm.rank == 0:
            for rank in (1, 2):
                comm.recv(source=rank)
            comm.Revoke()
            return MPI.ERR_REVOKED
        comm.send("here", 0)
        with pytest.raises(MPI.Exception) as caught:
            comm.recv(source=0)
        return int(caught.value.Get_error_class())

    assert work() == [MPI.ERR_REVOKED] * 3


@pytest.mark.parametrize("call", ["barrier", "Iallreduce", "persistent"])
def test_revoking_wakes_those_in_collective_calls(double: Doubles, call: str) -> None:
    calls: dict[str, Callable[[MPI.Intracomm, MPI.Prequest], object]] = {
        "barrier": lambda c, _: c.barrier(),
        "Iallreduce": lambda c, _: c.Iallreduce(_array(), _array()).Wait(),
        "persistent": lambda _, p: (p.Start(), p.Wait()),
    }

    @sf.parallel(n=3, timeout=60)
    def work() -> int:
        comm = sf.comm().Dup()
        persistent = comm.Barrier_init()
        if comm.rank == 0:
            for rank in (1, 2):
                sf.comm().recv(source=rank)
            comm.Revoke()
            return MPI.ERR_REVOKED
        sf.comm().send("here", 0)
        with pytest.raises(MPI.Exception) as caught:
            calls[call](comm, persistent)
        return int(caught.value.Get_error_class())

    assert work() == [MPI.ERR_REVOKED] * 3


def test_what_is_announced_is_fetched_before_a_rank_is_gone(double: Doubles) -> None:
    """A buffered send is complete at once, whatever its size; its rank may return before it is received."""
    @sf.parallel(n=3, timeout=60)
    def work() -> float:
        comm = sf.comm()
        comm.barrier()
        if comm.rank < 2:
            comm.Bsend(np.full(200_000, comm.rank + 1.0), 2)
            comm.Bsend(np.full(200_000, comm.rank + 1.0), 1 - comm.rank)  # never received
            return 0
        place = _large()
        total = 0.0
        for rank in (0, 1):
            comm.Recv(place, rank)
            total += place.sum()
        return total

    assert work() == [0, 0, 600_000]


@pytest.mark.parametrize("call", ["allreduce", "gather", "recv", "wait", "probe", "Ibarrier"])
def test_time_limits_name_the_missing_ranks(double: Doubles, call: str) -> None:
    reader, writer = os.pipe()

    @sf.parallel(n=3, timeout=60)
    def work() -> list[int]:
        comm = sf.comm()
        comm.barrier()
        if comm.rank == 1:
            os.read(reader, 1)
            os.read(reader, 1)
            return []
        limited: dict[str, Callable[[], object]] = {
            "allreduce": lambda: comm.allreduce(1, timeout=0.3),
            "gather": lambda: comm.gather(1, root=comm.rank, timeout=0.3) if comm.rank == 0 else comm.barrier(timeout=0.3),
            "recv": lambda: comm.recv(source=1, timeout=0.3),
            "wait": lambda: comm.irecv(source=1).wait(timeout=0.3),
            "probe": lambda: comm.probe(source=1, timeout=0.3),
            "Ibarrier": lambda: comm.Ibarrier().Wait(timeout=0.3),
        }
        with pytest.raises(sf.RegionTimeout) as caught:
            limited[call]()
        os.write(writer, b"x")
        return caught.value.missing

    first, _, third = work()
    if call == "Ibarrier":
        assert first and third  # whom it waits for, not who is the cause
    else:
        assert (first, third) == ([1], [1])
    os.close(reader)
    os.close(writer)


def test_errors_travel(double: Doubles) -> None:
    @sf.parallel(n=2, on_error="return", timeout=60)
    def work() -> None:
        if sf.comm().rank == 0:
            sf.comm().recv(source=1)

    error = work()[0]
    assert isinstance(error, sf.CloneLost)
    assert isinstance(error, MPI.Exception)
    assert error.rank == 1
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.rank, int(again)) == (str(error), 1, MPI.ERR_PROC_FAILED)


# -- receives that are given up, and ranks that leave at once ----------------------------------------------------------


def test_a_receive_that_was_given_up_leaves_its_message(double: Doubles, tmp_path: Path) -> None:
    """Also one that was matched already: the sender is busy elsewhere while its large message is asked for."""

    busy, given_up = tmp_path / "busy", tmp_path / "given-up"

    @sf.parallel(n=2, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank:
            request = comm.isend(np.full(200_000, 7.0), 0, tag=1)
            comm._core.endpoint.poll()
            comm.barrier()
            busy.touch()
            while not given_up.exists():  # no call of ours sends the message meanwhile
                time.sleep(0.01)
            request.wait()
            return None
        comm.barrier()
        while not busy.exists():  # until then, the sender's own barrier() would send the message
            time.sleep(0.01)
        with pytest.raises(sf.RegionTimeout):
            comm.recv(source=1, tag=1, timeout=0.05)
        given_up.touch()
        return float(comm.recv(source=1, tag=1).sum())

    assert work()[0] == 1_400_000.0


def test_a_receive_that_a_signal_ended_leaves_its_message(double: Doubles) -> None:
    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Alarm

    @sf.parallel(n=2, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank:
            comm.barrier()
            comm.send("late", 0)
            return None
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            comm.recv(source=1)
        comm.barrier()
        return comm.recv(source=1)

    assert work()[0] == "late"


def test_signals_during_many_receives_lose_nothing(double: Doubles) -> None:
    """A handler raises again and again, also while the rank has only just begun to wait."""
    messages = 300

    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        if frame is not None and frame.f_code.co_name == "hear":  # type: ignore[attr-defined]
            raise Alarm

    @sf.parallel(n=2, timeout=60)
    def work() -> tuple[list[int], int]:
        comm, got, interrupted = sf.comm(), [], 0
        if comm.rank:
            for number in range(messages):
                time.sleep(0.001)
                comm.send(number, 0)
            return got, 0
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        while len(got) < messages:
            try:
                got.append(comm.recv(source=1))
            except Alarm:
                interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        return got, interrupted

    got, interrupted = work()[0]
    assert got == list(range(messages))
    assert interrupted > 10


def test_who_always_waits_for_one_peer_hears_the_others_too(double: Doubles) -> None:
    @sf.parallel(n=3, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        other = comm.Dup()
        if comm.rank == 2:
            comm.recv(source=1)
            other.ssend("heard", 0)
            comm.send("stop", 1)
            return None
        if comm.rank == 1:
            rounds, stop = 0, False
            while not stop:
                comm.recv(source=0)
                rounds += 1
                if rounds == 100:
                    comm.send("now", 2)
                stop = comm.iprobe(source=2)
                comm.send(stop, 0)
            return comm.recv(source=2)
        request = other.irecv(source=2)
        stop = False
        while not stop:
            comm.send(None, 1)
            stop = comm.recv(source=1)
        return request.wait()

    assert work()[:2] == ["heard", "stop"]


def test_a_message_of_a_rank_that_returns_at_first_contact(double: Doubles) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank:
            comm.bsend("hello", 0)
            return None
        return comm.recv(source=1)

    assert work() == ["hello", None]


@pytest.mark.parametrize("way", ["ssend", "Test"])
def test_a_rank_that_has_returned_and_was_never_called_before(double: Doubles, way: str) -> None:
    """Its listener must not keep those waiting that call it later."""

    @sf.parallel(n=3, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank == 1:
            comm.send("x", 2)
            return "returned"
        if comm.rank == 2:
            return comm.recv(source=1)
        time.sleep(0.5)
        try:
            if way == "ssend":
                comm.ssend("y", 1)
            else:
                request = comm.irecv(source=1)
                while not request.Test():
                    pass
        except sf.CloneLost as error:
            return error.rank, error.cause
        return None

    assert work() == [(1, "has returned"), "returned", "x"]


def test_an_object_is_sent_as_it_was(double: Doubles) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank:
            array = np.ones(100_000)
            request = comm.isend(array, 0)
            array[:] = 2
            comm.barrier()
            request.wait()
            return None
        comm.barrier()
        return float(comm.recv(source=1).sum())

    assert work()[0] == 100_000.0
