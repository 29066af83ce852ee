"""Where a job lives: a process, mount and PID namespace of its own, so that the kernel cleans up after it.

    sfrun ── init ── job ── QEMUs, launcher, …        init is process 1 of the job's PID namespace, the job process 2
                └─ orphans of the job                 libvirt's daemonised QEMUs, for one

`sfrun` forks the init, and that forks the job. Both do nothing but wait (`wait_for`): they reap what ends below them, known or
not, pass signals on that were sent to them alone, and end with the exit code of the one that they wait for. A job whose init
knew only its own children would keep zombies for ever, and libvirt, which asks kill(2) whether a QEMU that it has killed is gone,
waits 40 s for each of them.

All three are in one session and process group, that of the shell which started `sfrun`: the terminal sends its signals to each
of them, and so may others (see vmm.signals). QEMUs and the launcher have sessions of their own (`native.spawn`). The three share
the descriptors 0 to 2.

Ctrl-Z: see vmm.job_control.

When the init ends, in whatever way, the kernel kills all that is left in the namespace (pid_namespaces(7)). So `kill -9` of the
job ends the init, and that ends the rest; and the init gets SIGKILL when `sfrun` itself is killed. The job's folder is a tmpfs in
its mount namespace, and goes with the last process.

A thread that waits for a file system which does not answer (FUSE, some network file systems) cannot be killed. Its process stays
a zombie that nobody can reap, and its PID namespace with it. So the job says itself that it is over (`Notice.end`), when all
its VMs are gone; `sfrun` waits for no more than that if the kernel keeps the rest.
"""

from __future__ import annotations

import contextlib
import errno
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
from sfparallel.text import printable
from sfparallel.vmm import job_control, processes, signals
from sfparallel.vmm.command_errors import errors_told, hint_for
from sfparallel.vmm.exits import exit_code

_FOLDER_BYTES = 64 << 20
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals to `sfrun` that are the job's."""
_TOLD = (signal.SIGCHLD, signal.SIGIO)
"""What the kernel tells `sfrun` and the init."""
WAITED = (*FORWARDED, *job_control.STOPPING, signal.SIGCONT, *_TOLD)
"""Signals that `sfrun` and the init block, and wait for."""
NO_MOUNT_POINT = "the root folder of this process is not a mount point (in a chroot?)"
"""What mount(2) means by EINVAL when / is to be made private: mounts of the job would show in the world outside."""
BIND_ROOT = "before chroot, run: mount --bind ROOT ROOT"
_LOOK_S = 0.2
_HANGS_S = 0.8
"""What does not end in this time, with all its threads dead or in the kernel, will not end soon."""
_SI_USER = 0  # sigaction(2): sent by kill(2), not by the terminal; below it by sigqueue(3) and its like


@dataclass(frozen=True)
class Places:
    """Where a job finds what is outside of it.

    Attributes:
        private: a tmpfs in the job's mount namespace.
        public: made only on request: where a libvirt daemon's QEMU, which is in other namespaces, may make its sockets. A
            process that outlives the job removes it.
        interrupts: what `sfrun` got.
    """

    private: Path
    public: Path
    interrupts: signals.Interrupts


def _run_folder() -> Path:
    if os.geteuid() == 0:
        return Path("/run")
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"))


def confine(job: Callable[[Places, int], int], *, public_folder: bool) -> int:
    """Run a job in namespaces of its own.

    Call it before any thread starts: it forks.

    Args:
        job: called in the new namespaces with its places and the process id by which the world knows it.
        public_folder: whether the public folder is to be made (see Places).

    Returns:
        What `job` returned, or 128 + the signal that ended it.

    Raises:
        EnvironmentProblem: not permitted.
    """
    pid = os.getpid()
    block_waited()
    places = Places(_run_folder() / "sfparallel", _run_folder() / f"sfparallel-{pid}", signals.Interrupts())
    try:
        places.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        if public_folder:
            places.public.mkdir(mode=0o755)
            _start_janitor(places.public)
        native.unshare(native.CLONE_NEWPID)
    except OSError as error:
        raise _not_permitted(error) from error
    alive, ours = os.pipe()
    notice = job_control.Notice()
    init = os.fork()
    if init == 0:
        os.close(ours)
        _live(lambda: _be_init(job, places, pid, alive, notice))
    return wait_for(init, places.interrupts, notice)


def _not_permitted(error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"cannot make namespaces for the job: {error}",
        hint=hint_for(error, "run as root (or in a user namespace); see `sf doctor`"),
    )


def block_waited() -> None:
    """Block WAITED, but for what was ignored when this process began: that has no effect, today as ever. Call it before the first
    fork: a signal that comes between must not be lost."""
    signals.take_up()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.obeyed(WAITED))


def unblock_waited() -> None:
    """In the job: take what has come meanwhile, but for what says that it means to stop (see vmm.job_control)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [job_control.MEANT])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(WAITED) - {job_control.MEANT})


def _live(work: Callable[[], int], notice: job_control.Notice | None = None) -> NoReturn:
    """A forked process's whole life. It ends with os._exit: what `sfrun` registered to happen at its exit happens there.

    Args:
        notice: by which the job says that it is over.
    """
    code = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        print(printable(traceback.format_exc()), file=sys.stderr)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it was closed before we started
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        if notice:
            _let_go_of_streams()
            notice.end(code)
        os._exit(code)


def _let_go_of_streams() -> None:
    """A process that cannot end keeps its descriptors. Who reads what we print is to come to its end all the same."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # not closed: a thread may be about to open a file, which must not become what another prints to
            os.dup2(null, stream)


