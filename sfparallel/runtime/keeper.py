"""The keeper: the agent's Python half. It starts the program's interpreter, and when that has ended it brings changed files to
the host.

It is a process of its own with little in it, and waits from before the template is taken until the program ends: a process that
shared the program's memory would make the guest's kernel copy each page that a clone's program writes to.

The agent's messages come on a SEQPACKET socket: a RUN payload (a msgpack map, see `Program`) with three descriptors for stdin,
stdout and stderr. The answers are `{"pid": int}` and, when the program has ended, `{"exited": pid, "status": int}`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from typing import NoReturn

import msgpack

import sfparallel
from sfparallel import bootstrap
from sfparallel.errors import GuestError, SfError
from sfparallel.runtime.copyback import copy_back
from sfparallel.text import printable

PYTHON = "/usr/bin/python3"
MAX_RUN_BYTES = 1 << 20
ROLE_FILE = "/run/sfparallel/role"
"""Written by the agent with the VM's identity: "parent", "clone", or "rank" (a clone that runs the whole program)."""

EXIT_NOT_STARTED = 2
_REHEARSAL = "from sfparallel.runtime.warm import warm_up; warm_up()"


@dataclass(frozen=True)
class Program:
    """What to run, as RUN says it.

    Attributes:
        argv: arguments of the interpreter.
        cwd: working directory.
        env: the whole environment.
        data: serial numbers of data disks and where to mount them.
        zone: files that make the time zone, by path; see `vmm.time_zone`.
    """

    argv: list[str]
    cwd: str
    env: dict[str, str]
    data: list[tuple[str, str]] = field(default_factory=list)
    zone: list[tuple[str, bytes]] = field(default_factory=list)

    @classmethod
    def decode(cls, payload: bytes) -> Program:
        message = msgpack.unpackb(payload, raw=False, unicode_errors="surrogateescape")
        return cls(argv=list(message["argv"]), cwd=str(message["cwd"]), env=dict(message["env"]),
                   data=[(str(serial), str(path)) for serial, path in message.get("data", [])],
                   zone=[(str(path), bytes(content)) for path, content in message.get("zone", [])])


def main() -> None:
    """Serve RUN messages for ever."""
    # Nobody but the agent may talk on this socket, and the program must not find it in its environment.
    control = socket.socket(fileno=int(os.environ.pop("SF_KEEPER_FD")))
    control.set_inheritable(False)
    _compile()
    _rehearse()
    control.send(b"ready")
    while True:
        payload, fds, _flags, _address = socket.recv_fds(control, MAX_RUN_BYTES, 3)
        if not payload:
            sys.exit("keeper: the agent hung up")
        _serve(control, Program.decode(payload), fds)


def _compile() -> None:
    """Compile the package if the initramfs has no bytecode, because the guest's Python version differs from the host's. Otherwise
    each program, and each clone, would compile what it imports."""
    package = os.path.dirname(sfparallel.__file__)
    # A module that this process does not import: those that it imports are compiled by now.
    if not os.path.exists(importlib.util.cache_from_source(f"{package}/runtime/warm.py")):
        subprocess.run([PYTHON, "-m", "compileall", "-q", package], check=False)


def _rehearse() -> None:
    """Run an interpreter along a program's way, as far as a region: afterwards all files that this needs are in the page cache,
    and therefore in the template. Nothing else stays. An image that lacks some of it is still good for other programs."""
    ended = subprocess.run([PYTHON, "-c", _REHEARSAL], env=bootstrap.environment(dict(os.environ), {}), check=False)
    if ended.returncode:
        print(f"keeper: the interpreter that warms up the template ended with {ended.returncode}", file=sys.stderr, flush=True)


def _serve(control: socket.socket, program: Program, fds: list[int]) -> None:
    """Have one program run, and report its end."""
    pid = os.fork()
    if pid == 0:
        _become(program, fds)
    # The program's stderr stays open here: failures of the copy-back are reported on it.
    stdin, stdout, stderr = fds
    os.close(stdin)
    os.close(stdout)
    control.send(msgpack.packb({"pid": pid}))
    status = _wait(pid)
    if _writes_back() and not _copy_back(stderr):
        status = 1 << 8
    os.close(stderr)
    control.send(msgpack.packb({"exited": pid, "status": status}))


def _become(program: Program, fds: list[int]) -> NoReturn:
    """In the child: turn into the program's interpreter."""
    try:
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.closerange(3, 1 << 10)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("0")
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and the program would inherit that
            signal.signal(number, signal.SIG_DFL)
        _set_zone(program.zone)
        _mount(program.data)
        _enter(program.cwd)
        os.execve(PYTHON, [PYTHON, *program.argv], program.env)
    except (SfError, OSError) as error:
        print(printable(f"sfrun: {error}"), file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    os._exit(EXIT_NOT_STARTED)


def _set_zone(files: list[tuple[str, bytes]]) -> None:
    """Write them anew: /etc/localtime may be a link into the database, and must not be written through."""
    for path, content in files:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if content:
            with open(path, "wb") as file:
                file.write(content)


def _mount(disks: list[tuple[str, str]]) -> None:
    if not disks:
        return
    from sfparallel.runtime.data_disks import mount_data_disks
    try:
        mount_data_disks(disks)
    except (SfError, OSError) as error:
        raise GuestError(f"cannot mount the data disks: {error}") from error


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise GuestError(f"cannot enter the working directory {folder}: {error.strerror}") from error


def _wait(pid: int) -> int:
    """The raw wait status of the program."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
    finally:
        os.close(pidfd)
    return os.waitpid(pid, 0)[1]


def _writes_back() -> bool:
    """Whether what this VM's program changed belongs on the host. Asked when it has ended: a clone's keeper began to wait when it
    was still the parent's."""
    with open(ROLE_FILE, encoding="ascii") as file:
        return file.read().strip() in ("parent", "rank")


def _copy_back(stderr: int) -> bool:
    """Bring changed files to the host; False if that failed."""
    try:
        copy_back()
    except GuestError as error:
        text = str(error)
    except Exception:  # whatever it was: the program's results are not where its user expects them, and has to know
        text = f"changed files could not be written to the host\n{traceback.format_exc()}"
    else:
        return True
    with contextlib.suppress(BrokenPipeError):  # nobody reads it
        os.write(stderr, f"{printable(f'sfrun: {text}')}\n".encode())
    return False


if __name__ == "__main__":
    main()
