"""What `sfrun` was told, as a job takes it. Imports nothing heavy: mistakes are reported before anything is started."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfparallel.vmm.record import ForkReport
    from sfparallel.vmm.venv import Venv

EMBEDDED = "qemu:///embed"
"""URI of libvirt's driver in the job's own process; with nothing after it, its files are in the job's private folder."""


def libvirt_uri(text: str) -> str:
    """A connection as users write it: a URI of libvirt's QEMU driver, or `embed`."""
    return EMBEDDED if text == "embed" else text


class RunIn(enum.Enum):
    """Who runs the program."""

    PARENT = "parent"
    CLONES = "clones"
    """Each clone runs all of it, as a rank of one world (`--spmd`)."""
    CLONES_MPI4PY = "clones, with mpi4py"
    """The same, and `import mpi4py` finds ours (`--mpi4py`)."""


@dataclass(frozen=True)
class Program:
    """What to run in the parent: a script, a module or a command, as Python's own command line has them.

    Attributes:
        mode: "script", "module" or "command".
        argv: the script, the module's name or the text of the command; then its arguments.
        cwd: the current folder.
        folder: of the script, where it really is; None without one.
        environment: variables that are set for it, or (None) that it shall not have.
    """

    mode: str
    argv: tuple[str, ...]
    cwd: Path
    folder: Path | None
    environment: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The interpreter's arguments."""
        match self.mode:
            case "module":
                return ["-m", *self.argv]
            case "command":
                return ["-c", *self.argv]
            case _:
                return [*(["--"] if self.argv[0].startswith("-") else []), *self.argv]

    def environment_over(self, base: Mapping[str, str]) -> dict[str, str]:
        """All variables, where those of `base` are there unless the program's own are different."""
        return {name: value for name, value in {**base, **self.environment}.items() if value is not None}


@dataclass(frozen=True)
class JobOptions:
    """Everything `sfrun` was told."""

    program: Program
    run_in: RunIn = RunIn.PARENT
    n: int | None = None
    memory_bytes: int = 1 << 30
    cpus: int = 1
    image: str = "default"
    labels: bool = True
    timeout_s: float | None = None
    data: tuple[Path, ...] = ()
    """Folders that guests see as block images; that of `venv` is the last of them."""
    venv: Venv | None = None
    forwards: tuple[tuple[int, int], ...] = ()
    statistics: bool = False
    trace: Path | None = None
    connect: str | None = None
    """URI of the libvirt connection by which the parent is started; None: without libvirt, as clones are."""
    pool: int | None = None
    data_slots: int = 0
    """Disks that may be plugged in while the job runs; with `--data` there are DATA_SLOTS in any case."""
    seed: int | None = None
    closed_streams: tuple[int, ...] = ()
    """Those of the descriptors 0 to 2 that were closed when `sfrun` was started; now /dev/null is there."""
    on_report: Callable[[ForkReport], None] | None = None

    @property
    def default_n(self) -> int:
        """Clones where a program does not say how many."""
        return self.n or os.cpu_count() or 1

    @property
    def ranks(self) -> int:
        """Clones that run the whole program; 0 when the parent does."""
        return 0 if self.run_in is RunIn.PARENT else self.default_n

    @property
    def bootstrap_orders(self) -> dict[str, object]:
        """What the program's interpreter is told; see `sfparallel.bootstrap`."""
        orders: dict[str, object] = {"ranks": self.ranks} if self.ranks else {}
        if self.run_in is RunIn.CLONES_MPI4PY:
            orders["mpi4py"] = 1
        if self.venv:
            orders["packages"] = os.fsencode(self.venv.packages).hex()
        if self.closed_streams:
            orders["closed"] = "".join(map(str, self.closed_streams))
        return orders

    @property
    def by_daemon(self) -> bool:
        """Whether a libvirt daemon, and not this job, starts the parent's QEMU."""
        return self.connect is not None and not self.connect.startswith(EMBEDDED)