def _be_init(
    job: Callable[[Places, int], int], places: Places, pid: int, alive: int, notice: job_control.Notice
) -> int:
    """Make the job's mounts, start it, and wait for its end."""
    native.set_death_signal(signal.SIGKILL)
    # Was it in time? Before it, the death of `sfrun` shows only in the pipe that it held.
    if select.select([alive], [], [], 0)[0]:
        return 1
    with errors_told("sfrun"):  # `sfrun` learns no more than the exit code
        _make_mounts(places)
        child = os.fork()
    if child == 0:
        unblock_waited()
        _live(lambda: job(places, pid), notice)
    # Signals without a handler do nothing to process 1 (pid_namespaces(7)), but these are blocked, and so wait to be passed on.
    return wait_for(child, None, notice)


def _make_mounts(places: Places) -> None:
    try:
        native.mount_private_tmpfs(places.private, size_bytes=_FOLDER_BYTES)
        # libvirt and we look processes up by their numbers in this namespace.
        native.mount("proc", "/proc", "proc", native.MS_NOSUID | native.MS_NODEV)
    except OSError as error:
        chroot = error.errno == errno.EINVAL
        raise EnvironmentProblem(f"cannot make the job's mounts: {NO_MOUNT_POINT if chroot else error}",
                                 hint=BIND_ROOT if chroot else "see `sf doctor`") from error  # fmt: skip


def _start_janitor(folder: Path) -> None:
    """Start a process that removes `folder` when this one, and the job, are gone. It holds nothing but the end of a pipe."""
    ours, theirs = os.pipe()  # not inherited by programs, but by forks: this process and the init hold it
    if os.fork():
        os.close(ours)
        return
    os.setsid()
    os.close(theirs)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # not closed: what rmtree opens is no standard stream
        os.dup2(null, fd)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.read(ours, 1)
    # QEMU ends with the job, but a moment later, and may have just made its sockets.
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
    os._exit(0)


def wait_for(child: int, interrupts: signals.Interrupts | None, notice: job_control.Notice | None = None) -> int:
    """Wait for a child, and reap all others that end meanwhile. Signals that were sent to this process alone are passed on to it
    (the terminal sends to both). When the child stops, `sfrun` does too, and the init says so (see vmm.job_control).

    WAITED must be blocked (`block_waited`).

    Args:
        interrupts: by which `sfrun` tells the job of SIGINT; None in the init.
        notice: between init and `sfrun`.

    Returns:
        exit code of the child, or 128 + the signal that ended it.
    """
    stopped_by = signal.SIGTSTP
    is_init = interrupts is None
    is_outermost = notice is not None and not is_init
    waited = signals.obeyed(WAITED)

    def has_the_job_stopped() -> bool:
        """Whether the init says so, and it still is: a notice may be read when the job goes on already."""
        return notice is not None and notice.take() and any(map(processes.is_stopped, processes.children(child)))

    def go_on() -> None:
        # Also to those that have it from the shell, as it cannot be seen whom it was sent to. But SIGCONT discards a SIGTSTP that
        # its receiver has not taken yet (kernel/signal.c, prepare_signal): the next Ctrl-Z, typed at once. The init never stops.
        if is_outermost or processes.is_stopped(child):
            os.kill(child, signal.SIGCONT)

    while True:
        has_stopped = False
        # One SIGCHLD may stand for many children: a signal that is pending already is not queued again (signal(7)).
        while (ended := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
            if os.WIFSTOPPED(ended[1]):
                has_stopped |= ended[0] == child
            elif ended[0] == child:
                return exit_code(ended[1])
        if notice and is_init and has_stopped:
            notice.stopped()
        elif has_stopped or (is_outermost and has_the_job_stopped()):
            job_control.stop_as_any_program(stopped_by)
            go_on()
        if notice and notice.ended is not None:
            return _wait_for_the_rest(child, notice.ended)
        info = signal.sigwaitinfo(waited)
        if info.si_signo in job_control.STOPPING:
            stopped_by = signal.Signals(info.si_signo)
        if info.si_signo == signal.SIGINT:
            if interrupts:
                interrupts.pass_on()
        elif info.si_signo == signal.SIGCONT:
            go_on()
        elif info.si_signo not in _TOLD and info.si_code <= _SI_USER:
            os.kill(child, info.si_signo)


def _wait_for_the_rest(init: int, code: int) -> int:
    """The job is over: wait for its processes, as far as the kernel lets them end. Returns the exit code."""
    hanging_since = None
    while True:
        # What was sent to us has no meaning any more, but for SIGCHLD.
        signal.sigtimedwait([signal.SIGCHLD], _LOOK_S)
        if os.waitpid(init, os.WNOHANG)[0]:
            return code
        left = processes.below(init)
        if not processes.hang(left):
            hanging_since = None
        elif hanging_since is None:
            hanging_since = time.monotonic()
        elif time.monotonic() - hanging_since >= _HANGS_S:
            print(f"sfrun: the job has ended, but process {', '.join(map(str, sorted(left)))} of it waits for a file system "
                  "that does not answer", file=sys.stderr)
            return code
