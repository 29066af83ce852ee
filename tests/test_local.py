"""`sfrun --local`: the same calls on processes of this host, and nothing of them left afterwards, however it ends."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfparallel.runtime.local import _Cradle
from sfparallel.vmm import processes
from tests.conftest import BIN, HANG_S, Ended, Sfrun, children_of

NOTICE = "sfrun --local: clones are processes of this host; nothing is isolated, and files are written directly\n"
GONE_WITHIN_S = 30

Local = Callable[..., Ended]


@pytest.fixture
def local(sfrun: Sfrun) -> Local:
    """`sfrun --local`; the line that says what it is is taken off stderr."""

    def run(program: str, *options: str, args: tuple[str, ...] = (), stdin: str | None = None) -> Ended:
        ended = sfrun(program, "--local", *options, args=args, stdin=stdin)
        assert ended.err.startswith(NOTICE)
        ended.err = ended.err.removeprefix(NOTICE)
        return ended

    return run


def test_a_mistaken_n_does_not_take_all_processes_of_the_host(local: Local) -> None:
    ended = local(
        """
        import sfparallel as sf
        try:
            sf.parallel(n=10**6)(lambda: 1)()
        except sf.CapacityError as error:
            print(error.fits)
        """
    ).ok()
    assert ended.out == "1024\n"


def test_regions_maps_labels_and_the_communicator(local: Local) -> None:
    ended = local(
        """
        import sys
        import sfparallel as sf

        woken = []
        sf.on_clone(woken.append)

        @sf.parallel
        def f(x):
            me = sf.comm()
            print(f"rank {me.rank} of {me.size}")
            print("oops", file=sys.stderr)
            me.barrier()
            return me.bcast(x if me.rank == 1 else None, root=1) * me.rank, woken, sf.in_clone()

        print("before")
        print(f(10))
        print(sf.parallel_map(lambda x: x * x, range(5)), sf.in_clone(), sf.comm().size)
        """,
        "-n", "3",
    ).ok()  # fmt: skip
    lines = ended.out.splitlines()
    assert lines[0] == "before"
    assert sorted(lines[1:4]) == [f"[{rank}] rank {rank} of 3" for rank in range(3)], "shown before the region returns"
    assert lines[4:] == ["[(0, [0], True), (10, [1], True), (20, [2], True)]", "[0, 1, 4, 9, 16] False 1"]
    assert sorted(ended.err.splitlines()) == [f"[{rank}] oops" for rank in range(3)]


def test_low_level_calls_and_clones_of_clones(local: Local) -> None:
    ended = local(
        """
        import sfparallel as sf

        ticket = sf.request_ticket(2)
        me = sf.clone(ticket)
        if me:
            @sf.parallel(n=2)
            def inner():
                return sf.comm().rank + 10 * me
            print(inner())
            sf.exit(me)
        print(sf.join(ticket))
        """,
        "--no-label",
    ).ok()  # fmt: skip
    assert sorted(ended.out.splitlines()[:2]) == ["[10, 11]", "[20, 21]"]
    assert ended.out.splitlines()[2] == "{1: 1, 2: 2}"


def test_errors_of_ranks_and_lost_clones(local: Local) -> None:
    ended = local(
        """
        import os, signal
        import sfparallel as sf

        @sf.parallel(n=3, on_error="return")
        def work(how):
            if sf.comm().rank == 1:
                how()
            return sf.comm().rank

        def raises():
            raise ValueError("mine")

        for how in (raises, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)):
            zero, error, two = work(how)
            print(zero, two, type(error).__name__, getattr(error, "rank", None), getattr(error, "cause", error))
        """
    ).ok()
    assert ended.out.splitlines() == [
        "0 2 ValueError None mine",
        "0 2 CloneLost 1 its process was killed by signal 9 (Killed)",
        "0 2 CloneLost 1 its program exited with status 3 before it answered",
    ]


def test_kill_9_of_a_clone_from_outside_is_reported_at_once(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import os, time
        import sfparallel as sf

        @sf.parallel(n=2)
        def work():
            print(os.getpid(), flush=True)
            time.sleep(1000)

        try:
            work()
        except sf.CloneLost as error:
            print("lost", error.cause)
        """,
        "--local", "--no-label",
    )  # fmt: skip
    assert process.stdout
    pids = [int(process.stdout.readline()) for _ in range(2)]
    os.kill(pids[0], signal.SIGKILL)
    out, err = process.communicate(timeout=HANG_S)
    assert (out, process.returncode) == ("lost its process was killed by signal 9 (Killed)\n", 0), err


