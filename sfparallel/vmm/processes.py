"""What the kernel says about processes (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def private_bytes(pid: int) -> int:
    """Memory that only this process has (Private_* of smaps_rollup, proc(5)); 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))
    except OSError:
        return 0


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used (utime and stime, proc(5)); 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def matching(wanted: Callable[[int, int], bool]) -> list[int]:
    """Process ids of all whose parent and session (process ids too) are `wanted`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # proc(5): the name, in brackets, may hold anything; after it come state, parent, process group, session.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if wanted(int(fields[1]), int(fields[3])):
                found.append(int(entry.name))
    return found
