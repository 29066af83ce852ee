"""The parts of the benchmark: each is a generator of (point, sample).

It goes round over all of its points: what changes on the machine in the meantime meets them alike. It asks before each sample
whether that is still wanted, so that it can be gone on with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from benchmarks.fork.results import Point, Sample
from benchmarks.fork.session import Session, measured
from sfparallel.vmm.capacity import available_bytes

PLAIN = "benchmarks.fork.plain"
FULL_COPY_BYTES = 260 << 20
"""Reckoned for a VM that shares nothing: its QEMU, and what the guest has in memory after its boot."""


@dataclass(frozen=True)
class Scale:
    """How much to measure.

    Attributes:
        repeat: samples of each point.
        counts: numbers of clones; the alternatives are measured at those of them that are named below.
        boots: numbers of VMs that are booted at the same time.
        boot_repeat: samples of each of these: they take longest.
        boot_limit_s: for one sample of them.
        restores: numbers of restores of a full save.
        processes: numbers of processes in one guest.
        dirty_mib: memory that the parent writes before a fork.
        holds_gib: memory that a parent holds, of which it writes `fixed_dirty_mib`.
        touched_mib: memory of the parent's that a clone touches.
        forks: forks in a row.
    """

    name: str
    repeat: int
    counts: tuple[int, ...]
    boots: tuple[int, ...]
    boot_repeat: int
    boot_limit_s: float
    restores: tuple[int, ...]
    processes: tuple[int, ...]
    dirty_mib: tuple[float, ...]
    holds_gib: tuple[float, ...]
    fixed_dirty_mib: float
    hold_memory_mib: int
    touched_mib: tuple[float, ...]
    toucher: int
    forks: int
    forked: int


COUNTS = (1, 2, 4, 8, 16, 32, 64)

FULL = Scale(
    name="full", repeat=5, counts=COUNTS, boots=(1, 2, 4, 8), boot_repeat=3, boot_limit_s=150.0, restores=(1, 2, 4, 8, 16, 32),
    processes=COUNTS, dirty_mib=(0, 1, 4, 16, 64, 256, 1024), holds_gib=(0.2, 1, 3), fixed_dirty_mib=16, hold_memory_mib=4096,
    touched_mib=(0, 1, 4, 16, 64, 256), toucher=4, forks=200, forked=2,
)  # fmt: skip
QUICK = Scale(
    name="quick", repeat=2, counts=(1, 2), boots=(1,), boot_repeat=1, boot_limit_s=300.0, restores=(1, 2), processes=(1, 2),
    dirty_mib=(0, 8), holds_gib=(0.05, 0.1), fixed_dirty_mib=2, hold_memory_mib=1024, touched_mib=(0, 8), toucher=2, forks=4,
    forked=2,
)  # fmt: skip

Wanted = Callable[[Point], bool]
Measured = Generator[tuple[Point, Sample], None, None]


class LeftOut(Exception):
    """A point that cannot be measured here, or not in reasonable time; the message says why."""

    def __init__(self, point: Point, reason: str) -> None:
        super().__init__(reason)
        self.point = point
        self.reason = reason


def _rounds(points: list[Point], repeat: int, wanted: Wanted) -> Iterator[Point]:
    for _ in range(repeat):
        yield from (point for point in points if wanted(point))


def clones_points(scale: Scale) -> list[Point]:
    return [{"n": n} for n in scale.counts]


def clones(scale: Scale, wanted: Wanted) -> Measured:
    """Forks of n clones with a warm pool; each answers with its rank."""
    with Session(pool=max(scale.counts)) as job:
        job.fork(n=2)  # a program's first fork runs much for the first time
        for point in _rounds(clones_points(scale), scale.repeat, wanted):
            yield point, job.fork(n=point["n"])


def boot_points(scale: Scale) -> list[Point]:
    return [{"n": n} for n in scale.counts if n in scale.boots]


def boot(scale: Scale, wanted: Wanted) -> Measured:
    """Cold boots of n VMs at the same time, each up to the answer of a program."""
    for point in _rounds(boot_points(scale), scale.boot_repeat, wanted):
        try:
            yield point, measured(PLAIN, "boot", str(point["n"]), timeout_s=scale.boot_limit_s)
        except TimeoutError as error:
            raise LeftOut(point, str(error)) from None


def classic_points(scale: Scale) -> list[Point]:
    return [{"n": n} for n in scale.counts if n in scale.restores]


def classic(scale: Scale, wanted: Wanted) -> Measured:
    """The whole state of a parent saved to a file, and n VMs restored from it; each answers with its rank."""
    for point in _rounds(classic_points(scale), scale.repeat, wanted):
        if point["n"] * FULL_COPY_BYTES > available_bytes() * 3 // 4:
            raise LeftOut(point, f"{point['n']} full copies do not fit into {available_bytes() >> 20} MiB of free memory")
        yield point, measured(PLAIN, "classic", str(point["n"]), timeout_s=scale.boot_limit_s)


WAYS = ("os.fork", "multiprocessing")


def floor_points(scale: Scale) -> list[Point]:
    return [{"way": way, "n": n} for way in WAYS for n in scale.processes]


def floor(scale: Scale, wanted: Wanted) -> Measured:
    """Processes in one guest with all of the host's processors; each answers with its rank."""
    with Session(cpus=len(os.sched_getaffinity(0))) as job:
        for way in WAYS:
            job.ask(way, n=1)
        for point in _rounds(floor_points(scale), scale.repeat, wanted):
            yield point, job.ask(point["way"], n=point["n"])


