"""A test double of the supervisor: `sfparallel.runtime.local` without its own supervisor, and with what a test wants to decide.

Good for fast tests of a region's logic, and for nothing else: its "clones" share the host's kernel, files and network.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

from sfparallel.errors import CapacityError
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Answer, Grant, Lost
from sfparallel.runtime.local import LocalJob, LocalLine, address_of
from sfparallel.runtime.local_seed import Seed


class ForkDouble(LocalLine):
    """One line to the double: it has two hosts, room for `capacity` clones, and a console."""

    def __init__(self, job: LocalJob, capacity: int = 64) -> None:
        super().__init__(job)
        self.capacity = capacity
        self.reports: list[tuple[float, float]] = []

    def request_ticket(self, n: int) -> Grant:
        if not self.capacity:
            raise CapacityError("no clone fits", fits=0)
        return super().request_ticket(min(n, self.capacity))

    def host_of(self, rank: int) -> str:
        return f"host{rank % 2}"

    def report(self, ticket: int, first_s: float, last_s: float) -> None:
        self.reports.append((first_s, last_s))

    def events(self) -> list[Lost | Answer]:
        return [dataclasses.replace(event, console="last words") if isinstance(event, Lost) else event
                for event in super().events()]


def start_afresh() -> None:
    """Put the runtime into the state of a program that has just started, in the ZeroMQ context that there is."""
    context = HERE._context
    HERE.__init__()  # type: ignore[misc]
    HERE._context = context


class Doubles:
    """All lines of one test, and how new ones shall be.

    Attributes:
        capacity: see `ForkDouble`.
        default_n, seed: as if given to `sfrun`.
    """

    def __init__(self, answer_bytes: int) -> None:
        self.answer_bytes = answer_bytes
        self.capacity = 64
        self.default_n: int | None = None
        self.seed: int | None = None
        self.lines: list[ForkDouble] = []
        self.seeds: dict[int, Seed | None] = {}

    def connect(self) -> ForkDouble:
        job = LocalJob(address_of(os.getpid()), name="double", default_n=self.default_n, seed=self.seed,
                       answer_bytes=self.answer_bytes, shares_files=False, seeds=self.seeds)
        line = ForkDouble(job, self.capacity)
        self.lines.append(line)
        return line

    @property
    def alive(self) -> int:
        return sum(line.alive for line in self.lines)


@pytest.fixture(name="double", params=[0, 64 << 10], ids=["network", "relayed"])
def double_fixture(request: pytest.FixtureRequest) -> Iterator[Doubles]:
    """The runtime as in a parent VM, on the double: once with all answers over the network, once with small ones handed over at
    exit. Afterwards no clone is left."""
    start_afresh()
    doubles = Doubles(request.param)
    HERE.connect = doubles.connect
    pid = os.getpid()
    yield doubles
    if os.getpid() != pid:
        os._exit(99)  # a clone escaped from its region: the test fails as lost, but the rest of the suite does not run twice
    alive = doubles.alive
    for line in doubles.lines:
        line.close()
    start_afresh()
    assert not alive, f"{alive} clones were left"
