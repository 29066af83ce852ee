"""Every way in which a parallel region can fail says what happened, to which rank, and what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sfparallel.config import cache_folder
from tests.conftest import BIN, HANG_S, Sfrun, left_overs, machines_of, wait_for_nothing_new

pytestmark = pytest.mark.needs("qemu", "image", "root")


def test_an_exception_keeps_its_type_and_says_its_rank(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        @sf.parallel(n=3)
        def f():
            if sf.comm().rank == 1:
                raise KeyError("the reason")
            return sf.comm().rank

        try:
            f()
        except KeyError as error:
            print(repr(error))
        f()
        """
    )
    assert ended.out.strip() == "KeyError('the reason')"
    assert ended.code == 1
    assert "rank 1" in ended.err and 'raise KeyError("the reason")' in ended.err


@pytest.mark.parametrize(
    ("death", "cause"),
    [
        ("os._exit(3)", "status 3"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("open('/proc/sysrq-trigger', 'w').write('c')", "kernel panic"),
        ("hog = [bytearray(50 << 20) for _ in range(200)]", "memory"),
    ],
    ids=["os._exit", "kill -9", "kernel panic", "out of memory"],
)
def test_a_clone_that_dies_is_reported_with_its_cause(sfrun: Sfrun, death: str, cause: str) -> None:
    ended = sfrun(
        f"""
        import os, time
        import sfparallel as sf

        @sf.parallel(n=3)
        def f():
            if sf.comm().rank == 2:
                time.sleep(1)      # the others have answered by then
                {death}
                time.sleep(60)
            return sf.comm().rank

        try:
            f()
        except sf.CloneLost as error:
            print(error.rank, sorted(error.results), error.cause)
        print(sf.parallel(n=2)(lambda: "the next call works")()[0])
        """,
        "--memory", "512M",
    ).ok()  # fmt: skip
    first, second = ended.out.strip().split("\n")[-2:]
    assert first.startswith("2 [0, 1] ") and cause in first
    assert second == "the next call works"


DYING_SHELLS = """
import asyncio, sys
from sfparallel import cli
from sfparallel.vmm.pool import Pool
from sfparallel.vmm.vm import VmState

take = Pool.take

async def take_and_kill_one(pool, n):
    shells = await take(pool, n)
    if n > 1:
        shells[1].kill()
        while shells[1].state is not VmState.GONE:
            await asyncio.sleep(0.001)
    elif "--fail" in sys.argv:
        raise IndexError("as in a mistake")
    return shells

Pool.take = take_and_kill_one
sys.exit(cli.sfrun([word for word in sys.argv[1:] if word != "--fail"]))
"""


def test_shells_that_die_right_before_they_become_clones(sfrun: Sfrun) -> None:
    program = sfrun.write(
        """
        import sfparallel as sf

        @sf.parallel(n=4, on_error="return")
        def rank():
            return sf.comm().rank

        for _ in range(3):
            zero, lost, two, three = rank()
            assert (zero, two, three) == (0, 2, 3)
            assert isinstance(lost, sf.CloneLost) and lost.rank == 1 and "killed by SIGKILL" in lost.cause, lost
        with sf.Executor(2) as executor:
            assert list(executor.map(abs, range(-20, 0))) == list(range(20, 0, -1))
        print("done")
        """
    )
    ended = subprocess.run([sys.executable, "-c", DYING_SHELLS, str(program)], cwd=sfrun.folder, capture_output=True, text=True,
                           timeout=HANG_S)  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_a_mistake_in_the_supervisor_ends_the_job(sfrun: Sfrun) -> None:
    program = sfrun.write("import sfparallel as sf; print(sf.parallel(abs, n=1)(-1))")
    ended = subprocess.run([sys.executable, "-c", DYING_SHELLS, "--fail", str(program)], cwd=sfrun.folder, capture_output=True,
                           text=True, timeout=HANG_S)  # fmt: skip
    assert ended.returncode != 0 and not ended.stdout
    assert "the parent VM is lost: the supervisor failed: IndexError('as in a mistake')" in ended.stderr


FAILING_LOAD = """
import asyncio, os, sys
from sfparallel import cli
from sfparallel.vmm.vm import Vm

load = Vm.load
failed = asyncio.Event()

async def load_or_fail(vm, plan, device_state):
    if vm.name == "parent":
        return await load(vm, plan, device_state)
    if not failed.is_set():
        failed.set()
        raise IndexError("as in a mistake")
    file = os.fstat(device_state).st_ino
    try:
        await asyncio.sleep(0.5)
    finally:
        if os.fstat(device_state).st_ino == file:
            print("still open", file=sys.stderr)

Vm.load = load_or_fail
sys.exit(cli.sfrun(sys.argv[1:]))
"""


def test_a_mistake_in_one_clones_start_ends_the_others_first(sfrun: Sfrun) -> None:
    """No start may go on when the checkpoint's descriptors are closed: their numbers may belong to something else by then."""
    program = sfrun.write("import sfparallel as sf; print(sf.parallel(abs, n=3)(-1))")
    ended = subprocess.run([sys.executable, "-c", FAILING_LOAD, str(program)], cwd=sfrun.folder, capture_output=True, text=True,
                           timeout=HANG_S)  # fmt: skip
    assert ended.returncode != 0 and not ended.stdout
    assert "the parent VM is lost: the supervisor failed: IndexError('as in a mistake')" in ended.stderr
    assert ended.stderr.count("still open") == 2, ended.stderr


def test_kill_9_of_a_clones_qemu(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import time
        import sfparallel as sf

        @sf.parallel(n=2)
        def f():
            print("alive", flush=True)
            time.sleep(1000)

        try:
            f()
        except sf.CloneLost as error:
            print("lost", error.rank, error.cause, flush=True)
        """,
        "--no-label", "--pool", "0",
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "alive\n"
    assert process.stdout.readline() == "alive\n"
    os.kill(machines_of(process.pid)[1], signal.SIGKILL)  # after the parent come the clones; the pool has others by now
    out, err = process.communicate(timeout=HANG_S)
    assert "SIGKILL" in out and out.startswith("lost"), (out, err)


def test_timeout_names_the_missing_ranks(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import time
        import sfparallel as sf

        @sf.parallel(n=3)
        def f():
            if sf.comm().rank == 1:
                time.sleep(1000)
            return sf.comm().rank

        for limit in (4, 16, 64):  # on a busy machine the fork alone, which counts, may take longer
            try:
                f.options(timeout=limit)()
            except TimeoutError as error:
                missing, results = error.missing, dict(sorted(error.results.items()))
                if missing == [1]:
                    break
        print(missing, results)
        """
    ).ok()
    assert ended.out.strip() == "[1] {0: 0, 2: 2}"


def test_ctrl_c_stops_the_clones_and_reaches_the_parent(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import time
        import sfparallel as sf

        @sf.parallel(n=2)
        def f():
            print("alive", flush=True)
            time.sleep(1000)

        try:
            f()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(sf.parallel(n=1)(lambda: "the prompt is back")())
        """,
        "--no-label",
    )
    assert process.stdout
    assert [process.stdout.readline(), process.stdout.readline()] == ["alive\n", "alive\n"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_S)
    assert out.splitlines() == ["interrupted", "['the prompt is back']"], err
    assert process.returncode == 0


def test_the_second_ctrl_c_ends_the_job_without_ado(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import time

        def forever():
            while True:  # a signal just before the system call does not end a sleep (signal(7)): the next one must come soon
                time.sleep(0.05)

        try:
            print("alive", flush=True)
            forever()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            forever()
        """
    )
    assert process.stdout
    for line in ("alive\n", "interrupted\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert "lost" not in err


def test_tickets_of_another_program_are_out_of_reach(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf
        from sfparallel.runtime.connection import connect

        ticket = sf.request_ticket(1)
        if sf.clone(ticket):
            sf.exit(7)
        stranger = connect()
        for attack in (stranger.kill, stranger.join):
            try:
                attack(ticket.number, None)
            except sf.StateError as error:
                print(error.message)
        try:
            stranger.request_ticket(float("inf"))
        except sf.UsageError as error:
            print("must be a whole number" in error.message)
        print(sf.join(ticket))
        """
    ).ok()
    assert ended.out.splitlines() == ["there is no ticket 1 here"] * 2 + ["True", "{1: 7}"]


def test_a_result_that_cannot_be_pickled(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import threading
        import sfparallel as sf

        try:
            sf.parallel(n=2)(lambda: threading.Lock())()
        except sf.ResultNotPicklable as error:
            print(error)
        file = open(__file__)
        try:
            sf.parallel(n=2)(lambda: [file])()
        except sf.ResultNotPicklable as error:
            print(error)
        """
    ).ok()
    assert ended.out.count("hint: ") == 2 and "open file" in ended.out
    assert ended.out.count("the result of rank 0") + ended.out.count("the result of rank 1") == 2


def test_a_full_disk_in_a_vm_says_that_files_are_in_memory(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import errno, os
        import sfparallel as sf

        def fill():
            with open("big", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, 2 << 30)   # refused at once; writing would take its time

        try:
            sf.parallel(n=1)(fill)()
        except OSError as error:
            print(error.errno == errno.ENOSPC, *error.__notes__)
        fill()
        """
    )
    assert ended.code == 1
    for text in (ended.out, ended.err):
        for words in ("in the VM's RAM", "--memory", "collect=", "--data"):
            assert words in text
    assert ended.out.startswith("True") and "rank 0" in ended.out


def test_what_cannot_be_written_to_the_host_is_told_once(sfrun: Sfrun) -> None:
    (sfrun.folder / "closed").mkdir()
    program = """
        import os
        open("open.txt", "w").write("arrives")
        os.chdir("closed")
        os.makedirs("deep/deeper")
        for name in ("a", "b", "deep/c", "deep/deeper/d"):
            open(name, "w").write("lost")
        """
    closed = str(sfrun.folder / "closed")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", closed], check=True)
    try:
        ended = sfrun(program)
    finally:
        subprocess.run(["umount", closed], check=True)
    assert ended.code == 1
    lines = ended.err.splitlines()
    assert lines[-5:] == [
        "sfrun: 3 changes of the program could not be written to the host:",
        *(f"  {closed}/{name}: Read-only file system" for name in ("a", "b", "deep")),
        "  hint: make the folder writable, or work in another one, then run again; all other changes are on the host",
    ]
    assert ended.err.count("Read-only") == 3
    assert (sfrun.folder / "open.txt").read_text() == "arrives"


def test_more_clones_than_the_host_can_hold(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf
        try:
            sf.parallel(n=50_000)(lambda: 1)()
        except sf.CapacityError as error:
            print(error.fits > 0, str(error.fits) in str(error))
        """
    ).ok()
    assert ended.out.strip() == "True True"


def test_outside_a_vm(tmp_path: Path) -> None:
    import sfparallel

    with pytest.raises(sfparallel.OutsideVMError, match="sfrun"):
        sfparallel.parallel(n=2)(lambda: 1)()
    assert not sfparallel.in_clone()


def test_a_missing_image_names_the_command_that_builds_it(sfrun: Sfrun) -> None:
    ended = sfrun("print(1)", "--image", "nowhere")
    assert ended.code == 70
    assert "sf image build nowhere" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "option", [["-n", "0"], ["--memory", "lots"], ["--forward", "x"], ["--env", "=1"], ["--data", "/nowhere"], ["--data", "/usr"]]
)
def test_bad_options(sfrun: Sfrun, option: list[str]) -> None:
    ended = sfrun("print(1)", *option)
    assert ended.code == 2
    assert "Traceback" not in ended.err and ended.err.strip()


def test_a_command_that_is_not_text() -> None:
    ended = subprocess.run([BIN / "sfrun", "-c", b"print('\xff')"], capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 2
    assert "not valid UTF-8" in ended.stderr and "Traceback" not in ended.stderr


def test_kill_9_of_the_parents_qemu(sfrun: Sfrun) -> None:
    before = left_overs()
    process = sfrun.start("import time; print('up', flush=True); time.sleep(1000)")
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    os.kill(machines_of(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 70
    assert "parent VM is lost" in err
    assert not wait_for_nothing_new(before)


def test_a_full_disk_under_the_cache_folder(sfrun: Sfrun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template does not fit: one clear error, nothing half-written, and the next job starts over."""
    cache = tmp_path / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(cache)], check=True)
    try:
        (cache / "images").symlink_to(cache_folder() / "images")
        monkeypatch.setenv("SF_CACHE", str(cache))
        ended = sfrun("print(1)")
        assert ended.code == 70
        assert "No space left" in ended.err and "hint:" in ended.err and "Traceback" not in ended.err
        assert not list((cache / "templates").glob("*/manifest.json"))
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_no_permission_is_one_clear_error(sfrun: Sfrun) -> None:
    script = sfrun.write("print(1)")
    ended = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", str(BIN / "sfrun"), str(script)],
        capture_output=True, text=True, timeout=HANG_S, cwd=sfrun.folder,
    )  # fmt: skip
    assert ended.returncode == 70
    assert "Traceback" not in ended.stderr and "not permitted" in ended.stderr and "run as root" in ended.stderr
