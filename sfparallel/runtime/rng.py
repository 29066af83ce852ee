"""Random streams: one per rank, or per item of a map, all from one seed (numpy's SeedSequence, which is made for this:
https://numpy.org/doc/stable/reference/random/parallel.html)."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfparallel.runtime.here import HERE

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Streams:
    """The streams of one region, or of the parent.

    Attributes:
        entropy: the seed.
        path: place of this family below the seed.
    """

    entropy: int
    path: tuple[int, ...] = ()
    _generators: dict[int | None, np.random.Generator] = field(default_factory=dict, repr=False)

    def generator(self, key: int | None) -> np.random.Generator:
        """The generator of `key`: `SeedSequence(seed).spawn(n)[key]` for every n > key. The same object every time it is asked for,
        because a second one would repeat the first one's numbers."""
        if key not in self._generators:
            import numpy as np
            path = self.path if key is None else (*self.path, key)
            self._generators[key] = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.entropy, spawn_key=path)))
        return self._generators[key]


class JobSeed:
    """Seeds of regions that were given none, and the parent's own stream."""

    def __init__(self) -> None:
        self._regions = itertools.count()
        self._own: Streams | None = None

    def streams(self, seed: int | None, job_seed: int | None) -> Streams:
        """Streams of a new region: from its own seed, else from the job's (every region a different branch of it), else fresh."""
        if seed is not None:
            return Streams(seed)
        if job_seed is not None:
            return Streams(job_seed, (next(self._regions),))
        return Streams(secrets.randbits(128))

    def own(self, job_seed: int | None) -> Streams:
        """The parent's stream."""
        if self._own is None:
            self._own = Streams(secrets.randbits(128) if job_seed is None else job_seed)
        return self._own


JOB_SEED = JobSeed()


def rng() -> np.random.Generator:
    """The random generator of this rank, or of the current item in a map: its numbers depend on the seed and on the rank (or item
    index) only, so that a map gives the same results for every n. Outside a region: the parent's own.

    Raises:
        OutsideVMError: this is not a VM of sfparallel.
    """
    membership = HERE.membership
    if membership is not None:
        return membership.streams.generator(membership.key)
    return JOB_SEED.own(HERE.require_vm().seed).generator(None)