def test_timeouts_collected_files_and_files_written_directly(local: Local, sfrun: Sfrun) -> None:
    ended = local(
        """
        import pathlib, time
        import sfparallel as sf

        @sf.parallel(n=2, collect="*.out")
        def write():
            rank = sf.comm().rank
            pathlib.Path(f"{rank}.out").write_text(f"collected {rank}")
            pathlib.Path(f"{rank}.txt").write_text(f"direct {rank}")

        write()

        @sf.parallel(n=2, timeout=0.5)
        def slow():
            if sf.comm().rank:
                time.sleep(1000)

        try:
            slow()
        except sf.RegionTimeout as error:
            print(1 in error.missing)
        """
    ).ok()
    assert ended.out == "True\n"
    for rank in range(2):
        assert (sfrun.folder / f"{rank}.out").read_text() == f"collected {rank}"
        assert (sfrun.folder / f"{rank}.txt").read_text() == f"direct {rank}"


def test_seeds_give_the_numbers_that_they_give_in_vms(local: Local) -> None:
    # Streams are defined by numpy's SeedSequence, seed and rank (see the reference), so these are the right ones.
    program = """
        import random, numpy as np
        import sfparallel as sf

        @sf.parallel(n=2)
        def draw():
            return sf.rng().integers(1000), random.random(), np.random.random()

        a, b = draw.options(seed=7)()
        expected = [np.random.default_rng(each).integers(1000) for each in np.random.SeedSequence(7).spawn(2)]
        assert [a[0], b[0]] == expected
        assert a[1] != b[1] and a[2] != b[2]
        print(draw()[0][0], sf.rng().integers(1000))
    """
    assert local(program, "--seed", "5").ok().out == local(program, "--seed", "5").ok().out


def test_streams_arguments_environment_and_exit_codes(local: Local) -> None:
    program = """
        import os, sys
        print(sys.argv[1:], os.environ["COLOUR"], os.environ.get("SF_LOCAL"), sys.stdin.read(), __name__)
        sys.exit(7)
    """
    ended = local(program, "--env", "COLOUR=blue", args=("-n", "x"), stdin="given")
    assert (ended.out, ended.err, ended.code) == ("['-n', 'x'] blue None given __main__\n", "", 7)
    ended = local("raise ValueError('mine')")
    assert ended.code == 1
    assert re.fullmatch(r'Traceback .*:\n  File "\S*program.py", line 1, in <module>\n.*\nValueError: mine\n', ended.err, re.S)
    assert local("import os, signal; os.kill(os.getpid(), signal.SIGTERM)").code == 128 + signal.SIGTERM
    ended = local("import time; time.sleep(1000)", "--timeout", "0.5")
    assert (ended.code, ended.err) == (124, "sfrun: stopped after 0.5 s (--timeout)\n")


def _run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "sfrun"), "--local", *words], capture_output=True, text=True, timeout=HANG_S,
                          env={**os.environ, **settings})  # fmt: skip


def test_commands_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import sfparallel as sf\nprint(__name__, sf.parallel(lambda: 1, n=2)())")
    assert _run("-c", "import sys; print(sys.argv)", "a").stdout == "['-c', 'a']\n"
    ended = _run("-m", "mine")
    assert ended.stdout == "__main__ [1, 1]\n", ended.stderr
    # Modules of the current folder belong to the program, and not to what runs before it.
    for name in ("os", "io", "socket", "sfparallel", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('this is not yours')")
    assert _run("-c", "import sys; print(sys.argv)", "a").stdout == "['-c', 'a']\n"
    assert "SystemError: this is not yours" in _run("-c", "import socket").stderr


def test_it_says_what_it_is_and_what_it_cannot() -> None:
    assert _run("-c", "").stderr == NOTICE
    assert _run("-c", "", SF_LOG="error").stderr == ""
    for options in (("--stats",), ("--trace", "x.json"), ("--forward", "1:2")):
        ended = _run(*options, "-c", "")
        assert ended.returncode == 2 and "--local" in ended.stderr


def test_a_clone_whose_parent_is_gone_ends_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    parent = subprocess.Popen(["true"])
    parent.wait()
    clone = os.fork()
    if clone == 0:
        try:
            _Cradle(1).wait(parent.pid)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(clone, 0)[1]) == os.EX_SOFTWARE
    assert capfd.readouterr().err == ""


def test_it_needs_no_privilege_and_no_qemu() -> None:
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
    program = "import sfparallel as sf; print(sf.parallel(lambda: sf.comm().rank, n=2)())"
    ended = subprocess.run([*words, str(BIN / "sfrun"), "--local", "-c", program], capture_output=True, text=True, timeout=HANG_S,
                           env={"PATH": "/usr/bin:/bin"})  # fmt: skip
    assert (ended.stdout, ended.returncode) == ("[0, 1]\n", 0), ended.stderr


# ---- nothing is left ----

_FAMILY = """
    import os, subprocess, time
    import sfparallel as sf

    @sf.parallel(n=2)
    def work():
        @sf.parallel(n=2)
        def inner():
            sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            print(os.getpid(), sleeper.pid, flush=True)
            time.sleep(1000)
        inner()

    print(os.getpid(), flush=True)
    work()
"""


