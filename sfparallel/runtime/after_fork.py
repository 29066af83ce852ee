"""What modules have registered with `os.register_at_fork`, for the clones of VMs: no `os.fork` runs there that would call it.

The interpreter keeps these functions to itself, so `record` puts itself in front of `os.register_at_fork`, before any module of
the program is imported. A fork of the VM then calls what `os.fork` calls (Modules/posixmodule.c: PyOS_BeforeFork,
PyOS_AfterFork_Parent, PyOS_AfterFork_Child), but for the modules in `LEFT_OUT`, and leaves the interpreter's own locks alone: in
a forked process only the thread that forked goes on, whereas a clone keeps all, and with them the locks that they hold.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # and no other imports: this module is in every program, before its first line
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Callback = Callable[[], object]

LEFT_OUT = {
    "threading": "it declares all other threads ended, which go on in a clone, and the calling one the main thread",
    "logging": "it makes its locks anew; in a clone they are released by the threads that hold them",
    "concurrent.futures.thread": "it makes its lock anew; in a clone that is released by the thread that holds it",
    "asyncio.events": "it takes the loops of all threads away, which go on in a clone; `Renewal.leave_event_loop` does its part",
    **dict.fromkeys(("multiprocessing.resource_tracker", "loky.backend.resource_tracker",
                     "joblib.externals.loky.backend.resource_tracker"),
                    "it hangs up on the tracker process, which would clean up as after the program's end; here it is a clone"),
    "random": "`Renewal.apply` seeds it, for each clone with entropy from the host",
    "sfparallel.runtime.here": "`Here.became_clone` does its part",
}
"""Modules whose functions are wrong in a clone, and why."""


class _AtFork:
    """Functions in the order of their registration."""

    def __init__(self) -> None:
        self.before: list[Callback] = []
        self.after_in_parent: list[Callback] = []
        self.after_in_child: list[Callback] = []

    def add(self, module: str, functions: dict[str, Callback | None]) -> None:
        if module not in LEFT_OUT:
            for when, function in functions.items():
                if function is not None:
                    getattr(self, when).append(function)


_AT_FORK = _AtFork()


def record() -> None:
    """Note from now on what is registered. Called once, as early as possible in the program's process."""
    original = os.register_at_fork

    def register_at_fork(*, before: Callback | None = None, after_in_child: Callback | None = None,
                         after_in_parent: Callback | None = None) -> None:
        # As given, for the interpreter counts a None as an argument.
        given = {"before": before, "after_in_child": after_in_child, "after_in_parent": after_in_parent}
        original(**{when: function for when, function in given.items() if function is not None})
        _AT_FORK.add(sys._getframe(1).f_globals.get("__name__", ""), given)

    register_at_fork.__doc__ = original.__doc__
    os.register_at_fork = register_at_fork


def before() -> None:
    """Just before a fork of the VM."""
    _call(reversed(_AT_FORK.before))


def in_parent() -> None:
    """After it, in the VM that was forked; also when it failed."""
    _call(_AT_FORK.after_in_parent)


def in_clone() -> None:
    """After it, in each clone, once its identity is new."""
    _call(_AT_FORK.after_in_child)


def _call(functions: Iterable[Callback]) -> None:
    for function in list(functions):
        try:
            function()
        except BaseException as error:  # as the interpreter does: it is told, and stops nothing
            _tell(function, error)


def _tell(function: Callback, error: BaseException) -> None:
    import traceback
    import types
    if sys.unraisablehook is sys.__unraisablehook__:  # which takes one type only, that Python code cannot make
        print(f"Exception ignored in: {function!r}", file=sys.stderr)
        traceback.print_exception(error)
        return
    told: Any = types.SimpleNamespace(exc_type=type(error), exc_value=error, exc_traceback=error.__traceback__, err_msg=None,
                                      object=function)
    sys.unraisablehook(told)
