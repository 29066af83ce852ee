"""The measurements: the same calls on any library that has mpi4py's names. Runs in guests, so it imports nothing of this project.

As a program (python measure.py SPECIFICATION) it measures mpi4py, and rank 0 prints the rows as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

WARM_UP, LARGE_WARM_UP, LARGE_BYTES = 60, 5, 256 << 10
"""Calls before the measurement: an emulated processor meets each path for the first time, and Python adapts its code to it."""

MANY, MANY_WARM_UP, MOST_BYTES = 8, 15, 8 << 20
"""So many ranks take long for each call: they warm up less, and leave out what would be more bytes in all."""

FEWEST, MOST = 7, 400
"""Repetitions: as many as fit into the time given, within these bounds."""

Row = dict[str, Any]


def warm_up(size: int, ranks: int) -> int:
    if size >= LARGE_BYTES:
        return LARGE_WARM_UP
    return WARM_UP if ranks < MANY else MANY_WARM_UP


Call = Callable[[int], object]
"""Of one argument: the other rank."""


def ping_pong(comm: Any, there: Call, back: Call, size: int, budget_s: float) -> list[float]:
    """Half the time of each round trip between ranks 0 and 1, in seconds; empty elsewhere."""
    if comm.rank > 1:
        return []
    steps = (there, back) if comm.rank == 0 else (back, there)
    times: list[float] = []
    for count in (warm_up(size, comm.size), 0):
        if not count:
            # How many fit is what rank 0 has seen.
            count = max(FEWEST, min(MOST, int(budget_s / (2 * statistics.median(times))))) if comm.rank == 0 else 0
            count = comm.sendrecv(count, 1 - comm.rank, 99, None, 1 - comm.rank, 99) or count
            times = []
        for _ in range(count):
            begin = time.perf_counter()
            for step in steps:
                step(1 - comm.rank)
            times.append((time.perf_counter() - begin) / 2)
    return times if comm.rank == 0 else []


def together(comm: Any, call: Callable[[], object], size: int, budget_s: float) -> list[float]:
    """Seconds of each call until the last rank has finished it; all begin together, as far as a barrier does that."""
    times: list[float] = []
    for count in (warm_up(size, comm.size), 0):
        if not count:
            count = comm.bcast(max(FEWEST, min(MOST, int(budget_s / statistics.median(times)))), 0)
            times = []
        for _ in range(count):
            comm.barrier()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    everybody = comm.gather(times, 0)
    return [max(each) for each in zip(*everybody, strict=True)] if comm.rank == 0 else []


def point_to_point(comm: Any, sizes: list[int], budget_s: float) -> Iterator[Row]:
    """Messages between ranks 0 and 1: pickled bytes, pickled arrays, and buffers."""
    for size in sizes:
        array, place = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        for name, obj in (("send, bytes", bytes(size)), ("send, array", array)):
            times = ping_pong(comm, partial(comm.send, obj), lambda peer: comm.recv(source=peer), size, budget_s)
            yield row(name, size, 2, times)
        yield row("Send", size, 2, ping_pong(comm, partial(comm.Send, array), partial(comm.Recv, place), size, budget_s))


def collective(comm: Any, sizes: list[int], budget_s: float) -> Iterator[Row]:
    """Calls of all ranks: on a small object, and on buffers."""
    yield row("barrier", 0, comm.size, together(comm, comm.barrier, 8, budget_s))
    yield row("bcast", 8, comm.size, together(comm, partial(comm.bcast, 12345), 8, budget_s))
    yield row("allreduce", 8, comm.size, together(comm, partial(comm.allreduce, 12345), 8, budget_s))
    for size in (size for size in sizes if size * comm.size <= MOST_BYTES):
        array, place = np.zeros(size // 8), np.zeros(size // 8)
        yield row("Bcast", size, comm.size, together(comm, partial(comm.Bcast, array), size, budget_s))
        yield row("Allreduce", size, comm.size, together(comm, partial(comm.Allreduce, array, place), size, budget_s))


def row(call: str, size: int, n: int, times: list[float]) -> Row:
    if not times:
        return {}
    return {"call": call, "bytes": size, "n": n, "repeats": len(times), "median_us": round(statistics.median(times) * 1e6, 1),
            "least_us": round(min(times) * 1e6, 1)}  # fmt: skip


def measure(comm: Any, specification: dict[str, Any]) -> list[Row]:
    """All rows at rank 0; others get empty ones."""
    budget_s = specification["budget_s"]
    rows: list[Row] = []
    if comm.size == 2:
        rows += point_to_point(comm, specification["message_bytes"], budget_s)
    rows += collective(comm, specification["collective_bytes"], budget_s)
    return rows if comm.rank == 0 else []


def main() -> None:
    from mpi4py import MPI

    comm: Any = MPI.COMM_WORLD
    rows = measure(comm, json.loads(sys.argv[1]))
    if comm.rank == 0:
        print(json.dumps({"library": MPI.Get_library_version(), "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
