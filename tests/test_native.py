"""The native helpers, with the real kernel: what a started child inherits, and that it dies with us."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from sfparallel import native
from sfparallel.errors import EnvironmentProblem, UsageError
from tests.conftest import HANG_S


def output_of(
    argv: list[str], *, fds: Mapping[int, int] | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Exit code and output of a spawned program."""
    reader, writer = os.pipe()
    try:
        pid = native.spawn(argv, output=writer, fds=fds, env=env)
    finally:
        os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def children() -> set[int]:
    """Process ids of this process's children, dead ones not yet waited for included (proc(5), task/tid/children)."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_child_gets_exactly_the_named_descriptors_also_when_they_swap() -> None:
    first, second, leak = (os.memfd_create(name) for name in ("first", "second", "leak"))
    os.set_inheritable(leak, True)
    try:
        code, said = output_of(["ls", "-l", "/proc/self/fd"], fds={second: first, first: second})
    finally:
        for fd in (first, second, leak):
            os.close(fd)
    assert code == 0
    text = said.decode()
    assert f" {second} -> /memfd:first" in text
    assert f" {first} -> /memfd:second" in text
    assert "leak" not in text


def test_a_child_has_its_own_session_empty_stdin_and_default_signals() -> None:
    # Asked by a shell, because Python itself ignores SIGPIPE when it starts.
    argv = ["sh", "-c", "grep -E 'SigIgn|SigBlk' /proc/self/status; env"]
    code, said = output_of(argv, env={"PATH": os.environ["PATH"], "X": "1"})
    assert code == 0
    assert b"SigBlk:\t0000000000000000" in said
    ignored = int(said.partition(b"SigIgn:\t")[2].split()[0], 16)
    # Two signals are the C library's own (nptl(7)), which it lets nobody reset. What was ignored when this program began, by
    # nohup(1) or by a shell in the background, stays so; what Python itself ignores does not.
    mine = int(Path("/proc/self/status").read_text().partition("SigIgn:\t")[2].split()[0], 16)
    kept = 1 << 31 | 1 << 32 | mine & ~(1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
    assert ignored & ~kept == 0
    assert b"X=1" in said and b"HOME=" not in said
    ask = "import os, sys; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '')"
    code, said = output_of([sys.executable, "-I", "-c", ask])
    assert said == b"True True\n"


def test_errors_name_the_step_and_leave_no_child(tmp_path: Path) -> None:
    before = children()  # pytest may have some of its own, multiprocessing's resource tracker for one
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    plain.chmod(0o755)
    with pytest.raises(OSError, match="execve") as caught:
        native.spawn([str(plain)], output=2)
    assert caught.value.errno == errno.ENOEXEC
    with pytest.raises(OSError, match="dup2") as caught:
        native.spawn(["true"], output=2, fds={10: 999})
    assert caught.value.errno == errno.EBADF
    with pytest.raises(EnvironmentProblem, match="no-such-program"):
        native.spawn(["no-such-program"], output=2)
    with pytest.raises(UsageError, match="standard streams"):
        native.spawn(["true"], output=2, fds={1: 2})
    assert children() <= before


def test_a_child_that_would_die_with_a_thread_is_refused() -> None:
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            native.spawn(["true"], output=2)
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "main one" in str(caught[0])


def test_a_child_dies_with_a_killed_supervisor() -> None:
    """The grandchild holds the write end of a pipe: its end is the pipe's end."""
    reader, writer = os.pipe()
    program = ("import sys, time; from sfparallel import native; "
               "native.spawn(['sleep', '1000'], output=2, fds={3: int(sys.argv[1])}); "
               "print('started', flush=True); time.sleep(1000)")
    with subprocess.Popen([sys.executable, "-c", program, str(writer)], stdout=subprocess.PIPE, pass_fds=[writer]) as supervisor:
        os.close(writer)
        assert supervisor.stdout is not None and supervisor.stdout.readline() == b"started\n"
        supervisor.kill()
    with open(reader, "rb") as stream:
        assert select.select([stream], [], [], HANG_S)[0], "the child is still alive"
        assert stream.read() == b""


def test_many_children_are_started_while_signals_arrive() -> None:
    """A handler of ours must never run in a child that still shares our memory."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(os.getpid()))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        codes = [output_of(["true"])[0] for _ in range(50)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert codes == [0] * 50
    assert set(seen) == {os.getpid()}


@pytest.mark.needs("root")
def test_a_private_mount_is_seen_by_nobody_else(tmp_path: Path) -> None:
    seen: list[str] = []

    def look() -> None:
        native.mount_private_tmpfs(tmp_path, size_bytes=1 << 20)
        (tmp_path / "inside").write_text("x")
        seen.extend(os.listdir(tmp_path))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == ["inside"]
    assert os.listdir(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.needs("root")
def test_inside_comes_back_also_from_an_exception() -> None:
    home = os.readlink("/proc/thread-self/ns/net")
    namespace = native.new_network_namespace()
    try:
        assert os.readlink("/proc/thread-self/ns/net") == home
        with contextlib.suppress(KeyError), native.inside(namespace):
            assert os.readlink("/proc/thread-self/ns/net") == os.readlink(f"/proc/self/fd/{namespace}") != home
            raise KeyError
        assert os.readlink("/proc/thread-self/ns/net") == home
    finally:
        os.close(namespace)
    with pytest.raises(OSError, match="setns"), native.inside(0):
        pass
