"""What the kernel says about processes (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PrivateMemory:
    """Memory that only one process has mapped (Private_* of smaps_rollup, proc(5)).

    Attributes:
        total: bytes.
        dirty: what of it is gained when the process ends; the rest are pages of files that nobody else happens to have mapped.
    """

    total: int = 0
    dirty: int = 0


def private_memory(pid: int) -> PrivateMemory:
    """The private memory of a process; none when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in file if line.startswith("Private_")}
    except OSError:
        return PrivateMemory()
    return PrivateMemory(sum(sizes.values()), sizes.get("Private_Dirty:", 0))


def private_bytes(pid: int) -> int:
    """All of it."""
    return private_memory(pid).total


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