def pause_points(scale: Scale) -> list[Point]:
    return [{"earlier": earlier, "dirty_mib": mib} for earlier in ("gone", "kept") for mib in scale.dirty_mib]


def pause(scale: Scale, wanted: Wanted) -> Measured:
    """Forks of one clone after the parent has written so much memory.

    With no earlier state alive the pages are stored in place; with one that is kept they go to a layer that is new each time.
    """
    most = max(scale.dirty_mib)
    for earlier in ("gone", "kept"):
        points = [point for point in pause_points(scale) if point["earlier"] == earlier]
        if not any(map(wanted, points)):
            continue
        # A job for each: layers that were made for a checkpoint stay when it is gone, and pages go to the newest.
        with Session(memory_mib=768 + int(most), pool=1) as job:
            job.ask("hold", name="buffer", mib=most)
            job.fork(n=1)
            for point in _rounds(points, scale.repeat, wanted):
                if earlier == "kept":
                    job.ask("keep")
                yield point, job.fork(n=1, dirty_mib=point["dirty_mib"])
                if earlier == "kept":
                    job.ask("drop")


def parent_points(scale: Scale) -> list[Point]:
    return [{"holds_gib": gib} for gib in scale.holds_gib]


def parent(scale: Scale, wanted: Wanted) -> Measured:
    """Forks of one clone by parents that hold more or less memory, and have written equally much of it."""
    for point in parent_points(scale):
        if not wanted(point):
            continue
        with Session(memory_mib=scale.hold_memory_mib, pool=1) as job:
            job.ask("hold", name="held", mib=point["holds_gib"] * 1024)
            job.ask("hold", name="buffer", mib=scale.fixed_dirty_mib)
            for _ in range(2):
                job.fork(n=1, dirty_mib=scale.fixed_dirty_mib)
            while wanted(point):
                yield point, job.fork(n=1, dirty_mib=scale.fixed_dirty_mib)


def private_points(scale: Scale) -> list[Point]:
    return [{"access": access, "touched_mib": mib} for access in ("write", "read") for mib in scale.touched_mib]


def private(scale: Scale, wanted: Wanted) -> Measured:
    """Forks whose clones write to, or only read, so much of the parent's memory."""
    with Session(pool=scale.toucher) as job:
        job.ask("hold", name="buffer", mib=max(scale.touched_mib))
        job.fork(n=scale.toucher)
        for point in _rounds(private_points(scale), scale.repeat, wanted):
            yield point, job.fork(n=scale.toucher, touched_mib=point["touched_mib"], access=point["access"])


def drift_points(scale: Scale) -> list[Point]:
    return [{"n": scale.forked}]


def drift(scale: Scale, wanted: Wanted) -> Measured:
    """Forks in a row, one after the other as fast as a program can call them."""
    point = drift_points(scale)[0]
    with Session(pool=scale.forked) as job:
        for _ in range(scale.forks):
            if not wanted(point):
                return
            answer = job.ask("fork", n=scale.forked)
            yield point, {**job.report(), **answer}


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        says: what it measures, in a few words.
        points: all of its points.
        samples: how many of each.
        measure: takes them.
        whole: it means nothing unless it was measured in one go.
    """

    says: str
    points: Callable[[Scale], list[Point]]
    samples: Callable[[Scale], int]
    measure: Callable[[Scale, Wanted], Measured]
    whole: bool = False


def _repeat(scale: Scale) -> int:
    return scale.repeat


PARTS = {
    "clones": Part("forks of n clones", clones_points, _repeat, clones),
    "boot": Part("cold boots of n VMs", boot_points, lambda scale: scale.boot_repeat, boot),
    "classic": Part("full save, n restores", classic_points, _repeat, classic),
    "floor": Part("processes in one guest", floor_points, _repeat, floor),
    "pause": Part("pause by dirtied memory", pause_points, _repeat, pause),
    "parent": Part("pause by size of the parent", parent_points, lambda scale: 2 * scale.repeat, parent),
    "private": Part("private memory of clones", private_points, lambda scale: min(3, scale.repeat), private),
    "drift": Part("forks in a row", drift_points, lambda scale: scale.forks, drift, whole=True),
}
