"""Finds imports of a script that its guest image lacks, before a VM boots.

If the active virtual environment has them, its packages are added, as with `--venv`.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from sfparallel.errors import UsageError
from sfparallel.vmm.image import Image
from sfparallel.vmm.machine import DATA_SLOTS
from sfparallel.vmm.options import JobOptions, Program
from sfparallel.vmm.venv import Venv, find

_ALWAYS = {"sfparallel", "mpi4py", "numpy", "zmq", "cloudpickle", "msgpack"}
"""Every guest image has these, or we add them."""
_PLACES = ("usr/lib/python3/dist-packages", "usr/local/lib/python3*/dist-packages")
_LIMIT_S = 30.0


def imported(source: bytes) -> set[str]:
    """Top-level names of modules that a script always imports: not in functions, in `try` or under a condition. Empty if
    the script changes the module search path, or is not valid Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()  # the interpreter reports the error
    if b"sys.path" in source or b"site.addsitedir" in source:
        return set()
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def _has(folder: Path, name: str) -> bool:
    """Whether a folder has a module or package; any folder may be a package."""
    return any((folder / entry).exists() for entry in (name, f"{name}.py")) or any(folder.glob(f"{name}.*.so"))


def _in_image(image: Image, names: Iterable[str]) -> set[str]:
    """The names that the image has; all of them if that is unknown."""
    wanted = set(names)
    argv = ["unsquashfs", "-lc", str(image.root), *(f"{place}/*" for place in _PLACES)]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return wanted
    entries = {line.partition("dist-packages/")[2].partition("/")[0] for line in done.stdout.splitlines()}
    there = {entry.partition(".")[0] for entry in entries if "dist-info" not in entry and "egg-info" not in entry}
    # A .pth file can add any folder to the search path.
    hidden = any(entry.endswith(".pth") and not entry.startswith("distutils-precedence") for entry in entries)
    return wanted if hidden or not there else wanted & there


def _python_path(program: Program) -> list[Path]:
    folders = (program.environment.get("PYTHONPATH") or "").split(os.pathsep)
    return [program.cwd / folder for folder in folders if folder]


def missing(program: Program, image: Image) -> list[str]:
    """Modules that a script imports and will not find in a guest with this image."""
    if program.mode != "script" or program.folder is None:
        return []
    try:
        path = program.cwd / program.argv[0]
        names = imported((path / "__main__.py" if path.is_dir() else path).read_bytes()) - _ALWAYS - set(sys.stdlib_module_names)
    except OSError:
        return []
    folders = [path if path.is_dir() else program.folder, *_python_path(program)]
    names = {name for name in names if not any(_has(folder, name) for folder in folders)}
    return sorted(names - _in_image(image, names)) if names else []


def active_environment(environment: Mapping[str, str]) -> Venv | None:
    """The virtual environment that is active in the user's shell, or that of `sfrun`."""
    for folder in (environment.get("VIRTUAL_ENV"), sys.prefix):
        try:
            if folder:
                return find(folder)
        except UsageError:
            continue
    return None


def supplied(options: JobOptions, image: Image, note: Callable[[str], None]) -> JobOptions:
    """The options, with the active environment added if it has all imports that the image lacks; otherwise the user is told.

    Args:
        note: shows the user a line.
    """
    names = [name for name in missing(options.program, image) if not (options.venv and _has(options.venv.packages, name))]
    if not names:
        return options
    script, listed = os.path.basename(options.program.argv[0]), ", ".join(names)
    venv = active_environment(os.environ) if options.venv is None and len(options.data) < DATA_SLOTS else None
    if venv and all(_has(venv.packages, name) for name in names):
        try:
            venv.check(image.name, image.python_magic)
        except UsageError as error:
            note(f"sfrun: {script} imports {listed}, which the guest image {image.name!r} lacks\n  {error}")
            return options
        note(f"sfrun: the guest image {image.name!r} lacks {listed}; using the packages of {venv.folder} (--venv)")
        return replace(options, venv=venv, data=(*options.data, venv.packages))
    pip = " ".join(f"--pip {name}" for name in names)
    note(f"sfrun: {script} imports {listed}, which the guest image {image.name!r} lacks. To add packages with these names:\n"
         f"  sf image build {image.name} --from {image.name} {pip}\n"
         "  or bring a virtual environment that has them: `sfrun --venv PATH`")  # fmt: skip
    return options
