"""What a fork costs on this machine: phases for several n, from the supervisor's own reports, as a table and as JSON.

Usage: python -m benchmarks.fork [--n 1 8 32] [--repeat 5] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from sfparallel.vmm.confinement import Places, confine
from sfparallel.vmm.options import JobOptions, Program
from sfparallel.vmm.record import ForkReport

EMBEDDED = None  # libvirt's driver in the job's own process, whatever daemon may run

PROGRAM = """
import sys, time
import sfparallel as sf

n, repeat = int(sys.argv[1]), int(sys.argv[2])
work = sf.parallel(n=n)(lambda: sf.comm().rank)
for _ in range(repeat):
    time.sleep(1 + n / 4)      # the pool is warm again by then
    assert work() == list(range(n))
"""


def median_ms(values: list[float]) -> float:
    return round(statistics.median(values) * 1e3, 1)


def summarise(n: int, reports: list[ForkReport]) -> dict[str, object]:
    """Medians over the repetitions, in milliseconds unless the name says otherwise."""
    saves = [report.save for report in reports if report.save]
    commits = [report.commit for report in reports if report.commit]
    return {
        "n": n,
        "forks": len(reports),
        "frozen_ms": median_ms([save.freeze for save in saves]),
        "pause_ms": median_ms([save.pause for save in saves]),
        "pause_max_ms": round(max(save.pause for save in saves) * 1e3, 1),
        "devices_ms": median_ms([save.devices for save in saves]),
        "commit_ms": median_ms([save.commit for save in saves]),
        "dirty_pages": int(statistics.median(commit.dirty_pages for commit in commits)),
        "loaded_ms": median_ms([report.loaded for report in reports]),
        "woken_ms": median_ms([report.woken for report in reports]),
        "first_answer_ms": median_ms([report.first_answer or 0.0 for report in reports]),
        "last_answer_ms": median_ms([report.last_answer or 0.0 for report in reports]),
        "cpu_per_clone_ms": median_ms([value for report in reports for value in report.cpu]),
        "private_mib": round(statistics.median(value for report in reports for value in report.private_bytes) / 2**20, 1),
    }


def measure(n: int, repeat: int, target: Path) -> int:
    """Run one job; its summary goes to `target` (the job is a process of its own)."""

    program = Program("command", (PROGRAM, str(n), str(repeat)), Path(tempfile.gettempdir()), None, "")

    def job(places: Places, pid: int) -> int:
        from sfparallel.vmm.job import run

        reports: list[ForkReport] = []
        options = JobOptions(program, n=n, statistics=True, on_report=reports.append, connect=EMBEDDED)
        code = run(options, places, pid)
        if code == 0:
            target.write_text(json.dumps(summarise(n, reports)))
        return code

    return confine(job, public_folder=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for n in options.n:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "summary.json"
            # confine() may be called once in a process.
            child = os.fork()
            if child == 0:
                os._exit(measure(n, options.repeat, target))
            _, status = os.waitpid(child, 0)
            if status:
                return os.waitstatus_to_exitcode(status)
            rows.append(json.loads(target.read_text()))
            print(json.dumps(rows[-1]))
    result = {"machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "processor": platform.machine()}, "forks": rows}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
