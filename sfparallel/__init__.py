"""sfparallel: parallel Python whose workers are clones of the running virtual machine.

    import sfparallel as sf

    @sf.parallel(n=8)
    def simulate(x): ...

    results = simulate(1.5)         # under `sfrun`: eight clones of this VM, eight results

Names are imported when they are first used: the host's half of the package does not need ZeroMQ or numpy, and the guest's
half does not need libvirt.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own would import a dozen modules, in every program
if TYPE_CHECKING:
    from typing import Any

    from sfparallel import MPI
    from sfparallel.errors import (
        CapacityError,
        CloneLost,
        Closed,
        CollectConflict,
        ExecutorBroken,
        OutsideVMError,
        RankError,
        RankExit,
        RegionError,
        RegionTimeout,
        RemoteError,
        ResultNotPicklable,
        SfError,
        StateError,
        UsageError,
    )
    from sfparallel.runtime.api import ParallelFunction, RegionFuture, parallel, parallel_map
    from sfparallel.runtime.checkpoints import Checkpoint, checkpoint_parent, create_clones
    from sfparallel.runtime.communicator import comm
    from sfparallel.runtime.executor import Executor, TaskFuture, register_joblib
    from sfparallel.runtime.here import in_clone, on_clone
    from sfparallel.runtime.lowlevel import Ticket, clone, exit, join, kill, request_ticket
    from sfparallel.runtime.rng import rng
    from sfparallel.runtime.stream import ResultStream, parallel_imap

_HOMES = {
    "errors": ("CapacityError", "CloneLost", "Closed", "CollectConflict", "ExecutorBroken", "OutsideVMError", "RankError",
               "RankExit", "RegionError", "RegionTimeout", "RemoteError", "ResultNotPicklable", "SfError", "StateError",
               "UsageError"),
    "runtime.api": ("ParallelFunction", "RegionFuture", "parallel", "parallel_map"),
    "runtime.checkpoints": ("Checkpoint", "checkpoint_parent", "create_clones"),
    "runtime.communicator": ("comm",),
    "runtime.executor": ("Executor", "TaskFuture", "register_joblib"),
    "runtime.here": ("in_clone", "on_clone"),
    "runtime.lowlevel": ("Ticket", "clone", "exit", "join", "kill", "request_ticket"),
    "runtime.rng": ("rng",),
    "runtime.stream": ("ResultStream", "parallel_imap"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MPI",
    "CapacityError",
    "Checkpoint",
    "CloneLost",
    "Closed",
    "CollectConflict",
    "Executor",
    "ExecutorBroken",
    "OutsideVMError",
    "ParallelFunction",
    "RankError",
    "RankExit",
    "RegionError",
    "RegionFuture",
    "RegionTimeout",
    "RemoteError",
    "ResultNotPicklable",
    "ResultStream",
    "SfError",
    "StateError",
    "TaskFuture",
    "Ticket",
    "UsageError",
    "checkpoint_parent",
    "clone",
    "comm",
    "create_clones",
    "exit",
    "in_clone",
    "join",
    "kill",
    "on_clone",
    "parallel",
    "parallel_imap",
    "parallel_map",
    "register_joblib",
    "request_ticket",
    "rng",
]


def __getattr__(name: str) -> Any:
    import importlib  # here: what every program would find in sys.modules stays as small as it is with python3
    if name == "MPI":
        return importlib.import_module("sfparallel.MPI")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'sfparallel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sfparallel.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
