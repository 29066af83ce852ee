"""Sets up the interpreter that runs the user's program, just before its first line; the interpreter then runs it by itself.

Called while `site` is imported (`sfparallel.bootstrap`). What happens here happens to every program, whether it uses sfparallel
or not: nothing is imported that is not needed, nothing is left behind that the program would notice.
"""

from __future__ import annotations

import io
import os
import sys
import types

from sfparallel.bootstrap import orders
from sfparallel.runtime import after_fork

SHIMS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "shims")
"""Holds a package `mpi4py` that is ours."""

EXIT_SOFTWARE = 70  # sysexits.h


def set_up() -> None:
    """Do what the orders say. With `ranks` it returns in each clone, and never in the parent.

    What has to be there before any module of the program goes first.
    """
    local = "control" in orders
    if not local:
        after_fork.record()
    _set_up_streams([("stdin", "stdout", "stderr")[int(number)] for number in orders.get("closed", "")])
    if local:
        os.set_inheritable(int(orders["control"]), False)
    else:
        sys.excepthook = _excepthook
    if "packages" in orders:
        _add_packages(os.fsdecode(bytes.fromhex(orders["packages"])))
    if "mpi4py" in orders:
        # The interpreter puts the program's folder before it, and all that is installed comes behind.
        sys.path.insert(0, SHIMS)
    if "ranks" in orders:
        _enter_world(int(orders["ranks"]))


def _add_packages(folder: str) -> None:
    """Add packages as a virtual environment does: after Python's library, before those of the distribution; with `.pth` files."""
    import site  # it imports us in its last lines, so all that we need of it is defined
    before = list(sys.path)
    site.addsitedir(folder)
    added = [entry for entry in sys.path if entry not in before]
    at = next((i for i, entry in enumerate(before) if entry.endswith("dist-packages")), len(before))
    sys.path[:] = [*before[:at], *added, *before[at:]]


def _set_up_streams(closed: list[str]) -> None:
    """Have lines seen when they are printed, and in order, although standard output may be a pipe.

    Args:
        closed: streams that are None, as where Python finds their descriptors closed; here there is something, so that no line
            to the supervisor gets these numbers.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    for name in closed:
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)


def _enter_world(ranks: int) -> None:
    try:
        # Late: it imports ZeroMQ, which other programs need not wait for.
        from sfparallel.runtime import spmd
    except BaseException as error:  # `site` would go on, and the parent would run the program
        sys.__excepthook__(type(error), error, error.__traceback__)
        os._exit(EXIT_SOFTWARE)
    spmd.enter_world(ranks)


def _excepthook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Python's own, with notes on errors that the VM causes."""
    # Ctrl-C needs none. And eval(), which some modules call when they are imported, would have the interpreter forget that it has
    # to end by SIGINT (pythonrun.c: run_eval_code_obj).
    if issubclass(kind, Exception):
        from sfparallel.runtime import guest_errors
        guest_errors.explain(error)
    sys.__excepthook__(kind, error, trace)
