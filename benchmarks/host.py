"""The machine that figures come from, described without its name or paths."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sfparallel.cli import host_memory_bytes
from sfparallel.config import QEMU
from sfparallel.vmm.kvm import accelerator
from sfparallel.vmm.template import qemu_version

ROOT = Path(__file__).parent.parent

_LOOKING_S = 1.0
_LOOPS = 5
_ADDITIONS = 1_000_000


def processor() -> str:
    """Name of the processor, as Linux has it."""
    with open("/proc/cpuinfo") as file:
        names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return next(names, platform.machine())


def describe() -> dict[str, Any]:
    """What figures depend on."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(host_memory_bytes() / 2**30, 1),
        "kernel": platform.release(),
        "qemu": qemu_version(QEMU.get()),
        "accelerator": accelerator(),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def revision() -> dict[str, str]:
    """The day, the commit, and the tree of what is measured: figures of equal trees belong together.

    A "+" behind either says that files differed from it.
    """
    changed = "+" if _git("status", "--porcelain", "--untracked-files=no", "--", "sfparallel") else ""
    return {
        "day": datetime.now(UTC).strftime("%Y-%m-%d"),
        "revision": (_git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "measured": (_git("rev-parse", "--short=12", "HEAD:sfparallel") or "unknown") + changed,
    }


def _processor_time() -> tuple[int, int]:
    """Ticks that all processors were busy, and all ticks (the first line of /proc/stat, proc(5))."""
    with open("/proc/stat") as file:
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy, busy + idle + iowait


def busy_share() -> float:
    """Share of the processors' time that others use, while nothing is measured yet: 0 to 1."""
    busy, total = _processor_time()
    time.sleep(_LOOKING_S)
    busy_later, total_later = _processor_time()
    return round((busy_later - busy) / max(1, total_later - total), 2)


def speed_ms() -> float:
    """Milliseconds of a fixed piece of Python on one core: tells whether two parts were measured on an equally fast machine."""
    times = []
    for _ in range(_LOOPS):
        begun = time.perf_counter()
        total = 0
        for i in range(_ADDITIONS):
            total += i
        times.append((time.perf_counter() - begun) * 1e3)
    return round(statistics.median(times), 2)
