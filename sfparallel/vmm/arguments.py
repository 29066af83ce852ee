"""Finds arguments of a program that name files of the host which its VM will not have, before the VM starts.

A program that tests for its input reports only that it is not there; what it writes elsewhere ends with the VM.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from sfparallel.vmm.exports import is_system_folder
from sfparallel.vmm.options import Program

_SCRATCH = frozenset(map(Path, ("/", "/tmp", "/var/tmp", "/dev/shm")))
"""Folders that every system has; as an argument, any will do."""


def _named(argument: str) -> str:
    """What may be a path in an argument: `--input=PATH` too."""
    return argument.partition("=")[2] if argument.startswith("-") else argument


def unseen(program: Program, shown: Iterable[Path]) -> dict[Path, Path]:
    """Files and folders that arguments name, outside the folders that the VM has; for each, the folder that would show it.

    Files that do not exist count if their folder does: the program may want to write them.

    Args:
        shown: absolute, resolved.
    """
    there, found = tuple(shown), {}
    for word in map(_named, program.argv[1:]):
        try:
            named = Path(os.path.abspath(program.cwd / word))
            path = named.resolve()
            folder = path if path.is_dir() else path.parent
            if not word or not folder.is_dir() or not (named.exists() or named.is_symlink() or "/" in word):
                continue
        except (OSError, ValueError, RuntimeError):  # no name of a file, or links in a circle
            continue
        if any(path == place or place in path.parents for place in there) or path in _SCRATCH or is_system_folder(folder):
            continue
        found[named] = folder
    return found


def tell(program: Program, shown: Iterable[Path], note: Callable[[str], None]) -> None:
    """Tell the user which arguments name files that the VM will not have.

    Args:
        shown: the folders that the VM has, those of `--data` included.
        note: shows the user a line.
    """
    found = unseen(program, shown)
    if not found:
        return
    data = " ".join(f"--data {shlex.quote(str(folder))}" for folder in dict.fromkeys(found.values()))
    note(f"sfrun: arguments name files outside of the folders that the VM has: {', '.join(map(str, found))}\n"
         f"  to read them, add `{data}`, or copy them here; what is written there is lost: write below the current folder")
