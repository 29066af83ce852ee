"""Random numbers where threads share them: no two regions, and no two threads, get the same ones."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Fork, Grant
from sfparallel.runtime.local import LocalJob, address_of
from tests.fork_double import Doubles, ForkDouble, double_fixture  # noqa: F401

WAIT_S = 60.0


class Together(ForkDouble):
    """A line on which two regions of the parent are made step by step at the same time."""

    barrier: threading.Barrier | None = None

    def request_ticket(self, n: int) -> Grant:
        if self.barrier is not None and not HERE.rank:
            self.barrier.wait(WAIT_S)
        return super().request_ticket(n)

    def clone(self, ticket: int, clones: int, context: bytes, within_s: float | None = None) -> Fork:
        if self.barrier is not None and not HERE.rank:
            self.barrier.wait(WAIT_S)
        return super().clone(ticket, clones, context, within_s)


def test_regions_that_begin_at_the_same_time_have_numbers_of_their_own(double: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> Together:
        line = Together(LocalJob(address_of(os.getpid()), seed=5, shares_files=False))
        double.lines.append(line)
        return line

    HERE.connect = connect
    draw = sf.parallel(n=1)(lambda: float(sf.rng().random()))

    def both() -> list[float]:
        return [float(sf.rng().random()), *draw()]

    monkeypatch.setattr(Together, "barrier", threading.Barrier(2))
    found: list[list[float]] = []
    threads = [threading.Thread(target=lambda: found.extend(sf.parallel(n=2)(both)())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [number for each in found for number in each]
    assert len(numbers) == 8 and len(set(numbers)) == 8


def in_two_threads(double: Doubles) -> list[float]:
    """What two threads draw that ask for the generator at the same time."""
    barrier, make = threading.Barrier(2), np.random.default_rng
    drawn: list[float] = []

    def slowly(seed: Any) -> Any:
        barrier.wait(WAIT_S)
        return make(seed)

    np.random.default_rng = slowly  # type: ignore[assignment]
    try:
        threads = [threading.Thread(target=lambda: drawn.append(float(sf.rng().random()))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        np.random.default_rng = make
    return drawn


def test_threads_share_the_generator_of_their_rank(double: Doubles) -> None:
    first, second = sf.parallel(n=1, seed=3)(lambda: in_two_threads(double))()[0]
    assert first != second


def test_threads_share_the_generator_of_their_vm(double: Doubles) -> None:
    double.seed = 3
    first, second = in_two_threads(double)
    assert first != second
