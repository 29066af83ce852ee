"""The keeper: the agent's Python half. It starts the zygote, and when the program has ended it brings changed files to the host.

It is a process of its own with little in it, and waits from before the template is taken until the program ends: a process that
shared the program's memory would make the guest's kernel copy each page that a clone's program writes to.

The agent's messages come on a SEQPACKET socket: a RUN payload with three descriptors for stdin, stdout and stderr, which goes on
to the zygote. The answers are `{"pid": int}` and, when the program has ended, `{"exited": pid, "status": int}`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import traceback

import msgpack

from sfparallel.errors import GuestError
from sfparallel.runtime.copyback import copy_back
from sfparallel.text import printable

ZYGOTE_MODULE = "sfparallel.runtime.zygote"
MAX_RUN_BYTES = 1 << 20
_SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>; the module socket does not have it
ROLE_FILE = "/run/sfparallel/role"
"""Written by the agent with the VM's identity: "parent", "clone", or "rank" (a clone that runs the whole program)."""


class _Zygote:
    """A Python process that has everything imported and waits to become a program."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # RUN's payload, arguments and environment, must fit into one packet.
            self._control.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * MAX_RUN_BYTES)
            # LD_BIND_NOW: a function that is called for the first time in a clone is not looked up there.
            environment = {**os.environ, "SF_ZYGOTE_FD": str(theirs.fileno()), "LD_BIND_NOW": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", ZYGOTE_MODULE], env=environment, pass_fds=[theirs.fileno()]
            )
        if not self._control.recv(16):
            sys.exit("keeper: the zygote ended")

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, payload: bytes, fds: list[int]) -> None:
        """Have it become a program."""
        with self._control:
            socket.send_fds(self._control, [payload], fds)

    def wait(self) -> int:
        """The raw wait status of the program."""
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
        finally:
            os.close(pidfd)
        status = os.waitpid(self.pid, 0)[1]
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return status


def main() -> None:
    """Serve RUN messages for ever."""
    # Nobody but the agent may talk on this socket, and neither zygote nor program must find it in its environment.
    control = socket.socket(fileno=int(os.environ.pop("SF_KEEPER_FD")))
    control.set_inheritable(False)
    zygote: _Zygote | None = _Zygote()
    control.send(b"ready")
    while True:
        payload, fds, _flags, _address = socket.recv_fds(control, MAX_RUN_BYTES, 3)
        if not payload:
            sys.exit("keeper: the agent hung up")
        # A second program in the same VM waits for a new zygote; no job has one.
        _serve(control, zygote or _Zygote(), payload, fds)
        zygote = None


def _serve(control: socket.socket, zygote: _Zygote, payload: bytes, fds: list[int]) -> None:
    """Have one program run, and report its end."""
    zygote.run(payload, fds)
    # The program's stderr stays open here: failures of the copy-back are reported on it.
    stdin, stdout, stderr = fds
    os.close(stdin)
    os.close(stdout)
    control.send(msgpack.packb({"pid": zygote.pid}))
    status = zygote.wait()
    if _writes_back() and not _copy_back(stderr):
        status = 1 << 8
    os.close(stderr)
    control.send(msgpack.packb({"exited": zygote.pid, "status": status}))


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