@pytest.fixture
def family(sfrun: Sfrun) -> Iterator[tuple[subprocess.Popen[str], int, list[int]]]:
    """A running job with clones of clones and their subprocesses: `sfrun`, the program's process, and pidfds of all."""
    process = sfrun.start(_FAMILY, "--local", "--no-label")
    assert process.stdout
    program = int(process.stdout.readline())
    pids = [int(word) for _ in range(4) for word in process.stdout.readline().split()]
    pidfds = [os.pidfd_open(pid) for pid in (program, *pids)]
    yield process, program, pidfds
    for pidfd in pidfds:
        os.close(pidfd)


def _assert_gone(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], GONE_WITHIN_S)[0], "a process of the job is left"


Family = tuple[subprocess.Popen[str], int, list[int]]


def test_more_descriptors_than_select_takes(tmp_path: Path) -> None:
    """Ours get numbers above 1023, as with hundreds of clones; one of these lives when another one's output is waited for."""
    program = ("import sfparallel as sf; executor = sf.Executor(1); executor.submit(print, 'kept').result(); "
               "print(sf.parallel(n=1)(lambda: 7)()); executor.shutdown()")
    hold = ("import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(7)[1])); "
            "null = os.open(os.devnull, os.O_RDWR); "
            "[os.dup2(null, number) for number in range(null, 1100)]; os.execv(sys.argv[1], sys.argv[1:])")
    argv = [sys.executable, "-c", hold, str(BIN / "sfrun"), "--local", "-c", program]
    ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout == "[0] kept\n[7]\n", ended.stderr


def test_ctrl_c(family: Family) -> None:
    process, _, pidfds = family
    process.send_signal(signal.SIGINT)
    _assert_gone(pidfds)
    assert process.wait(timeout=HANG_S) == 130
    assert process.stderr and "KeyboardInterrupt" in process.stderr.read()


def test_kill_9_of_sfrun(family: Family) -> None:
    process, _, pidfds = family
    process.kill()
    _assert_gone(pidfds)


def test_kill_9_of_the_supervisor(family: Family) -> None:
    process, _, pidfds = family
    (supervisor,) = children_of(process.pid)
    os.kill(supervisor, signal.SIGKILL)
    _assert_gone(pidfds)
    assert process.wait(timeout=HANG_S) == 128 + signal.SIGKILL


def test_kill_9_of_the_program(family: Family) -> None:
    process, program, pidfds = family
    os.kill(program, signal.SIGKILL)
    _assert_gone(pidfds)
    assert process.wait(timeout=HANG_S) == 128 + signal.SIGKILL


def test_a_clone_takes_with_it_what_it_started(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import os, signal, subprocess, sys, time
        import sfparallel as sf

        @sf.parallel(n=1, on_error="return")
        def work():
            @sf.parallel(n=1)
            def inner():
                print(os.getpid(), subprocess.Popen(["sleep", "1000"]).pid, flush=True)
                time.sleep(1000)
            inner.submit()
            sys.stdin.read()
            time.sleep(1000)

        print(os.getpid(), flush=True)
        future = work.submit()
        input()
        future.cancel()
        print("cancelled", flush=True)
        time.sleep(1000)
        """,
        "--local", "--no-label", stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdin
    process.stdout.readline()
    pidfds = [os.pidfd_open(int(word)) for word in process.stdout.readline().split()]
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "cancelled\n"
    _assert_gone(pidfds)
    for pidfd in pidfds:
        os.close(pidfd)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANG_S) == 128 + signal.SIGTERM


def test_a_thread_that_ends_does_not_take_its_clones_along(local: Local) -> None:
    # The kernel's parent-death signal is tied to the thread that forked; it is no way to end clones with their parent.
    ended = local(
        """
        import threading, time
        import sfparallel as sf

        futures = []
        def work():
            time.sleep(0.5)
            return sf.comm().rank

        thread = threading.Thread(target=lambda: futures.append(sf.parallel(work, n=2).submit()))
        thread.start()
        thread.join()
        print(futures[0].result())
        """
    ).ok()
    assert ended.out == "[0, 1]\n"


def test_end_descendants_reaches_all_generations() -> None:
    program = textwrap.dedent(
        """
        import os, subprocess, sys
        from sfparallel import native
        from sfparallel.vmm.local_job import end_descendants

        native.set_subreaper()
        shell = "setsid sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000' & echo started; wait"
        child = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE)
        child.stdout.readline()
        end_descendants()
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print("none is left", flush=True)
        os._exit(0)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S)
    assert "none is left" in ended.stdout, ended.stderr


def test_processes_finds_this_one() -> None:
    assert os.getpid() in processes.matching(lambda parent, _session: parent == os.getppid())
    assert os.getpid() in processes.matching(lambda _parent, session: session == os.getsid(0))
