"""kill -9 of a rank's QEMU while all ranks are in a collective call: every other rank gets an error that names it.

One fork serves many kills: the ranks that are left make a communicator of their own (`Shrink`), and go on with the next call.
"""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import Sfrun, machines_of

pytestmark = pytest.mark.needs("qemu", "image", "root")

PROGRAM = """
import sys
import numpy as np
import sfparallel as sf

LARGE = 50_000

def new(n):
    return np.zeros(n)

def counts(c):
    return [1] * c.size, list(range(c.size))

def parts(c):
    return [new(c.size), counts(c), "d"]

CALLS = {
    "barrier": lambda c: c.barrier(),
    "bcast": lambda c: c.bcast("x"),
    "scatter": lambda c: c.scatter(list(range(c.size))),
    "gather": lambda c: c.gather(c.rank),
    "allgather": lambda c: c.allgather(c.rank),
    "alltoall": lambda c: c.alltoall(list(range(c.size))),
    "reduce": lambda c: c.reduce(c.rank),
    "allreduce": lambda c: c.allreduce(c.rank),
    "scan": lambda c: c.scan(c.rank),
    "exscan": lambda c: c.exscan(c.rank),
    "Bcast": lambda c: c.Bcast(new(LARGE)),
    "Scatterv": lambda c: c.Scatterv(parts(c), new(1)),
    "Gatherv": lambda c: c.Gatherv(new(1), parts(c)),
    "Allgather": lambda c: c.Allgather(new(LARGE // c.size), new(LARGE // c.size * c.size)),
    "Allgatherv": lambda c: c.Allgatherv(new(1), parts(c)),
    "Alltoall": lambda c: c.Alltoall(new(c.size * 20_000), new(c.size * 20_000)),
    "Alltoallv": lambda c: c.Alltoallv(parts(c), parts(c)),
    "Reduce": lambda c: c.Reduce(new(10), new(10)),
    "Allreduce": lambda c: c.Allreduce(new(LARGE), new(LARGE)),
    "Reduce_scatter": lambda c: c.Reduce_scatter(new(c.size), new(1), [1] * c.size),
    "Reduce_scatter_block": lambda c: c.Reduce_scatter_block(new(c.size * 10_000), new(10_000)),
    "Scan": lambda c: c.Scan(new(10), new(10)),
    "Exscan": lambda c: c.Exscan(new(10), new(10)),
    "Ibarrier": lambda c: c.Ibarrier().Wait(),
    "Ibcast": lambda c: c.Ibcast(new(LARGE)).Wait(),
    "Iscatterv": lambda c: c.Iscatterv(parts(c), new(1)).Wait(),
    "Igatherv": lambda c: c.Igatherv(new(1), parts(c)).Wait(),
    "Iallgather": lambda c: c.Iallgather(new(1), new(c.size)).Wait(),
    "Ialltoallv": lambda c: c.Ialltoallv(parts(c), parts(c)).Wait(),
    "Ireduce": lambda c: c.Ireduce(new(10), new(10)).Wait(),
    "Iallreduce": lambda c: c.Iallreduce(new(10), new(10)).Wait(),
    "Ireduce_scatter": lambda c: c.Ireduce_scatter(new(c.size), new(1), [1] * c.size).Wait(),
    "Iscan": lambda c: c.Iscan(new(10), new(10)).Wait(),
    "Iexscan": lambda c: c.Iexscan(new(10), new(10)).Wait(),
}

@sf.parallel(n=len(sys.argv) + 1, on_error="return", timeout=400)
def work():
    comm, named = sf.comm(), []
    for name in sys.argv[1:]:
        comm.barrier()
        print("ready", name, flush=True)
        try:
            while True:
                CALLS[name](comm)
        except sf.CloneLost as error:
            print("lost", name, error.rank, flush=True)
            named.append(error.rank)
        comm = comm.Shrink()
    return comm.allgather(named)

for answer in work():
    print("answer", answer.cause if isinstance(answer, sf.CloneLost) else answer)
"""

ON_OBJECTS = ["barrier", "bcast", "scatter", "gather", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"]
ON_BUFFERS = ["Bcast", "Scatterv", "Gatherv", "Allgather", "Allgatherv", "Alltoall", "Alltoallv", "Reduce", "Allreduce",
              "Reduce_scatter", "Reduce_scatter_block", "Scan", "Exscan"]  # fmt: skip
AS_REQUESTS = ["Ibarrier", "Ibcast", "Iscatterv", "Igatherv", "Iallgather", "Ialltoallv", "Ireduce", "Iallreduce",
               "Ireduce_scatter", "Iscan", "Iexscan"]  # fmt: skip

HANG_S = 100.0
"""A limit that only a hang exceeds. (What is promised, and measured by `python -m tests.test_mpi_kill`, is 2 s.)"""


class Lines:
    """What a program prints, line by line, and when."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self._process = process
        self._seen: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put((time.monotonic(), line))

    def next(self, pattern: str, count: int) -> list[tuple[float, int, str]]:
        """The next `count` lines of a kind, whatever other ranks have printed before them: when each came, the rank before it,
        and what the pattern's group found."""
        found: list[tuple[float, int, str]] = []
        others, self._seen = self._seen, []
        while len(found) < count:
            when, line = others.pop(0) if others else self._lines.get(timeout=HANG_S)
            if match := re.fullmatch(rf"(?:\[(\d+)\] )?{pattern}\n", line):
                found.append((when, int(match[1] or -1), match[2]))
            else:
                self._seen.append((when, line))
        self._seen += others
        return found


def kill_in_each(sfrun: Sfrun, calls: list[str]) -> dict[str, list[float]]:
    """Kill one rank in each call; seconds until each of the others had told of its error."""
    process = sfrun.start(PROGRAM, "--pool", "0", args=tuple(calls))
    lines = Lines(process)
    alive = len(calls) + 2
    clones: list[int] = []
    killed: list[int] = []
    delays: dict[str, list[float]] = {}
    for call in calls:
        lines.next(f"(ready) {call}", alive)
        clones = clones or machines_of(process.pid)[1 : alive + 1]
        victim = clones.pop(random.randrange(alive))
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        alive -= 1
        told = lines.next(rf"lost {call} (\d+)", alive)
        delays[call] = [when - start for when, _, _ in told]
        (lost,) = {int(rank) for _, _, rank in told}
        assert lost not in {teller for _, teller, _ in told} and lost not in killed
        killed.append(lost)
    answers = [text for _, _, text in lines.next("answer (.*)", len(calls) + 2)]
    assert process.wait(HANG_S) == 0
    for rank, answer in enumerate(answers):
        assert "SIGKILL" in answer if rank in killed else answer == str([killed] * 2), answer
    return delays


KINDS = {"objects": ON_OBJECTS, "buffers": ON_BUFFERS, "requests": AS_REQUESTS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_dies_in_a_collective_call_is_named_in_all_others(sfrun: Sfrun, kind: str) -> None:
    kill_in_each(sfrun, KINDS[kind])


def main() -> None:
    """Print how long it takes until the others have told, for the kinds that are named, or for all."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        sfrun = Sfrun(Path(folder))
        try:
            for kind in sys.argv[1:] or KINDS:
                for call, delays in kill_in_each(sfrun, KINDS[kind]).items():
                    print(f"{call:22}{len(delays):3} ranks told after {min(delays):5.2f} to {max(delays):5.2f} s", flush=True)
        finally:
            sfrun.close()


if __name__ == "__main__":
    sys.exit(main())
