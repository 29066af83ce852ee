"""The zygote: a Python process in every guest that has everything imported and forks the user's program.

It is started at boot by the agent (PID 1), before the template is taken. So a program that begins to run finds Python, numpy
and ZeroMQ in memory, shared by every VM of the job.

The agent's messages come on a SEQPACKET socket: a RUN payload (a msgpack map, see `program.Program`) with three descriptors
for stdin, stdout and stderr. The answers are `{"pid": int}` and, when the program has ended, `{"exited": pid, "status": int}`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import select
import socket
import sys
import traceback

import msgpack

import sfparallel.runtime
from sfparallel.errors import GuestError, SfError
from sfparallel.runtime import full_disk
from sfparallel.runtime import program as programs
from sfparallel.runtime.data_disks import mount_data_disks
from sfparallel.runtime.identity import ENTROPY_BYTES, refresh
from sfparallel.runtime.program import Program

ROLE_FILE = "/run/sfparallel/role"
"""Written by the agent with the VM's identity: "parent", "clone", or "rank" (a clone that runs the whole program)."""

USER_CGROUP = "/sys/fs/cgroup/user/cgroup.procs"
COPY_BACK_MODULE = "sfparallel.runtime.copyback"
MAX_RUN_BYTES = 1 << 20


def _import_everything() -> None:
    """Import what programs need, and run once through the paths that every program takes, so that clones share the pages."""
    for name in ("numpy", "numpy.random", "zmq", "cloudpickle", "pickle", "random", "tempfile", "uuid", "threading", "inspect",
                 "sfparallel.runtime", COPY_BACK_MODULE):
        try:
            importlib.import_module(name)
        except ImportError:  # an image without it is still good for programs that do not use it
            print(f"zygote: cannot import {name}: {traceback.format_exc(limit=0).strip()}", file=sys.stderr, flush=True)


def _warm_up() -> None:
    """Fork, run and reap a child once: the second time costs no page of cold code."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    sfparallel.runtime.warm_up()
    compile("import sys\nprint(len(sys.argv))\n", "<warm-up>", "exec")


def main() -> None:
    """Serve RUN messages for ever; returns only in the user's program, when that has ended normally."""
    # Nobody but the agent may talk on this socket, and the program must not find it in its environment.
    control = socket.socket(fileno=int(os.environ.pop("SF_ZYGOTE_FD")))
    control.set_inheritable(False)
    _import_everything()
    _warm_up()
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while True:
        payload, fds, _flags, _address = socket.recv_fds(control, MAX_RUN_BYTES, 3)
        if not payload:
            sys.exit("zygote: the agent hung up")
        program = _serve(control, payload, fds)
        if program is not None:
            _run(program)
            return


def _serve(control: socket.socket, payload: bytes, fds: list[int]) -> Program | None:
    """Fork one program and report its end; returns the program in the child, None in the zygote."""
    pid = os.fork()
    if pid == 0:
        control.close()
        return _become(payload, fds)
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
    return None


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
    """Whether what this VM's program changed belongs on the host. Asked when it has ended: a clone's zygote began to wait when it
    was still the parent's."""
    with open(ROLE_FILE, encoding="ascii") as file:
        return file.read().strip() in ("parent", "rank")


def _copy_back(stderr: int) -> bool:
    """Bring changed files to the host, if this package can; False if that failed."""
    if importlib.util.find_spec(COPY_BACK_MODULE) is None:
        return True
    try:
        importlib.import_module(COPY_BACK_MODULE).copy_back()
    except GuestError as error:
        text = str(error)
    except Exception:  # whatever it was: the program's results are not where its user expects them, and has to know
        text = f"changed files could not be written to the host\n{traceback.format_exc()}"
    else:
        return True
    with contextlib.suppress(BrokenPipeError):  # nobody reads it
        os.write(stderr, f"sfrun: {text}\n".encode(errors="replace"))
    return False


# ---- in the child: the user's program ----


def _become(payload: bytes, fds: list[int]) -> Program:
    """Turn the forked child into the process that the program expects."""
    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    for fd in fds:
        if fd > 2:
            os.close(fd)
    with open(USER_CGROUP, "w", encoding="ascii") as file:
        file.write("0")
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("0")
    programs.set_up_streams()
    # The generators were seeded before the template was taken: without this, every program would draw the same numbers.
    refresh(os.urandom(ENTROPY_BYTES))
    return Program.decode(payload)


def _run(program: Program) -> None:
    programs.HIDDEN_FILES.add(__file__)
    try:
        mount_data_disks(program.data)
    except (SfError, OSError) as error:
        programs.refuse(f"cannot mount the data disks: {error}")
    programs.run(program, full_disk.explain)


if __name__ == "__main__":
    # The current directory, which -m puts first, is no place for a program's imports; _run() inserts the right one.
    sys.path.pop(0)
    # Under its own name: the program's module takes over "__main__", and this one's globals must survive that.
    from sfparallel.runtime import zygote

    zygote.main()
