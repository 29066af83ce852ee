"""Several threads of one rank in calls of MPI at the same time: none waits for what another one holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel import MPI
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start it; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(30)
        assert results, "the thread still waits, or it failed"
        return results[0]

    return join


def waits(comm: MPI.Intracomm) -> None:
    """Return when a thread of this rank has begun to wait."""
    endpoint = comm._core.endpoint
    while not (endpoint._polling or endpoint._sleeping):
        pass


def test_a_synchronous_send_to_oneself(double: Doubles) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        sent = in_thread(lambda: comm.ssend("x", comm.rank) or True)
        waits(comm)
        received = comm.recv(source=comm.rank)
        return sent() and received

    assert work() == ["x", "x"]


@pytest.mark.parametrize("probe", ["Mprobe", "Probe", "recv"])
def test_others_can_send_while_one_waits_for_a_message(double: Doubles, probe: str) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> Any:
        comm = sf.comm()
        if comm.rank:
            comm.send(comm.recv(source=0, tag=1), 0, tag=2)
            return None
        if probe == "Mprobe":
            waiting = in_thread(lambda: comm.Mprobe(1, 2).recv())
        elif probe == "Probe":
            waiting = in_thread(lambda: comm.Probe(1, 2) and comm.recv(source=1, tag=2))
        else:
            waiting = in_thread(lambda: comm.recv(source=1, tag=2))
        waits(comm)
        sender = in_thread(lambda: comm.send("there and back", 1, tag=1) or True)
        return sender() and waiting()

    assert work()[0] == "there and back"


def test_a_matched_probe_never_takes_what_another_has_taken(double: Doubles) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> list[int]:
        comm = sf.comm()
        if comm.rank:
            for i in range(60):
                comm.send(i, 0)
            return []
        takers = [in_thread(lambda: [comm.Mprobe(1).recv() for _ in range(20)]) for _ in range(3)]
        return sorted(each for taker in takers for each in taker())

    assert work()[0] == list(range(60))


def test_a_cancelled_receive_ends_the_wait_for_it(double: Doubles) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> bool:
        comm = sf.comm()
        request = comm.Irecv(np.zeros(1), 1 - comm.rank)
        status = MPI.Status()
        waiting = in_thread(lambda: request.Wait(status))
        waits(comm)
        request.Cancel()
        ended: bool = waiting()
        comm.barrier()
        return ended and status.Is_cancelled()

    assert work() == [True, True]


def test_the_first_use_in_many_threads(double: Doubles) -> None:
    @sf.parallel(n=2, timeout=60)
    def work() -> tuple[int, int]:
        start = threading.Barrier(8)

        def use(number: int) -> Any:
            start.wait()
            comm = MPI.COMM_WORLD
            comm.send(number, 1 - comm.rank, tag=number)
            return comm.recv(source=1 - comm.rank, tag=number), id(comm._core.endpoint)

        users = [in_thread(lambda number=number: use(number)) for number in range(8)]  # type: ignore[misc]
        results = [user() for user in users]
        return sum(number for number, _ in results), len({endpoint for _, endpoint in results})

    assert work() == [(28, 1), (28, 1)]
