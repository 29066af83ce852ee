"""The zygote: a Python process in every guest that has everything imported and becomes the user's program.

It is started at boot, before the template is taken, by the keeper (`runtime.keeper`). So a program that begins to run finds
Python, numpy and ZeroMQ in memory, shared by every VM of the job. No process is forked from it for the program: memory that two
processes of a guest share is copied by the guest's kernel when one of them writes to it, in every clone anew.

The keeper's only message comes on a SEQPACKET socket: a RUN payload (a msgpack map, see `program.Program`) with three descriptors
for stdin, stdout and stderr.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import traceback

import sfparallel.runtime
from sfparallel.errors import SfError
from sfparallel.runtime import after_fork, full_disk
from sfparallel.runtime import program as programs
from sfparallel.runtime.data_disks import mount_data_disks
from sfparallel.runtime.identity import ENTROPY_BYTES, refresh
from sfparallel.runtime.program import Program

MAX_RUN_BYTES = 1 << 20
READY = b"ready"


def _import_everything() -> None:
    """Import what programs need, and run once through the paths that every program takes, so that clones share the pages."""
    for name in ("numpy", "numpy.random", "zmq", "cloudpickle", "pickle", "random", "tempfile", "uuid", "threading", "inspect",
                 "sfparallel.runtime"):
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
    """Wait for RUN and become the program; returns when that has ended normally."""
    # Nobody but the keeper may talk on this socket, and the program must not find it in its environment.
    control = socket.socket(fileno=int(os.environ.pop("SF_ZYGOTE_FD")))
    control.set_inheritable(False)
    os.environ.pop("LD_BIND_NOW", None)
    after_fork.record()
    _import_everything()
    _warm_up()
    gc.collect()
    gc.freeze()
    control.send(READY)
    payload, fds, _flags, _address = socket.recv_fds(control, MAX_RUN_BYTES, 3)
    if not payload:
        sys.exit("zygote: the keeper hung up")
    control.close()
    _run(_become(payload, fds))


def _become(payload: bytes, fds: list[int]) -> Program:
    """Turn this process into the one that the program expects."""
    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    for fd in fds:
        if fd > 2:
            os.close(fd)
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("0")
    program = Program.decode(payload)
    programs.set_up_streams(program.closed)
    # The generators were seeded before the template was taken: without this, every program would draw the same numbers.
    refresh(os.urandom(ENTROPY_BYTES))
    return program


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
