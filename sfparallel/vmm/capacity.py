"""How many clones the host can hold: decided before cloning, from what earlier clones needed."""

from __future__ import annotations

from collections.abc import Sequence

from sfparallel.config import CLONE_MEMORY, parse_size
from sfparallel.errors import CapacityError
from sfparallel.net.addresses import HIGHEST_NUMBER
from sfparallel.vmm.machine import MachineSpec

_RESERVE_BYTES = 256 << 20
"""Left to the host whatever is asked for."""

_WARM_SHELL_BYTES = 6 << 20
"""What a shell that waits in the pool has taken already, beside the memory for translated code (measured)."""


def available_bytes() -> int:
    """Memory that programs can still have without swapping (MemAvailable, proc(5))."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


class Capacity:
    """Admission of clones by memory."""

    def __init__(self, spec: MachineSpec) -> None:
        self._clone_bytes = parse_size(CLONE_MEMORY.get())
        self._memory_bytes = spec.memory_bytes
        self._warm_bytes = _WARM_SHELL_BYTES + spec.code_bytes

    @property
    def clone_bytes(self) -> int:
        """Private memory that is assumed per clone."""
        return self._clone_bytes

    def learn(self, samples: Sequence[int]) -> None:
        """Clones that are gone had made this much memory of their own (not: had mapped pages of layers that nobody else had)."""
        if samples:
            self._clone_bytes = max(self._clone_bytes, max(samples))

    def grant(self, n: int, *, running: int, warm: int) -> int:
        """The number of clones, at most n, that may be made now.

        Raises:
            CapacityError: not a single one.
        """
        free = available_bytes() - _RESERVE_BYTES
        fits = 0
        if free > 0:
            # Shells in the pool have taken a part of their memory already.
            saved = min(warm, n) * self._warm_bytes
            fits = (free + saved) // self._clone_bytes
        fits = max(0, min(fits, HIGHEST_NUMBER - running))
        if not fits:
            raise CapacityError(
                f"no clone fits on this host: {max(free, 0) >> 20} MiB are free, "
                f"{self._clone_bytes >> 20} MiB are assumed per clone",
                fits=0,
                hint="free memory on the host, or set SF_CLONE_MEMORY if clones need less",
            )
        return min(n, fits)
