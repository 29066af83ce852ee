"""What programs in VMs are told: who their VM is, the answer to a request, an error as an answer."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

from sfparallel.errors import CapacityError, ProtocolError, SfError, StateError, UsageError, VMError
from sfparallel.net.addresses import address_of, mac_of
from sfparallel.wire import pack

PREFIX_LENGTH = 16
"""All VMs of a job are in one subnet (net.addresses)."""


@dataclass(frozen=True)
class RegionSettings:
    """What `sfrun` was told that programs in the guest want to know."""

    job: str
    default_n: int | None
    labels: bool
    statistics: bool
    seed: int | None = None
    world: bool = False
    """The parent's own clones run the whole program (`--spmd`)."""


def identity(role: str, number: int, job: str, mtu: int, neighbours: list[list[Any]]) -> dict[str, Any]:
    """The identity part of a THAW message; every value in it is unique to this VM."""
    return {
        "role": role,
        "time_ns": time.time_ns(),
        "entropy": os.urandom(64),
        "hostname": f"{job}-{number}" if number else job,
        "machine_id": uuid.uuid4().hex,
        "mac": mac_of(number),
        "address": address_of(number),
        "prefix": PREFIX_LENGTH,
        "mtu": mtu,
        "neighbours": neighbours,
    }


def thaw(channel: int, answer: dict[str, Any], who: dict[str, Any] | None = None) -> dict[str, Any]:
    """A THAW message: the answer to the request on a channel, and an identity if the VM is to take another."""
    return {"identity": who, "channel": channel, "reply": pack(answer), "mounts": []}


CANCELLED = {"error": "cancelled", "message": "its ticket or checkpoint is of the VM that this one was cloned from", "hint": None}
"""The runtime's answer to this is to wait for ever, as for requests that were pending when the VM was cloned (agent/clients.c):
an error would have the program go on in the clone, up to ending the processes that it has begun, the clone's own among them."""

_KINDS: tuple[tuple[type[SfError], str], ...] = (
    (CapacityError, "capacity"), (UsageError, "invalid"), (ProtocolError, "invalid"), (StateError, "state"),
)  # fmt: skip
"""What an error means to the program that asked; any other says that no clone could be made."""


def failure(error: SfError | OSError, kind: str = "") -> dict[str, Any]:
    """An error as a program's answer."""
    if isinstance(error, OSError):
        error = VMError(f"the host failed: {error}", hint="free memory, descriptors or disk space on the host")
    kind = kind or next((name for cls, name in _KINDS if isinstance(error, cls)), "clone_failed")
    extra = {"fits": error.fits} if hasattr(error, "fits") else {}
    if extra:
        kind = "capacity"
    return {"error": kind, "message": error.message, "hint": error.hint, **extra}
