"""What of this package is built and not written in Python: where it is, whether it works, what to do if it does not.

In a checkout (and an sdist) the parts stand beside their sources. A wheel has them built, without sources.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import sfparallel
from sfparallel.errors import EnvironmentProblem, SfError
from sfparallel.vmm.paging import PagingLayer, control_pair

_PACKAGE = Path(sfparallel.__file__).parent
LIBRARY = _PACKAGE / "vmm" / "native" / "libsfpage.so"
"""The paging layer, loaded into each QEMU."""
AGENT = _PACKAGE / "runtime" / "agent" / "sfagent"
"""The guest's init."""
CPU_CHECK = _PACKAGE / "runtime" / "cpu_check" / "cpu_check"
"""The test of the processor, which the agent runs before a template is taken."""
TOOLS = "gcc make libc6-dev libmsgpack-dev"
"""Debian packages with which the parts are built."""

_LIMIT_S = 20.0
_NOBODY = 65534


def has_sources(part: Path) -> bool:
    """Whether a part can be built where it is."""
    return (part.parent / "Makefile").exists()


def remedy(part: Path) -> str:
    """What the user of this installation can do about a part that is missing, or of no use."""
    return "make build" if has_sources(part) else "pip install --force-reinstall --no-deps sfparallel (or its wheel)"


def require(part: Path) -> Path:
    """The part's place.

    Raises:
        EnvironmentProblem: it is not there.
    """
    if not part.exists():
        built = "is not built" if has_sources(part) else "is missing from this installation"
        raise EnvironmentProblem(f"{part.name}, a part of sfparallel, {built}", hint=remedy(part))
    return part


def environment(control: int | str | os.PathLike[str], library: Path = LIBRARY) -> dict[str, str]:
    """Environment variables that load the paging layer into a QEMU.

    Args:
        control: descriptor of the library's end of a `control_pair`, which QEMU must inherit; or the path at which the
            library listens for the one connection that it accepts.
    """
    variable = {"SFPAGE_FD": str(control)} if isinstance(control, int) else {"SFPAGE_PATH": os.fspath(control)}
    return {"LD_PRELOAD": str(library), **variable}


def _runnable_copy(part: Path) -> int:
    """A descriptor of a copy that any user may run, wherever the original is."""
    copy = os.memfd_create(part.name, os.MFD_CLOEXEC)
    try:
        os.write(copy, part.read_bytes())
        os.fchmod(copy, 0o755)
        return os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)  # what is open for writing cannot be run
    finally:
        os.close(copy)


def trouble_with_program(part: Path) -> str:
    """Run AGENT or CPU_CHECK so that it only says how it is used; "" or what went wrong.

    It runs without privileges: an agent that takes itself for the init of a guest would set up mounts, and power off.

    Raises:
        TimeoutError: it does not end; the machine may be busy.
    """
    user, groups = (_NOBODY, ()) if os.geteuid() == 0 else (None, None)
    try:
        fd = _runnable_copy(part)
        try:
            done = subprocess.run([f"/proc/self/fd/{fd}", "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  errors="replace", timeout=_LIMIT_S, pass_fds=[fd], user=user, group=user, extra_groups=groups)
        finally:
            os.close(fd)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it did not end in {_LIMIT_S:g} s") from None
    except OSError as error:
        return f"it cannot be run: {error.strerror}"
    said = done.stdout + done.stderr
    if done.returncode == 2 and said.startswith(f"usage: {part.name}"):
        return ""
    return f"it ended with {done.returncode} and said {said.strip()[:200]!r}"


def trouble_with_library(qemu: str | None, library: Path = LIBRARY) -> str:
    """Load the paging layer, and have it answer in a QEMU if there is one; "" or what went wrong.

    Raises:
        TimeoutError: it does not do so in time; the machine may be busy.
    """
    load = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", load, library], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, errors="replace", timeout=_LIMIT_S)  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:]
            return f"it does not load: {said[0] if said else f'exit code {done.returncode}'}"
        return "" if qemu is None else asyncio.run(_answers([qemu], library))
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it did not load in {_LIMIT_S:g} s") from None
    except TimeoutError:  # which is an OSError
        raise
    except OSError as error:
        return f"it cannot be tried: {error}"


async def _answers(qemu: Sequence[str], library: Path) -> str:
    ours, theirs = control_pair()
    layer = PagingLayer(ours, "QEMU")
    argv = [*qemu, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    with theirs:
        variables = {"PATH": os.environ.get("PATH", ""), **environment(theirs.fileno(), library)}
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   pass_fds=[theirs.fileno()], env=variables)  # fmt: skip
    try:
        async with asyncio.timeout(_LIMIT_S):
            await layer.hello()
    except TimeoutError:
        raise TimeoutError(f"it did not answer in QEMU in {_LIMIT_S:g} s") from None
    except SfError as error:
        return f"it does not answer in QEMU: {error.message}"
    finally:
        layer.close()
        process.kill()
        process.wait()
    return ""
