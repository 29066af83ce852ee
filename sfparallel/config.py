"""Settings: one table from which the environment variables and their help derive, and the places where files are kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sfparallel.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """A setting that the environment may override.

    Attributes:
        variable: name of the environment variable.
        default: the value without it.
        help: one line for `sf settings` and the reference.
    """

    variable: str
    default: str
    help: str

    def get(self) -> str:
        return os.environ.get(self.variable, self.default)


CACHE = Setting("SF_CACHE", "", "folder for guest images and templates (default: $XDG_CACHE_HOME/sfparallel)")
ACCEL = Setting("SF_ACCEL", "auto", "auto, kvm or tcg: how guests are executed; auto uses KVM if a test shows that it works")
QEMU = Setting("SF_QEMU", "qemu-system-x86_64", "the QEMU program")
CLONE_MEMORY = Setting("SF_CLONE_MEMORY", "80M", "private memory that the supervisor assumes per clone when it admits a fork")
LOG = Setting("SF_LOG", "warning", "what sfrun prints to stderr: error (only errors), warning, info (each step), debug")
START_LIMIT = Setting("SF_START_LIMIT", "60", "time limit in seconds for one step of a job's start")
PROGRESS = Setting("SF_PROGRESS", "0", "in the guest (--env): 1 shows the progress of every parallel call that has no progress=")

LIBVIRT_REMEDY = "apt install gcc pkg-config python3-dev libvirt-dev, then pip install libvirt-python"
"""libvirt-python has no wheels and is built from source."""
CACHE_HINT = "make that folder writable, or set SF_CACHE to another folder and run `sf image build` once"

SETTINGS = (CACHE, ACCEL, QEMU, CLONE_MEMORY, START_LIMIT, LOG, PROGRESS)


def qemu_remedy() -> str:
    """What to do if QEMU is missing or does not run."""
    if QEMU.get() == QEMU.default:
        return "apt install qemu-system-x86"
    return f"set {QEMU.variable} to a QEMU that runs, or unset it"


def log_level() -> str:
    """The value of SF_LOG.

    Raises:
        UsageError: it is none of the levels.
    """
    level = LOG.get().lower()
    if level not in ("debug", "info", "warning", "error"):
        raise UsageError(f"{LOG.variable} must be error, warning, info or debug, not {LOG.get()!r}")
    return level


def debugging() -> bool:
    """Whether errors are printed with a traceback."""
    return LOG.get().lower() == "debug"


def cache_folder() -> Path:
    """Where images and templates are kept; created when first written to."""
    if CACHE.get():
        return Path(CACHE.get()).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sfparallel"


def parse_size(text: str) -> int:
    """Bytes of a size such as `512M`, `1G` or `1.5G` (powers of 1024; a bare number is MiB, as in QEMU's `-m`).

    Raises:
        UsageError: not a size.
    """
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = units["M"]
    if body and body[-1] in units:
        unit = units[body[-1]]
        body = body[:-1]
    try:
        size = int(float(body) * unit)
    except (ValueError, OverflowError):
        size = -1
    if size <= 0:
        raise UsageError(f"{text!r} is not a size", hint="write it as 512M or 2G")
    return size
