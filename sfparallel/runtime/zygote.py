"""The zygote: a Python process in every guest that has everything imported and forks the user's program.

It is started at boot by the agent (PID 1), before the template is taken. So a program that begins to run finds Python, numpy
and ZeroMQ in memory, shared by every VM of the job.

The agent's messages come on a SEQPACKET socket: a RUN payload (a msgpack map, see `Program`) with three descriptors
for stdin, stdout and stderr. The answers are `{"pid": int}` and, when the program has ended, `{"exited": pid, "status": int}`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import runpy
import select
import signal
import socket
import sys
import traceback
import types
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from typing import Any, NoReturn, TextIO, cast

import msgpack

import sfparallel.runtime
from sfparallel.errors import SfError
from sfparallel.runtime.data_disks import mount_data_disks
from sfparallel.runtime.identity import ENTROPY_BYTES, refresh

ROLE_FILE = "/run/sfparallel/role"
"""Written by the agent with the VM's identity: "parent" or "clone"."""

USER_CGROUP = "/sys/fs/cgroup/user/cgroup.procs"
COPY_BACK_MODULE = "sfparallel.runtime.copyback"
MAX_RUN_BYTES = 1 << 20


@dataclass(frozen=True)
class Program:
    """What to run, as RUN says it.

    Attributes:
        argv: the script, the module's name, or the text of the command; then its arguments.
        mode: "script", "module" or "command".
        cwd: working directory.
        env: the whole environment.
        path0: first entry of sys.path.
        data: serial numbers of data disks and where to mount them.
    """

    argv: list[str]
    mode: str
    cwd: str
    env: dict[str, str]
    path0: str
    data: list[tuple[str, str]]

    @classmethod
    def decode(cls, payload: bytes) -> Program:
        message = msgpack.unpackb(payload, raw=False)
        return cls(argv=list(message["argv"]), mode=str(message["mode"]), cwd=str(message["cwd"]), env=dict(message["env"]),
                   path0=str(message["path0"]), data=[(str(serial), str(path)) for serial, path in message.get("data", [])])


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
    if _is_parent() and not _copy_back(stderr):
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


def _is_parent() -> bool:
    """Whether this VM is the parent now: a clone's zygote began to wait when it was still the parent's."""
    with open(ROLE_FILE, encoding="ascii") as file:
        return file.read().strip() == "parent"


def _copy_back(stderr: int) -> bool:
    """Bring changed files to the host, if this package can; False if that failed."""
    if importlib.util.find_spec(COPY_BACK_MODULE) is None:
        return True
    try:
        importlib.import_module(COPY_BACK_MODULE).copy_back()
    except Exception:  # whatever it was: the program's results are not where its user expects them, and has to know
        text = f"sfrun: changed files could not be copied back to the host\n{traceback.format_exc()}"
        os.write(stderr, text.encode(errors="replace"))
        return False
    return True


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
    _set_up_streams()
    # The generators were seeded before the template was taken: without this, every program would draw the same numbers.
    refresh(os.urandom(ENTROPY_BYTES))
    return Program.decode(payload)


def _set_up_streams() -> None:
    """Let the standard streams behave as Python's own do, but for stdout, which is line buffered though it is a pipe."""
    cast(TextIO, sys.stdout).reconfigure(encoding="utf-8", errors="strict", line_buffering=True)  # type: ignore[attr-defined]
    cast(TextIO, sys.stderr).reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[attr-defined]
    cast(TextIO, sys.stdin).reconfigure(encoding="utf-8", errors="strict")  # type: ignore[attr-defined]


def _run(program: Program) -> None:
    """Run it as `__main__`. Exceptions leave through the interpreter's own exit, which knows SystemExit, KeyboardInterrupt
    (death by SIGINT), non-daemon threads and atexit handlers better than any copy of it."""
    sys.excepthook = _excepthook
    os.environ.clear()
    os.environ.update(program.env)
    try:
        mount_data_disks(program.data)
    except (SfError, OSError) as error:
        _refuse(f"cannot mount the data disks: {error}")
    try:
        os.chdir(program.cwd)
    except OSError as error:
        _refuse(f"cannot enter the working directory {program.cwd}: {error.strerror}")
    sys.argv[:] = program.argv
    sys.path.insert(0, program.path0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _execute(program)


def _execute(program: Program) -> None:
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main_module
    if program.mode == "command":
        text, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(text, "<string>", "exec"), main_module.__dict__)
    elif program.mode == "module":
        _run_as_main(program.argv[0], alter_argv=True)
    elif os.path.isfile(program.argv[0]) and not program.argv[0].endswith((".pyz", ".zip")):
        _run_file(program.argv[0], main_module)
    elif os.path.exists(program.argv[0]):
        # A folder or an archive with a __main__.py: python puts the thing itself on sys.path.
        sys.path[0] = program.argv[0]
        _run_as_main("__main__", alter_argv=False)
    else:
        _refuse(f"can't open file {program.argv[0]!r}: No such file or directory")


def _run_file(path: str, main_module: types.ModuleType) -> None:
    """Not runpy.run_path: it takes its module out of sys.modules at the end, before threads and atexit handlers have run."""
    main_module.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, path, "exec"), main_module.__dict__)


def _run_as_main(name: str, *, alter_argv: bool) -> None:
    """What the interpreter itself calls for -m, and for folders; public runpy.run_module works in a temporary module."""
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _refuse(message: str) -> NoReturn:
    print(f"sfrun: {message}", file=sys.stderr)
    sys.exit(2)


def _excepthook(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Python's own, without the zygote's frames on top of the program's."""
    hidden = {__file__, runpy.__file__, "<frozen runpy>"}
    first: Any = trace
    while first is not None and first.tb_frame.f_code.co_filename in hidden:
        first = first.tb_next
    if first is None and not isinstance(error, SyntaxError):
        first = trace  # an error of ours
    sys.__excepthook__(kind, error.with_traceback(first), first)


if __name__ == "__main__":
    # The current directory, which -m puts first, is no place for a program's imports; _run() inserts the right one.
    sys.path.pop(0)
    # Under its own name: the program's module takes over "__main__", and this one's globals must survive that.
    from sfparallel.runtime import zygote

    zygote.main()
