"""`python -m mpi4py.run program ...`: runs a program; that an uncaught exception ends all ranks is so with `sfrun` anyway."""

from __future__ import annotations

import os
import runpy
import sys

from sfparallel.errors import UsageError

USAGE = "usage: -m mpi4py.run [-rc options] (file | -m module | -c command | -) [arguments]"


def main() -> None:
    """Run the program that sys.argv names, as `python` would."""
    words = sys.argv[1:]
    while words and words[0] in ("-rc", "--rc", "-prof", "--prof"):
        words = words[2:]  # options of the library, and profilers for it: neither means anything here
    if words and words[0] == "--":
        words = words[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if words else 2)
    kind, rest = words[0], words[1:]
    if kind in ("-m", "-c") and not rest:
        raise UsageError(f"{kind} needs an argument", hint=USAGE)
    if kind == "-m":
        sys.argv[:] = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind in ("-c", "-"):
        sys.argv[:] = ["-c", *rest[1:]] if kind == "-c" else ["-", *rest]
        code = rest[0] if kind == "-c" else sys.stdin.read()
        exec(compile(code, "<string>" if kind == "-c" else "<stdin>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = words
        sys.path[0] = os.path.dirname(os.path.realpath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
