"""`--stats`: what each fork cost, as one line per fork."""

from __future__ import annotations

import statistics

from sfparallel.vmm.record import ForkReport


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def summary(report: ForkReport) -> str:
    """One fork's report in one line, for the log."""
    paused = f", parent paused {_ms(report.save.pause)}" if report.save else ""
    return (f"fork {report.number}: n={report.n}{paused}, all loaded after {_ms(report.loaded)}, "
            f"last answer after {_ms(report.last_answer)}")


def describe(report: ForkReport) -> str:
    """One fork's report: n, parent pause, pages committed, load time, first and last answer, private memory."""
    save, commit = report.save, report.commit
    loads = sorted(report.loads)
    private = report.private_bytes
    parts = [f"fork {report.number}: n={report.n}"]
    if save and commit:
        parts.append(
            f"parent paused {_ms(save.pause)} (stop {_ms(save.stop)}, devices {_ms(save.devices)}, "
            f"commit {_ms(save.commit)}, resume {_ms(save.resume)})"
        )
        parts.append(
            f"{commit.dirty_pages} dirty pages, {commit.stored_pages} committed in {len(commit.runs)} runs (scan "
            f"{_ms(commit.scan_ns / 1e9)}, copy {_ms(commit.copy_ns / 1e9)}, remap {_ms(commit.remap_ns / 1e9)}), "
            f"frozen in {_ms(save.freeze)}"
        )
    parts.append(f"shells ready after {_ms(report.shells_ready)}")
    if loads:
        parts.append(f"load {_ms(statistics.median(loads))} median, {_ms(loads[-1])} max, all loaded after {_ms(report.loaded)}")
    if report.wakes:
        cpu = statistics.median(report.wake_cpu)
        parts.append(f"woken {_ms(min(report.wakes))} first, {_ms(max(report.wakes))} last, {_ms(cpu)} guest CPU each")
    parts.append(f"answers {_ms(report.first_answer)} first, {_ms(report.last_answer)} last")
    if private:
        parts.append(f"host CPU {_ms(statistics.median(report.cpu))} per clone (from QEMU's start)")
        parts.append(f"private memory {statistics.median(private) / 2**20:.1f} MiB median, {max(private) / 2**20:.1f} MiB max")
    return "\n  ".join(parts)
