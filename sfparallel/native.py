"""The one module that binds the native helper library: system calls that Python lacks, and children that die with us.

Everything here acts on the calling *thread* where the kernel does (`unshare`, `setns`, parent-death signals).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sfparallel._native import ffi, lib
from sfparallel.errors import EnvironmentProblem, UsageError

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
CLONE_NEWPID = 0x20000000

# <linux/mount.h>
MS_NOSUID = 2
MS_NODEV = 4
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_STEPS = {
    lib.SF_STEP_SIGNALS: "sigprocmask",
    lib.SF_STEP_PDEATHSIG: "prctl(PR_SET_PDEATHSIG)",
    lib.SF_STEP_PARENT: "getppid (the supervisor is gone)",
    lib.SF_STEP_SETSID: "setsid",
    lib.SF_STEP_DUP: "dup2",
    lib.SF_STEP_EXEC: "execve",
    lib.SF_STEP_VFORK: "vfork",
}


def _check(status: int, call: str, name: str | None = None) -> int:
    """Turns the `-errno` of the C half into an `OSError` that names the system call."""
    if status < 0:
        raise OSError(-status, f"{call}: {os.strerror(-status)}", name)
    return status


def unshare(flags: int) -> None:
    """unshare(2): the calling thread gets namespaces of its own (`CLONE_NEWNET`, `CLONE_NEWNS`)."""
    _check(lib.sf_unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """setns(2): the calling thread enters the namespace that `fd` refers to, which must be of this kind (a `CLONE_NEW*` flag)."""
    _check(lib.sf_setns(fd, kind), "setns")


def mount(source: str | None, target: Path | str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    strings = [ffi.NULL if text is None else ffi.new("char[]", os.fsencode(text)) for text in (source, str(target), kind, data)]
    _check(lib.sf_mount(strings[0], strings[1], strings[2], flags, strings[3]), "mount", str(target))


def umount(target: Path | str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(lib.sf_umount(os.fsencode(target), flags), "umount2", str(target))


def mount_private_tmpfs(target: Path | str, *, size_bytes: int, mode: int = 0o700) -> None:
    """Gives the calling thread (and what it starts) a mount namespace of its own with a tmpfs on `target`.

    Nobody outside sees the mount, and it goes away with the last process inside: nothing to clean up after a crash.
    """
    unshare(CLONE_NEWNS)
    # Without this, a mount in a new namespace still propagates to the old one (systemd makes / shared).
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("sfparallel", target, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size_bytes},mode={mode:o}")


def set_subreaper(on: bool = True) -> None:
    """Orphaned descendants become children of this process (prctl PR_SET_CHILD_SUBREAPER), so that it can wait for them."""
    _check(lib.sf_subreaper(int(on)), "prctl(PR_SET_CHILD_SUBREAPER)")


def set_death_signal(number: int) -> None:
    """The calling process gets this signal when its parent's thread ends; 0 clears it (prctl PR_SET_PDEATHSIG)."""
    _check(lib.sf_death_signal(number), "prctl(PR_SET_PDEATHSIG)")


@contextmanager
def inside(namespace_fd: int) -> Iterator[None]:
    """The calling thread is in this network namespace for the length of the block.

    Sockets, /dev/net/tun descriptors and /proc/sys/net opened in the block belong to that namespace for good. Do not `await`
    in the block: other tasks of the thread would run in the wrong namespace.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(namespace_fd, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)


def new_network_namespace() -> int:
    """A descriptor of a new, unnamed network namespace; the calling thread stays where it is.

    The namespace lives as long as something refers to it: this descriptor, a socket or a tap opened inside.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)


def spawn(
    argv: Sequence[str],
    *,
    output: int,
    fds: Mapping[int, int] | None = None,
    env: Mapping[str, str] | None = None,
    death_signal: int = signal.SIGKILL,
) -> int:
    """Starts a program in a session of its own; it dies with the thread that calls this.

    Costs a vfork, not a copy of this process. Standard input is /dev/null; every descriptor that is not named here is closed
    in the child, whether or not it was marked so.

    Args:
        argv: program (looked up in PATH) and arguments.
        output: descriptor for standard output and standard error.
        fds: further descriptors, as {number in the child: descriptor here}; sources and targets may overlap.
        env: the whole environment; this process's own without it.
        death_signal: what the child gets when the calling thread ends (prctl PR_SET_PDEATHSIG); 0 for nothing. The kernel ties it
            to the *thread*, so with a signal this may only be called from the main thread, which lasts as long as the process.

    Returns:
        The pid: a child of this process, to be waited for (`os.pidfd_open`, `os.waitpid`).

    Raises:
        UsageError: called from another thread than the main one, or a reserved descriptor number.
        EnvironmentProblem: there is no such program.
        OSError: a step failed; the message names it. No child is left then.
    """
    if death_signal and threading.get_native_id() != os.getpid():
        raise UsageError("spawn was called from a thread other than the main one",
                         hint="the child would die when that thread ends: call it from the main thread")
    placed = dict(fds or {})
    if any(number <= 2 for number in placed):
        raise UsageError("descriptors 0 to 2 of a child are its standard streams", hint="use `output`, or numbers from 3")
    program = shutil.which(argv[0])
    if program is None:
        raise EnvironmentProblem(f"the program {argv[0]!r} was not found", hint="`sf doctor` names the package that has it")
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        placed |= {0: null, 1: output, 2: output}
        environment = [os.fsencode(f"{key}={value}") for key, value in (os.environ if env is None else env).items()]
        return _spawn(os.path.abspath(program), [os.fsencode(word) for word in argv], environment, placed, int(death_signal))
    finally:
        os.close(null)


def _spawn(program: str, argv: list[bytes], environment: list[bytes], fds: dict[int, int], death_signal: int) -> int:
    # cffi frees what nobody refers to: every buffer has a name until the call is over.
    words = [ffi.new("char[]", word) for word in argv]
    settings = [ffi.new("char[]", setting) for setting in environment]
    path = ffi.new("char[]", os.fsencode(program))
    argv_c, envp_c = ffi.new("char *[]", [*words, ffi.NULL]), ffi.new("char *[]", [*settings, ffi.NULL])
    sources, targets, spare = ffi.new("int[]", list(fds.values())), ffi.new("int[]", list(fds)), ffi.new("int[]", len(fds))
    child = ffi.new("struct sf_child *")
    child.program, child.argv, child.envp = path, argv_c, envp_c
    child.sources, child.targets, child.spare, child.n_fds = sources, targets, spare, len(fds)
    child.death_signal = death_signal
    status: int = lib.sf_spawn(child)
    if status < 0:
        step = _STEPS.get(child.failed_step, "spawn")
        if -status == errno.ESRCH:
            raise ProcessLookupError(errno.ESRCH, step)
        raise OSError(-status, f"{step}: {os.strerror(-status)}", program)
    return status
