"""What every fork did, phase by phase: one record, of which `--stats` and `--trace` (vmm.statistics, vmm.trace) are two views."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sfparallel.vmm.paging import CommitResult

SUPERVISOR = "supervisor"
"""Name of the track of what no single VM does."""
PARENT = "parent"
"""Name of the VM in which the program runs."""


class Phase(enum.Enum):
    """What a VM, or the supervisor, is busy with; in the order in which a fork comes to it.

    The value is what people see. Instants are phases of no length.
    """

    SHELLS = "take shells"
    PREPARE = "prepare layer"
    FREEZE = "freeze programs"
    STOP = "stop processors"
    DEVICES = "save devices"
    COMMIT = "commit memory"
    RESUME = "resume"
    LAUNCH = "launch clones"
    START = "start shell"
    TAKEN = "taken from the pool"
    MAP = "map memory"
    LOAD = "load devices"
    CONT = "cont"
    WAKE = "wake agent"
    USER = "user code"
    ANSWER = "answer"
    FIRST_ANSWER = "first answer is here"
    LAST_ANSWER = "last answer is here"
    EXIT = "end"


@dataclass(frozen=True)
class Span:
    """One phase of one VM.

    Attributes:
        vm: the VM's name, or `SUPERVISOR`.
        begin: on the monotonic clock, seconds.
        end: likewise; equal to `begin` for an instant.
        values: what was counted or measured in it; the unit is the end of the name.
    """

    vm: str
    phase: Phase
    begin: float
    end: float
    values: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class SaveTimes:
    """Where the time of a save went, in seconds; the parent is paused for `pause`.

    Devices are saved while memory is committed.
    """

    freeze: float
    stop: float
    devices: float
    commit: float
    resume: float
    pause: float


@dataclass
class ForkReport:
    """One fork, or one checkpoint (n = 0).

    Attributes:
        n: clones.
        started: when the supervisor was asked, on the monotonic clock.
        number: of the fork in its job, from 1.
        parent: name of the VM that forked.
        commit: what the save stored; None for clones of an earlier checkpoint.
        spans: all phases, in the order in which they ended.
    """

    n: int
    started: float
    number: int = 1
    parent: str = PARENT
    commit: CommitResult | None = None
    spans: list[Span] = field(default_factory=list)

    def note(self, vm: str, phase: Phase, begin: float, end: float | None = None, **values: float) -> None:
        """A phase has ended; now, or at `end`."""
        self.spans.append(Span(vm, phase, begin, time.monotonic() if end is None else end, values))

    def mark(self, vm: str, phase: Phase, at: float | None = None, **values: float) -> None:
        """Something happened; now, or at a known moment."""
        moment = time.monotonic() if at is None else at
        self.spans.append(Span(vm, phase, moment, moment, values))

    def of(self, phase: Phase) -> Iterator[Span]:
        """All spans of a phase."""
        return (span for span in self.spans if span.phase is phase)

    def _since_start(self, phase: Phase) -> list[float]:
        return [span.end - self.started for span in self.of(phase)]

    @property
    def save(self) -> SaveTimes | None:
        """Times of the save; None without one."""
        parts = [next(self.of(phase), None) for phase in (Phase.FREEZE, Phase.STOP, Phase.DEVICES, Phase.COMMIT, Phase.RESUME)]
        freeze, stop, devices, commit, resume = parts
        if not (freeze and stop and devices and commit and resume):
            return None
        return SaveTimes(freeze.seconds, stop.seconds, devices.seconds, commit.seconds, resume.seconds, resume.end - stop.begin)

    @property
    def shells_ready(self) -> float:
        return max(self._since_start(Phase.SHELLS), default=0.0)

    @property
    def loads(self) -> list[float]:
        """For each clone: seconds to map its memory and load its devices."""
        return [load.end - mapped.begin for mapped, load in zip(self.of(Phase.MAP), self.of(Phase.LOAD), strict=True)]

    @property
    def loaded(self) -> float:
        return max(self._since_start(Phase.LOAD), default=0.0)

    @property
    def wakes(self) -> list[float]:
        """When each clone had its identity, in seconds from the start of the fork."""
        return self._since_start(Phase.WAKE)

    @property
    def woken(self) -> float:
        return max(self.wakes, default=0.0)

    @property
    def wake_cpu(self) -> list[float]:
        """Guest CPU seconds of each agent on its way from THAW to WOKEN."""
        return [span.values["guest_cpu_ms"] / 1e3 for span in self.of(Phase.WAKE)]

    @property
    def first_answer(self) -> float | None:
        return min(self._since_start(Phase.FIRST_ANSWER), default=None)

    @property
    def last_answer(self) -> float | None:
        return max(self._since_start(Phase.LAST_ANSWER), default=None)

    @property
    def private_bytes(self) -> list[int]:
        """Private memory of the clones that were measured at their end."""
        return [int(span.values["private_bytes"]) for span in self.of(Phase.EXIT) if "private_bytes" in span.values]

    @property
    def anonymous_bytes(self) -> list[int]:
        """What of it is their own: without pages of layers that they only read, and that nobody else had mapped just then."""
        return [int(span.values["anonymous_bytes"]) for span in self.of(Phase.EXIT) if "anonymous_bytes" in span.values]

    @property
    def cpu(self) -> list[float]:
        """Host CPU seconds of the QEMUs of those clones."""
        return [span.values["host_cpu_s"] for span in self.of(Phase.EXIT) if "host_cpu_s" in span.values]
