"""Where a job lives: a process, mount and PID namespace of its own, so that the kernel cleans up after it.

`sfrun` forks. The child is the first process ("init") of a new PID namespace and runs the job; everything that the job starts,
libvirt's daemonised QEMUs and probes included, is in that namespace. When the init ends, in whatever way, the kernel kills all
that is left in it (pid_namespaces(7)); and the init gets SIGKILL when `sfrun` itself is killed. The job's folder is a tmpfs in
its mount namespace, and goes with the last process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sfparallel import native
from sfparallel.errors import EnvironmentProblem

_FOLDER_BYTES = 64 << 20
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals to `sfrun` that are the job's."""
_SI_USER = 0  # sigaction(2): sent by kill(2), not by the terminal


@dataclass(frozen=True)
class Places:
    """Folders of a job.

    Attributes:
        private: a tmpfs in the job's mount namespace.
        public: made only on request: where a libvirt daemon's QEMU, which is in other namespaces, may make its sockets. A
            process that outlives the job removes it.
    """

    private: Path
    public: Path


def _run_folder() -> Path:
    if os.geteuid() == 0:
        return Path("/run")
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"))


def confine(job: Callable[[Places, int], int], *, public_folder: bool) -> int:
    """Run a job in namespaces of its own.

    Call it before any thread starts: it forks.

    Args:
        job: called in the new namespaces with its folders and the process id by which the world knows it.
        public_folder: whether the public folder is to be made (see Places).

    Returns:
        What `job` returned, or 128 + the signal that ended it.

    Raises:
        EnvironmentProblem: not permitted.
    """
    pid = os.getpid()
    places = Places(_run_folder() / "sfparallel", _run_folder() / f"sfparallel-{pid}")
    # Before the fork: a signal that comes between must not be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGCHLD))
    try:
        places.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        if public_folder:
            places.public.mkdir(mode=0o755)
            _start_janitor(places.public)
        native.unshare(native.CLONE_NEWPID)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot make namespaces for the job: {error}", hint="run as root (or in a user namespace); see `sf doctor`"
        ) from error
    alive, ours = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _become_init(job, places, pid, alive)
    return wait_for(child)


def _become_init(job: Callable[[Places, int], int], places: Places, pid: int, alive: int) -> NoReturn:
    """The init's whole life. It ends with os._exit: what the parent registered to happen at its exit happens there."""
    code = 1
    try:
        native.set_death_signal(signal.SIGKILL)
        # Was it in time? Before it, the death of `sfrun` shows only in the pipe that it held.
        if select.select([alive], [], [], 0)[0]:
            os._exit(code)
        native.mount_private_tmpfs(places.private, size_bytes=_FOLDER_BYTES)
        # libvirt and we look processes up by their numbers in this namespace.
        native.mount("proc", "/proc", "proc", native.MS_NOSUID | native.MS_NODEV)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FORWARDED, signal.SIGCHLD))
        code = job(places, pid)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it was closed before we started
                stream.flush()
        os._exit(code)


def _start_janitor(folder: Path) -> None:
    """Start a process that removes `folder` when this one, and the job, are gone. It holds nothing but the end of a pipe."""
    ours, theirs = os.pipe()  # not inherited by programs, but by forks: this process and the init hold it
    if os.fork():
        os.close(ours)
        return
    os.setsid()
    os.close(theirs)
    for fd in range(3):
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.read(ours, 1)
    # QEMU ends with the job, but a moment later, and may have just made its sockets.
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
    os._exit(0)


def wait_for(child: int) -> int:
    """Wait for a child; signals that were sent to this process alone are passed on (the terminal sends to both).

    FORWARDED and SIGCHLD must be blocked.

    Returns:
        exit code of the child, or 128 + the signal that ended it.
    """
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        info = signal.sigwaitinfo((*FORWARDED, signal.SIGCHLD))
        if info.si_signo != signal.SIGCHLD and info.si_code == _SI_USER:
            os.kill(child, info.si_signo)
