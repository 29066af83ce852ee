"""Counts what a fork costs under KVM in instructions and VM exits, which do not depend on how fast a machine is.

    python -m tests.kvm.counts           boots the outer VM with `-icount`, and writes benchmarks/data/kvm.json
    python -m tests.kvm.counts --draw    writes what docs/performance.md says of it

With `-icount shift=0` the outer VM's clocks are a count of its instructions: one of its nanoseconds is one instruction, of its
kernel, of QEMU, or of a guest. So the time between an entry of KVM into a guest and the next exit is what the guest has executed,
exactly; the tracepoints kvm_entry and kvm_exit have it. And `sfrun --trace` tells what each phase of a fork takes, in
instructions of all that runs. It needs a single processor.

A step of a repeated string instruction counts as an instruction.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import documents, host
from sfparallel.vmm.record import Phase
from tests.kvm import __main__ as command
from tests.kvm import record

DATA = host.ROOT / "benchmarks" / "data" / "kvm.json"
DOCUMENT = host.ROOT / "docs" / "performance.md"
FORKS = 5
PHASES = (Phase.PREPARE, Phase.FREEZE, Phase.DEVICES, Phase.COMMIT, Phase.MAP, Phase.LOAD, Phase.WAKE)
_PHASES = {"answered": "from the request to the last answer", "paused": "of these: the parent is paused",
           **{phase.value: f"of these: {phase.value}" for phase in PHASES}}  # fmt: skip
LIMIT_S = 3 * 3600.0

_JOB = """\
export SF_CACHE=/cache SF_ACCEL=kvm
mount -t tracefs tracefs /sys/kernel/tracing
cd /root
exec python3 /project/tests/kvm/count_forks.py {forks}
"""
_LINE = re.compile(r"^\s*(?P<name>.+)-(?P<thread>\d+)\s+\[\d+\]\s+\S+\s+(?P<at>\d+): (?P<event>kvm_\w+): (?P<rest>.*)$")


@dataclass
class Run:
    """What the virtual processor of a VM did: one thread of the trace."""

    stretches: list[int] = field(default_factory=list)
    """Between each entry and its exit, in instructions."""
    exits: Counter[str] = field(default_factory=Counter)
    began: int = 0

    def instructions(self, between: int) -> int:
        """Of the guest.

        Args:
            between: what the host executes between the two tracepoints.
        """
        return sum(self.stretches) - between * len(self.stretches)


def runs(lines: Iterable[str]) -> dict[int, Run]:
    """A trace by threads. What is under way at its begin or end is not counted."""
    found: dict[int, Run] = {}
    entered: dict[int, int] = {}
    for line in lines:
        match = _LINE.match(line)
        if not match:
            continue
        thread, at = int(match["thread"]), int(match["at"])
        run = found.setdefault(thread, Run(began=at))
        if match["event"] == "kvm_entry":
            entered[thread] = at
        elif match["event"] == "kvm_exit" and thread in entered:
            run.stretches.append(at - entered.pop(thread))
            reason = re.search(r"reason (\S+)", match["rest"])
            assert reason, line
            run.exits[reason[1].removeprefix("EXIT_").lower()] += 1
    return found


def clone_of(found: dict[int, Run]) -> Run:
    """The run of the clone: the parent's began before the fork, the clone's last."""
    assert len(found) == 2, f"{len(found)} virtual processors in the trace of a fork of one clone"
    return max(found.values(), key=lambda run: run.began)


def sample(trace: str) -> dict[str, Any]:
    """What a trace of one fork says of its clone."""
    found = runs(trace.splitlines())
    # An exit that is pending at the entry has the guest execute nothing: the shortest stretch is the host's alone.
    between = min(stretch for run in found.values() for stretch in run.stretches)
    clone = clone_of(found)
    return {"instructions": clone.instructions(between), "exits": dict(sorted(clone.exits.items()))}


def phases(trace: str, fork: int) -> dict[str, int]:
    """Instructions of the whole machine in each phase of a fork, from what `sfrun --trace` has written.

    "answered" is from the request to the last answer, "paused" from the stop of the parent until it runs again.
    """
    events = [event for event in json.loads(f"{trace.strip().rstrip('],')}]") if event.get("args", {}).get("fork") == fork]
    begin = {event["name"]: event["ts"] for event in events}
    length = {event["name"]: event["dur"] for event in events if event["ph"] == "X"}
    stop, resume = Phase.STOP.value, Phase.RESUME.value
    found = {"answered": begin[Phase.LAST_ANSWER.value] - begin[Phase.SHELLS.value],
             "paused": begin[resume] + length[resume] - begin[stop]}  # fmt: skip
    found |= {phase.value: length[phase.value] for phase in PHASES}
    # The trace is in microseconds, which are 1000 instructions each.
    return {name: round(1000 * value) for name, value in found.items()}


def measure() -> dict[str, Any]:
    """Boot the outer VM, fork, and count."""
    revision = record.revision()
    with tempfile.TemporaryDirectory(prefix="counts-kvm") as folder:
        share = Path(folder)
        (share / "job").write_text(_JOB.format(forks=FORKS))
        if code := command.ended(command.run(share, None, LIMIT_S, steady=True), share):
            raise SystemExit(code)
        traces = sorted(share.glob("trace.*"))
        told = (share / "phases.json").read_text()
        machine = json.loads((share / "machine").read_text())
        forks = [{**sample(path.read_text()), "phases": phases(told, int(path.suffix[1:]))} for path in traces]
        return {"revision": revision, "day": record.now()[:10], **machine, "forks": forks}


def _reasons(forks: list[dict[str, Any]]) -> Iterator[tuple[str, list[int]]]:
    names = Counter({name: sum(fork["exits"].get(name, 0) for fork in forks) for fork in forks for name in fork["exits"]})
    for name, _ in names.most_common():
        yield name, [fork["exits"].get(name, 0) for fork in forks]


def _spread(values: list[int]) -> tuple[str, str, str]:
    return documents.whole(min(values)), documents.whole(median(values)), documents.whole(max(values))


def text(data: dict[str, Any]) -> str:
    """What docs/performance.md has between its marks."""
    forks = data["forks"]
    rows = [("instructions of the guest", *_spread([fork["instructions"] for fork in forks])),
            ("VM exits", *_spread([sum(fork["exits"].values()) for fork in forks])),
            *((f"of these: `{name}`", *_spread(values)) for name, values in _reasons(forks))]  # fmt: skip
    whole = [(_PHASES[name], *_spread([fork["phases"][name] // 1000 for fork in forks])) for name in _PHASES]
    head = (f"{len(forks)} forks of one clone that answers with its rank; Linux {data['kernel']} with `kvm_amd`, "
            f"QEMU {data['qemu']}; revision `{data['revision']}`, {data['day']}.")  # fmt: skip
    columns = ("of a clone, from its first instruction to its last", "least", "median", "most")
    machine = ("the whole machine, in thousand instructions", *columns[1:])
    return "\n".join([head, "", *documents.table(columns, rows), *documents.table(machine, whole)])


def main() -> int:
    if "--draw" not in sys.argv:
        DATA.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    documents.fill(DOCUMENT, "tests.kvm.counts", text(json.loads(DATA.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
