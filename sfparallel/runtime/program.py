"""Runs the user's program as `python` would: as `__main__`, with its arguments, streams and exceptions.

Whoever calls `run` must then return to the interpreter and do nothing else: exceptions leave through the interpreter's own exit,
which knows SystemExit, KeyboardInterrupt (death by SIGINT), non-daemon threads and atexit handlers better than any copy of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from typing import Any, NoReturn, TextIO, cast

import msgpack

from sfparallel.text import printable

SHIMS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "shims")
"""Holds a package `mpi4py` that is ours."""

HIDDEN_FILES = {__file__, runpy.__file__, contextlib.__file__, "<frozen runpy>"}
"""What runs around the program: left out of its tracebacks. Whoever calls `run` adds itself."""


@dataclass(frozen=True)
class Program:
    """What to run, as RUN says it.

    Attributes:
        argv: the script, the module's name, or the text of the command; then its arguments.
        mode: "script", "module" or "command".
        cwd: working directory.
        env: the whole environment; empty: the one that is there.
        path0: first entry of sys.path.
        data: serial numbers of data disks and where to mount them.
        ranks: how many clones run the whole program; 0: the parent runs it.
        mpi4py: whether `import mpi4py` shall find ours.
        closed: those of the descriptors 0 to 2 that are closed on the host.
    """

    argv: list[str]
    mode: str
    cwd: str
    env: dict[str, str]
    path0: str
    data: list[tuple[str, str]]
    ranks: int = 0
    mpi4py: bool = False
    closed: tuple[int, ...] = ()

    @classmethod
    def decode(cls, payload: bytes) -> Program:
        message = msgpack.unpackb(payload, raw=False, unicode_errors="surrogateescape")
        return cls(argv=list(message["argv"]), mode=str(message["mode"]), cwd=str(message["cwd"]), env=dict(message["env"]),
                   path0=str(message["path0"]), data=[(str(serial), str(path)) for serial, path in message.get("data", [])],
                   ranks=int(message.get("ranks", 0)), mpi4py=bool(message.get("mpi4py", False)),
                   closed=tuple(message.get("closed", ())))


def set_up_streams(closed: tuple[int, ...]) -> None:
    """Let the standard streams behave as Python's own do, but for stdout, which is line buffered though it is a pipe.

    Unbuffered too (PYTHONUNBUFFERED, for local ranks): a line leaves in one piece, or those of two ranks would mix.

    Args:
        closed: streams that are None, as where Python finds their descriptors closed; here there is /dev/null, so that no line to
            the supervisor gets these numbers.
    """
    for stream, errors in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        cast(TextIO, stream).reconfigure(encoding="utf-8", errors=errors, line_buffering=True, write_through=False)  # type: ignore[attr-defined]
    cast(TextIO, sys.stdin).reconfigure(encoding="utf-8", errors="strict")  # type: ignore[attr-defined]
    for number in closed:
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)


def run(program: Program, explain: Callable[[BaseException], None] = lambda error: None) -> None:
    """Run it as `__main__`; with `ranks`, in each of so many clones, while the parent looks after them and does not return.

    Args:
        explain: adds to an exception that nobody caught what its reader should know.
    """
    _prepare(program, explain)
    if not program.ranks:
        _execute(program)
        return
    # Late: it imports ZeroMQ, which programs that never fork need not wait for.
    from sfparallel.runtime import spmd
    HIDDEN_FILES.add(spmd.__file__)
    with spmd.enter_world(program.ranks):
        _execute(program)


def _prepare(program: Program, explain: Callable[[BaseException], None]) -> None:
    """Make this process's environment, folder and arguments those of the program."""
    sys.excepthook = functools.partial(_excepthook, explain)
    if program.env:
        os.environ.clear()
        os.environ.update(program.env)
    try:
        os.chdir(program.cwd)
    except OSError as error:
        refuse(f"cannot enter the working directory {program.cwd}: {error.strerror}")
    sys.argv[:] = program.argv
    sys.path.insert(0, program.path0)
    if program.mpi4py:
        # Behind the program's own folder, which programs expect in the first place; before all that is installed.
        sys.path.insert(1, SHIMS)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _execute(program: Program) -> None:
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main_module
    if program.mode == "command":
        text, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(text, "<string>", "exec"), main_module.__dict__)
    elif program.mode == "module":
        _run_as_main(program.argv[0], alter_argv=True)
    elif os.path.isfile(program.argv[0]) and not program.argv[0].endswith((".pyz", ".zip")):
        _run_file(program.argv[0], main_module)
    elif os.path.exists(program.argv[0]):
        # A folder or an archive with a __main__.py: python puts the thing itself on sys.path.
        sys.path[0] = program.argv[0]
        _run_as_main("__main__", alter_argv=False)
    else:
        refuse(f"can't open file {program.argv[0]!r}: No such file or directory")


def _run_file(path: str, main_module: types.ModuleType) -> None:
    """Not runpy.run_path: it takes its module out of sys.modules at the end, before threads and atexit handlers have run."""
    main_module.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, path, "exec"), main_module.__dict__)


def _run_as_main(name: str, *, alter_argv: bool) -> None:
    """What the interpreter itself calls for -m, and for folders; public runpy.run_module works in a temporary module."""
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def refuse(message: str) -> NoReturn:
    """End this process before the program has begun."""
    print(printable(f"sfrun: {message}"), file=sys.stderr)
    sys.exit(2)


def _excepthook(explain: Callable[[BaseException], None], kind: type[BaseException], error: BaseException,
                trace: types.TracebackType | None) -> None:
    """Python's own, without our frames on top of the program's."""
    explain(error)
    first: Any = trace
    while first is not None and first.tb_frame.f_code.co_filename in HIDDEN_FILES:
        first = first.tb_next
    if first is None and not isinstance(error, SyntaxError):
        first = trace  # an error of ours
    sys.__excepthook__(kind, error.with_traceback(first), first)
