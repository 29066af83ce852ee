"""Defaults of a project for options of `sfrun`: the table `[tool.sfparallel]` of a pyproject.toml.

Only options that open nothing of the host to the program can stand there. The program can write this file, if it is in a folder
that the guest is shown: with `data`, `forward`, `connect`, `trace` or `local` in it, it could give itself what the user did not.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfparallel.errors import UsageError
from sfparallel.text import nearest

NAME = "pyproject.toml"
TABLE = "tool.sfparallel"

KEYS = ("n", "memory", "cpus", "image", "label", "timeout", "env", "venv", "seed", "spmd", "mpi4py", "stats")
"""Options by their names, without hyphens."""


def find(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The nearest file with the table, in a folder or above it, and the table.

    Raises:
        UsageError: a file that seems to have it is not valid.
    """
    for place in (folder, *folder.parents):
        path = place / NAME
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if b"sfparallel" not in content:  # files of others need not be valid
            continue
        try:
            table = tomllib.loads(content.decode()).get("tool", {}).get("sfparallel")
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError) as error:
            raise UsageError(f"{path} is not valid: {error}") from error
        if table is not None:
            if not isinstance(table, dict):
                raise UsageError(f"{path}: {TABLE} must be a table, not {table!r}")
            return path, table
    return None


def defaults(parser: argparse.ArgumentParser, path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """What a parser shall take for options that are not given.

    Raises:
        UsageError: the table has a key that is none of `KEYS`, or a value of the wrong type.
    """
    actions = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in KEYS:
            raise _unknown(path, key, actions)
        action = actions[key]
        if key in ("spmd", "mpi4py"):
            if _checked(path, key, value, bool, "true or false"):
                if action.dest in found:
                    raise UsageError(f"{path}: {TABLE} has both spmd and mpi4py", hint="mpi4py includes spmd")
                found[action.dest] = action.const
        elif key in ("label", "stats"):
            found[action.dest] = _checked(path, key, value, bool, "true or false")
        elif key in ("n", "cpus", "seed"):
            found[action.dest] = _checked(path, key, value, int, "a whole number")
        elif key == "timeout":
            found[action.dest] = float(_checked(path, key, value, (int, float), "a number of seconds"))
        elif key == "env":
            found[action.dest] = _variables(path, value)
        elif key == "venv":
            found[action.dest] = _below(path, _checked(path, key, value, str, "a folder"))
        elif key == "memory":
            found[action.dest] = str(_checked(path, key, value, (int, str), 'a size such as "2G", or a number of MiB'))
        else:
            found[action.dest] = _checked(path, key, value, str, "a name")
    return found


def described(path: Path, table: Mapping[str, Any]) -> str:
    """For the log."""
    return f"defaults of {path}: " + (", ".join(f"{key} = {value!r}" for key, value in table.items()) or "none")


def _unknown(path: Path, key: str, options: Mapping[str, Any]) -> UsageError:
    if key in options:
        return UsageError(f"{path}: {TABLE} cannot set {key!r}",
                          hint=f"give --{key} on the command line: the program could write the file, and so give itself more of "
                               "the host")
    near = nearest(key, KEYS)
    meant = f"; did you mean {near}?" if near else ""
    return UsageError(f"{path}: {TABLE} has no key {key!r}{meant}", hint=f"its keys are {', '.join(KEYS)}")


def _checked(path: Path, key: str, value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{path}: {key} in {TABLE} must be {what}, not {value!r}")
    return value


def _variables(path: Path, table: Any) -> list[str]:
    """As `--env K=V`. Never `--env K`, which is the user's own variable."""
    if not isinstance(table, dict) or any(not name or "=" in name or not isinstance(text, str) for name, text in table.items()):
        hint = 'write env = { NAME = "value" }'
        raise UsageError(f"{path}: env in {TABLE} must be a table of strings, not {table!r}", hint=hint)
    return [f"{name}={value}" for name, value in table.items()]


def _below(path: Path, name: str) -> str:
    """A folder of the project, which the program sees anyway."""
    top = os.path.realpath(path.parent)
    folder = os.path.realpath(path.parent / name)
    if not folder.startswith(os.path.join(top, "")):
        raise UsageError(f"{path}: venv in {TABLE} must be in the folder of that file, not {name!r}",
                         hint="give another one by --venv on the command line")
    return str(path.parent / name)
