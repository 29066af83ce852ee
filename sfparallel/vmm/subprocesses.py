"""The one place where the host half runs other programs: argument lists, never a shell; logged so that they can be replayed."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfparallel.errors import EnvironmentProblem, SfError
from sfparallel.vmm.command_errors import hint_for

log = logging.getLogger("sfparallel")

FULL_DISK = "the disk is full: free some space, or set SF_CACHE to a folder on another disk"
_NO_SPACE = os.strerror(errno.ENOSPC)
_TAIL_LINES = 20


def require(program: str, package: str) -> str:
    """The path of a program.

    Raises:
        EnvironmentProblem: it is not installed; `package` is the Debian package that has it.
    """
    path = shutil.which(program)
    if path is None:
        raise EnvironmentProblem(f"the program {program} is not installed", hint=f"apt install {package}")
    return path


def run(
    argv: Sequence[str | Path],
    *,
    what: str,
    error: type[SfError] = EnvironmentProblem,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program to its end and return its standard output.

    The program ends when this process ends, however that happens.

    Args:
        what: the purpose, for the error message ("compress the guest image").
        error: class of the exception for a failure.
        environment: variables to add to this process's own.

    Raises:
        SfError: of class `error`, with the command and the end of its standard error.
    """
    words = [str(word) for word in argv]
    log.debug("run: %s", shlex.join(words))
    # In English: their words are read by us too.
    full_environment = {**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})}
    try:
        # On an exception (Ctrl-C) subprocess.run kills the child before it passes it on.
        done = subprocess.run([*_bound(), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              env=full_environment, cwd=cwd, check=False)  # fmt: skip
    except OSError as problem:
        raise error(f"cannot {what}: {words[0]}: {problem.strerror}", hint=hint_for(problem)) from problem
    if done.returncode != 0:
        raise _failure(what, words, done, error)
    return done.stdout


def run_tree(
    argv: Sequence[str | Path],
    *,
    what: str,
    error: type[SfError] = EnvironmentProblem,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Like `run`, for a program whose own children must not survive it: it runs in a PID namespace, whose end is theirs."""
    unshare = require("unshare", "util-linux")
    command = [unshare, "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "--", *argv]
    return run(command, what=what, error=error, environment=environment)


def _bound() -> list[str]:
    """A prefix that gives a command a parent-death signal (prctl(2)); without util-linux's setpriv there is none."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _failure(what: str, words: Sequence[str], done: subprocess.CompletedProcess[str], error: type[SfError]) -> SfError:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    full = [line for line in lines if _NO_SPACE in line]
    tail = "\n".join([*([line for line in full[:1] if line not in lines[-_TAIL_LINES:]]), *lines[-_TAIL_LINES:]])
    # In whatever step of whatever tool, and whatever it went on to say: its words are all that there is to go by.
    hint = FULL_DISK if full else None
    ended = f"exit status {done.returncode}" if done.returncode >= 0 else f"signal {-done.returncode}"
    return error(f"cannot {what}: {words[0]} ended with {ended}\n  command: {shlex.join(words)}\n{tail}", hint=hint)
