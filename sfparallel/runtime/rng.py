"""Random streams: one per rank, or per item of a map, all from one seed (numpy's SeedSequence, which is made for this:
https://numpy.org/doc/stable/reference/random/parallel.html)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfparallel.runtime.here import HERE

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Streams:
    """A family of streams: those of one region, or the single one of a VM outside any region.

    Attributes:
        entropy: the seed.
        path: place of this family below the seed; None: that of the fork that made the clone which asks. (Threads may make
            several regions at the same time, and only their forks are numbered one after the other.)
    """

    entropy: int
    path: tuple[int, ...] | None = ()
    _generators: dict[int | None, np.random.Generator] = field(default_factory=dict, repr=False)

    def generator(self, key: int | None) -> np.random.Generator:
        """The generator of `key`: from `SeedSequence(seed).spawn(n)[key]`, for every n > key. The same object every time it is
        asked for, because a second one would repeat the first one's numbers."""
        if key not in self._generators:
            # numpy is imported by whoever wants random numbers, not by every program.
            import numpy as np
            family = HERE.fork_path if self.path is None else self.path
            path = family if key is None else (*family, key)
            made = np.random.default_rng(np.random.SeedSequence(self.entropy, spawn_key=path))
            return self._generators.setdefault(key, made)  # another thread may have been first
        return self._generators[key]

    def forget(self, key: int) -> None:
        """Nobody will ask for this one again."""
        self._generators.pop(key, None)


def _fresh() -> int:
    """A seed that nobody else has. (`secrets` imports `random`, and a program may have a module of its own of that name.)"""
    return int.from_bytes(os.urandom(16), "little")


def region_streams(seed: int | None, job_seed: int | None) -> Streams:
    """Streams of the region that is forked next: from its own seed, else a branch of the job's, else from fresh entropy."""
    if seed is not None:
        return Streams(seed)
    if job_seed is not None:
        return Streams(job_seed, None)
    return Streams(_fresh())


def rng() -> np.random.Generator:
    """The random generator of this rank or, in a map, of the current item. Its numbers depend only on the seed and on the rank
    (or item index), so a map gives the same results for every n. Outside a region, it is the VM's own generator.

    Raises:
        OutsideVMError: this is not a VM of sfparallel.
    """
    membership = HERE.membership
    if membership is not None:
        return membership.streams.generator(membership.key)
    if HERE.own_streams is None:
        seed = HERE.require_vm().seed
        streams = Streams(_fresh()) if seed is None else Streams(seed, HERE.seed_path)
        with HERE.first_use:
            HERE.own_streams = HERE.own_streams or streams
    return HERE.own_streams.generator(None)
