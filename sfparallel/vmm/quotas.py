"""How much a VM may have under way with the supervisor: each is memory of the host, given for a few bytes from a guest."""

from __future__ import annotations

from sfparallel.errors import StateError
from sfparallel.vmm.vm import Vm

MOST_REQUESTS = 1024
MOST_REQUEST_BYTES = 1 << 20
MOST_TICKETS = 16384
MOST_CHECKPOINTS = 256


class Pending:
    """Requests of VMs that have no answer yet."""

    def __init__(self) -> None:
        self._pending: dict[Vm, tuple[int, int]] = {}

    def begin(self, vm: Vm, size: int) -> bool:
        """Count one of so many bytes; False if the VM has too many under way."""
        count, total = self._pending.get(vm, (0, 0))
        if count >= MOST_REQUESTS or (count and total + size > MOST_REQUEST_BYTES):
            return False
        self._pending[vm] = count + 1, total + size
        return True

    def end(self, vm: Vm, size: int) -> None:
        """One is done with."""
        count, total = self._pending.pop(vm)
        if count > 1:
            self._pending[vm] = count - 1, total - size


def too_many_requests() -> StateError:
    return StateError(f"this VM has {MOST_REQUESTS} requests or {MOST_REQUEST_BYTES >> 20} MiB of them in progress",
                      hint="wait for their answers")


def check_tickets(count: int) -> None:
    """Raises StateError for a VM that has so many tickets already."""
    if count >= MOST_TICKETS:
        raise StateError(f"this VM has {count} tickets that were neither joined nor killed", hint="join or kill them")


def check_checkpoints(count: int) -> None:
    """Raises StateError for a VM that has so many checkpoints already."""
    if count >= MOST_CHECKPOINTS:
        raise StateError(f"this VM has {count} checkpoints", hint="close those that you no longer need")
