"""The supervisor's process of a measured job: runs it, and passes on what each fork cost.

Started by `session`; its argument is a JSON object, see `Order`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfparallel import native
from sfparallel.vmm.confinement import Places, confine
from sfparallel.vmm.options import JobOptions, Program
from sfparallel.vmm.processes import private_bytes
from sfparallel.vmm.record import ForkReport, Phase


@dataclass(frozen=True)
class Order:
    """What the job is to be.

    Attributes:
        parent: process id of the benchmark; this process ends with it.
        reports: descriptor to which a line of JSON goes for each fork.
        pool: shells that are kept warm.
    """

    parent: int
    reports: int
    memory_mib: int
    cpus: int
    pool: int

    def encode(self) -> str:
        return json.dumps(asdict(self))


def _middle(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(statistics.median(found), 3) if found else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def milestones(report: ForkReport) -> dict[str, float | None]:
    """When each phase of a fork had ended for all of its VMs, in milliseconds from its start.

    The differences are the phases of the whole: they add up to the last answer.
    """

    def last(phase: Phase) -> float | None:
        return _ms(max((span.end for span in report.of(phase)), default=report.started) - report.started)

    return {
        "shells": last(Phase.SHELLS), "frozen": last(Phase.FREEZE), "stopped": last(Phase.STOP), "devices": last(Phase.DEVICES),
        "committed": last(Phase.COMMIT), "resumed": last(Phase.RESUME), "loaded": last(Phase.LOAD),
        "first_woken": _ms(min(report.wakes, default=None)), "woken": last(Phase.WAKE),
        "first_answer": _ms(report.first_answer), "last_answer": _ms(report.last_answer),
    }  # fmt: skip


def per_clone(report: ForkReport) -> dict[str, float | None]:
    """Medians over the clones of a fork: milliseconds of each phase, and what the QEMUs had used at the end."""
    phases = {"map": Phase.MAP, "load": Phase.LOAD, "cont": Phase.CONT, "wake": Phase.WAKE, "user": Phase.USER}
    times = {f"{name}_ms": _middle(span.seconds * 1e3 for span in report.of(phase)) for name, phase in phases.items()}
    return {
        **times,
        "wake_guest_cpu_ms": _middle(value * 1e3 for value in report.wake_cpu),
        "host_cpu_ms": _middle(value * 1e3 for value in report.cpu),
        "private_mib": _middle(value / 2**20 for value in report.private_bytes),
    }


def summary(report: ForkReport) -> dict[str, Any]:
    """A fork as the data file has it."""
    save, commit = report.save, report.commit
    data: dict[str, Any] = {
        "n": report.n,
        # A pool that was not full yet makes a fork start shells by itself.
        "warm": all(span.end <= report.started for span in report.of(Phase.START)),
        "milestones_ms": milestones(report),
        "per_clone": per_clone(report),
        "private_mib": [round(value / 2**20, 2) for value in report.private_bytes],
        "anonymous_mib": [round(value / 2**20, 2) for value in report.anonymous_bytes],
    }
    if save and commit:
        data["pause_ms"] = _ms(save.pause)
        data["save_ms"] = {name: _ms(seconds) for name, seconds in asdict(save).items()}
        data["commit"] = {
            "dirty_pages": commit.dirty_pages, "stored_pages": commit.stored_pages, "zero_pages": commit.zero_pages,
            "runs": len(commit.runs), "scan_ms": commit.scan_ns / 1e6, "copy_ms": commit.copy_ns / 1e6,
            "remap_ms": commit.remap_ns / 1e6, "layers": next(report.of(Phase.COMMIT)).values["layers"],
        }  # fmt: skip
    return data


def itself() -> dict[str, float]:
    """What this process, the supervisor, has open and holds."""
    return {"open_files": len(os.listdir("/proc/self/fd")) - 1, "private_mib": round(private_bytes(os.getpid()) / 2**20, 2)}


def _telling(reports: int) -> Callable[[ForkReport], None]:
    def tell(report: ForkReport) -> None:
        line = json.dumps({**summary(report), "supervisor": itself()}) + "\n"
        data = memoryview(line.encode())
        while data:
            data = data[os.write(reports, data):]

    return tell


def main() -> int:
    order = Order(**json.loads(sys.argv[1]))
    native.set_death_signal(signal.SIGKILL)
    if os.getppid() != order.parent:
        return 1  # it was gone before it could take this process along
    source = (Path(__file__).parent / "guest.py").read_text(encoding="utf-8")
    program = Program("command", (source,), Path(tempfile.gettempdir()), None)

    def job(places: Places, pid: int) -> int:
        from sfparallel.vmm.job import run

        options = JobOptions(
            program, memory_bytes=order.memory_mib << 20, cpus=order.cpus, statistics=True, on_report=_telling(order.reports),
            pool=order.pool,
        )  # fmt: skip
        return run(options, places, pid)

    return confine(job, public_folder=False)


if __name__ == "__main__":
    sys.exit(main())
