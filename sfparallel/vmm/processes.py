"""What the kernel says about processes (proc(5))."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PrivateMemory:
    """Memory that only one process has mapped (Private_* of smaps_rollup, proc(5)).

    Attributes:
        total: bytes.
        anonymous: what of it the process has made, and what it shares with the launcher that it was forked from; the rest are
            pages of files, layers among them, that nobody else has mapped just now, and that stay when it ends. (Private_Dirty
            does not tell them apart: pages of a memfd are always dirty.)
    """

    total: int = 0
    anonymous: int = 0


def private_memory(pid: int) -> PrivateMemory:
    """The private memory of a process; none when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            lines = [line.split() for line in file if line.startswith(("Private_", "Anonymous:"))]
    except OSError:
        return PrivateMemory()
    sizes = {name: int(kib) << 10 for name, kib, _ in lines}
    anonymous = sizes.pop("Anonymous:", 0)
    return PrivateMemory(sum(sizes.values()), anonymous)


def memory_of_family(pid: int) -> int:
    """Memory of a process and its descendants, in bytes. Each process counts its share of shared pages (Pss)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # gone
        children.setdefault(parent, []).append(int(path.parent.name))
    total, family = 0, [pid]
    for member in family:
        family += children.get(member, [])
        try:
            with open(f"/proc/{member}/smaps_rollup") as file:
                total += next((int(line.split()[1]) << 10 for line in file if line.startswith("Pss:")), 0)
        except OSError:
            continue
    return total


def command_path(name: str) -> str:
    """`sf` or `sfrun` as sudo finds it: with its folder, because sudo's own PATH has no commands of environments."""
    folder, called = os.path.split(sys.argv[0])
    return os.path.join(folder, name) if called in ("sf", "sfrun") else name


def address_space_hint() -> str | None:
    """What to do about a want of memory if this process has a limit of address space; None if it has none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return (f"the address space is limited to {limit >> 20} MiB (ulimit -v), and a VM needs its --memory and about 2 GiB: run "
            "`ulimit -v unlimited`")  # fmt: skip


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
    return [pid for pid, parent, session in _all() if wanted(parent, session)]


def children(of: int) -> list[int]:
    """The children of a process."""
    return matching(lambda parent, _session: parent == of)


def below(ancestor: int) -> set[int]:
    """The children of a process, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for pid, parent, _session in _all():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    next_ones = children.get(ancestor, [])
    while next_ones:
        found.update(next_ones)
        next_ones = [child for pid in next_ones for child in children.get(pid, [])]
    return found


def runs(pid: int) -> bool:
    """Whether a process is there, and neither stopped nor dead."""
    return _state(pid) not in "TtZX"


def is_stopped(pid: int) -> bool:
    """Whether a process is there, and a signal has stopped it."""
    return _state(pid) == "T"


def _state(pid: int) -> str:
    """The kernel's letter for what a process does; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def hang(pids: Iterable[int]) -> bool:
    """Whether the kernel keeps processes from ending: threads wait as no signal can end it (state D), all others are over."""
    states = {state for pid in pids for state in _thread_states(pid)}
    return "D" in states and states <= {"D", "Z", "X"}


def _thread_states(pid: int) -> list[str]:
    states = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                states.append((thread / "stat").read_text(errors="replace").rpartition(")")[2].split()[0])
    return states


def _all() -> Iterator[tuple[int, int, int]]:
    """Process id, parent and session of each process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # proc(5): the name, in brackets, may hold anything; after it come state, parent, process group, session.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            yield int(entry.name), int(fields[1]), int(fields[3])
