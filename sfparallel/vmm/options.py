"""What `sfrun` was told, as a job takes it. Imports nothing heavy: mistakes are reported before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """What to run in the parent: a script, a module or a command, as Python's own command line has them."""

    mode: str
    argv: tuple[str, ...]
    cwd: Path
    folder: Path | None
    path0: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobOptions:
    """Everything `sfrun` was told."""

    program: Program
    n: int | None = None
    memory_bytes: int = 1 << 30
    cpus: int = 1
    image: str = "default"
    labels: bool = True
    timeout_s: float | None = None
    data: tuple[Path, ...] = ()
    forwards: tuple[tuple[int, int], ...] = ()
    statistics: bool = False
    connect: str | None = None
    pool: int | None = None
    seed: int | None = None
