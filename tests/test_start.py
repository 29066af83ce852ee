"""The start of a job: nothing waits without a limit, a cache that is damaged or cannot be written, and odd surroundings."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem, VMError
from sfparallel.vmm import engine, locks, native_parts, template
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.command_errors import errors_told
from sfparallel.vmm.layers import MemoryMap
from sfparallel.vmm.paging import PagingStep
from sfparallel.vmm.record import ForkReport
from sfparallel.vmm.vm import Sockets, Vm, VmState
from sfparallel.vmm.waiting import in_thread, within
from sfparallel.wire import FrameType, pack
from tests.conftest import BIN, HANG_S, Sfrun, command_of, descendants, machines_of
from tests.hostile_guest import hostile_guest

vms = pytest.mark.needs("qemu", "image", "root")
SMALL = ("--memory", "300M")
"""A size of guests that no other test has, so that no template of it is in the cache folder that all share."""


# -- limits --------------------------------------------------------------------------------------------------------------


def test_an_error_names_what_was_waited_for_and_what_was_seen_of_it() -> None:
    async def wait() -> None:
        async with within(0.01, "a bus", error=EnvironmentProblem, hint="walk", detail=lambda: "the road is empty"):
            await asyncio.sleep(100)

    with pytest.raises(EnvironmentProblem, match=r"waited 0\.01 s for a bus, and gave up\nthe road is empty\n  hint: walk"):
        asyncio.run(wait())


def test_a_timeout_from_within_the_block_is_not_ours() -> None:
    async def wait() -> None:
        async with within(100, "a bus"):
            raise TimeoutError("another one")

    with pytest.raises(TimeoutError, match="another one"):
        asyncio.run(wait())


def test_the_loop_ends_without_a_thread_that_is_stuck(tmp_path: Path) -> None:
    """It would be joined if it were of the loop's executor."""
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        async def wait() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(in_thread(locks.hold, tmp_path / "lock", lambda: None), 0.1)

        asyncio.run(wait())


def test_a_qemu_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_START_LIMIT", "0.2")
    sleeper = os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)  # the VM reaps it

    async def prepare() -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM,) * 2 + (socket.SOCK_SEQPACKET,)]
        console = os.memfd_create("console")
        os.write(console, b"what it said last\n")
        gone = asyncio.get_running_loop().create_future()
        vm = Vm("clone 7", sleeper, Sockets(*(pair[0] for pair in pairs), console), child=True)
        vm.events.on_gone = lambda *_: gone.set_result(None)
        with pytest.raises(VMError, match=r"clone 7 did not start: waited 0\.2 s for QEMU's monitor, and gave up\nwhat it"):
            await vm.prepare(1 << 20)
        vm.kill()
        await gone
        for _, other in pairs:
            other.close()

    asyncio.run(prepare())


@vms
@pytest.mark.parametrize("has", ["", "/memory"], ids=["starts", "loads"])
def test_a_parent_that_stands_still_ends_the_job_with_what_was_waited_for(
    sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch, has: str
) -> None:
    monkeypatch.setenv("SF_START_LIMIT", "20")
    process = sfrun.start("print('ran')")
    shells: list[int] = []
    while not shells:
        assert process.poll() is None
        # Not the launcher, which another one would replace: it has that name from its first shell on.
        if any(command_of(pid).startswith("sf-launcher") for pid in descendants(process.pid)):
            found = [pid for pid in machines_of(process.pid) if "-incoming" in command_of(pid)]
            shells = [pid for pid in found if has in Path(f"/proc/{pid}/maps").read_text()]
    os.kill(shells[0], signal.SIGSTOP)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 70 and out == ""
    assert "waited 20 s for" in err and "parent VM is lost" not in err, err


@pytest.mark.parametrize("answers", [False, True], ids=["prepares", "saves"])
def test_a_vm_that_stands_still_while_it_is_saved(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """Before its processors stand still, the fork fails; behind that, only the end of that VM is one."""
    monkeypatch.setenv("SF_START_LIMIT", "4")

    async def fork() -> None:
        async with hostile_guest("parent") as guest:
            vm, store = guest.vm, LayerStore()
            vm.ram_bytes, vm.memory = 1 << 20, MemoryMap.zero(256)
            saving = asyncio.create_task(engine.save(vm, store, ForkReport(0, 0.0)))
            if answers:  # that it cannot prepare; then its agent says FROZEN, and its monitor nothing any more
                await asyncio.wait_for(guest.refuse(PagingStep.MEMORY), 60)
                (frame,) = await guest.hear()
                assert frame.type is FrameType.FREEZE
                await guest.send(FrameType.FROZEN, pack({"oom_kills": 0, "agent": "1"}))
            said = "parent" if answers else r"waited [\d.]+ s for the QEMU of parent to prepare a save"
            with pytest.raises(VMError, match=said):
                await asyncio.wait_for(saving, 60)
            if answers:
                assert "s for its QEMU to save it" in await guest.end()
            else:
                assert vm.state is VmState.RUNNING
            store.close()

    asyncio.run(fork())


def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_START_LIMIT", "soon")
    ended = subprocess.run([BIN / "sfrun", "-c", "pass"], capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 2 and "SF_START_LIMIT='soon'" in ended.stderr


# -- locks -----------------------------------------------------------------------------------------------------------------


def test_a_lock_whose_file_was_removed_meanwhile_keeps_others_out(tmp_path: Path) -> None:
    """`sf clean` removes the file of a free lock; who opened it just before must not build beside who makes it anew."""
    path = tmp_path / "lock"
    first = locks.hold(path, lambda: None)
    waiting: list[bool] = []

    def removed_while_waiting() -> None:
        waiting.append(True)
        path.unlink()
        os.close(first)

    second = locks.hold(path, removed_while_waiting)
    assert waiting
    with open(path) as third, pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(second)


def test_what_is_locked_exclusively_is_open_for_writing(tmp_path: Path) -> None:
    """NFS refuses the lock otherwise (flock(2)), and with it `sf clean`, `sf df`, and each start with a `--data` that changed."""
    image = tmp_path / "image"
    image.touch()
    with locks.taken(image) as ours:
        (held,) = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(image)]
        assert ours and fcntl.fcntl(held, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    with locks.taken(tmp_path) as ours:  # a folder cannot be
        assert ours


def test_who_waits_for_a_template_says_so_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "LOCK_LIMIT_S", 0.2)
    said: list[str] = []

    async def wait() -> None:
        async with template._locked(tmp_path / "key.lock", said.append):
            pass

    held = locks.hold(tmp_path / "key.lock", lambda: None)
    with pytest.raises(EnvironmentProblem, match=r"waited 0\.2 s for another job that is making this template and holds"):
        asyncio.run(wait())
    os.close(held)
    assert said == ["waiting for another job that is making this template"]


BUILDER = """
import sys
from pathlib import Path
from sfparallel.vmm import native_parts
from sfparallel.vmm.initramfs import build
print(native_parts.trouble_with_program(build(Path(sys.argv[1]))))
"""


@pytest.mark.needs("root")
def test_starts_that_build_the_agent_at_once(tmp_path: Path) -> None:
    """One makes it, and the others wait for all of it."""
    folder = tmp_path / "agent"
    shutil.copytree(native_parts.AGENT.parent, folder, ignore=shutil.ignore_patterns(native_parts.AGENT.name))
    runs = tmp_path / "runs"
    (tmp_path / "cc").write_text(f"#!/bin/sh\ncase \"$*\" in *' -o '*) echo run >> {runs};; esac\nexec gcc \"$@\"\n")
    (tmp_path / "cc").chmod(0o755)
    environment = {**os.environ, "CC": str(tmp_path / "cc"), "CFLAGS": "-O0"}
    starts = [subprocess.Popen([sys.executable, "-c", BUILDER, folder / native_parts.AGENT.name], stdout=subprocess.PIPE,
                               text=True, env=environment) for _ in range(3)]  # fmt: skip
    assert [(start.communicate(timeout=300)[0], start.returncode) for start in starts] == [("\n", 0)] * 3
    assert runs.read_text() == "run\n"


# -- the cache folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, with the images and without any template."""
    folder = tmp_path / "cache"
    (folder / "templates").mkdir(parents=True)
    (folder / "images").symlink_to(cache_folder() / "images")
    monkeypatch.setenv("SF_CACHE", str(folder))
    return folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@vms
def test_a_damaged_template_heals_and_then_does_in_a_cache_that_cannot_be_written(sfrun: Sfrun, cache: Path) -> None:
    sfrun("print(1)", *SMALL).ok()
    (folder,) = (cache / "templates").glob("*")
    (folder / "manifest.json").unlink()
    ended = sfrun("print(2)", *SMALL).ok()
    assert (ended.out, "booting the guest once" in ended.err) == ("2\n", True)
    assert [path.name for path in (cache / "templates").iterdir()] == [folder.name]
    with read_only(cache):
        ended = sfrun("print(3)", *SMALL).ok()
        assert (ended.out, ended.err) == ("3\n", "")
        other = sfrun("print(4)", "--memory", "310M")
    assert other.code == 70 and "Read-only" in other.err and "SF_CACHE" in other.err and "sf image build" in other.err


@vms
def test_a_template_that_cannot_be_made_leaves_nothing(sfrun: Sfrun, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = cache / "qemu"
    qemu.write_text('#!/bin/sh\n[ "$1" = --version ] && exec qemu-system-x86_64 --version\nexec false\n')
    qemu.chmod(0o755)
    monkeypatch.setenv("SF_QEMU", str(qemu))
    ended = sfrun("print(1)", *SMALL)
    assert ended.code == 70 and "template did not start" in ended.err, ended.err
    assert list((cache / "templates").iterdir()) == []


def test_a_manifest_of_which_a_crash_has_left_half_is_none(tmp_path: Path) -> None:
    for text, is_one in (("{", False), ("", False), ("[]", False), ("{}", True)):
        (tmp_path / "manifest.json").write_text(text)
        assert template._is_template(tmp_path) is is_one


@vms
def test_sigterm_ends_a_start_that_waits_for_another_ones_template(sfrun: Sfrun, cache: Path) -> None:
    first = sfrun.start("print(1)", *SMALL)
    while not (found := list((cache / "templates").glob("*.lock"))):
        assert first.poll() is None
    assert first.stderr and "booting the guest once" in first.stderr.readline()
    second = sfrun.start("print(2)", *SMALL)
    assert second.stderr and second.stderr.readline() == "waiting for another job that is making this template\n"
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=HANG_S)
    assert second.returncode == 128 + signal.SIGTERM
    assert found[0].exists() and first.poll() is None
    first.kill()


# -- surroundings ------------------------------------------------------------------------------------------------------------


@vms
def test_an_empty_environment(sfrun: Sfrun) -> None:
    program = sfrun.write("import sfparallel as sf; print(sf.parallel(n=2)(lambda: sf.comm().rank)())")
    ended = subprocess.run(["env", "-i", f"SF_CACHE={cache_folder()}", BIN / "sfrun", program], capture_output=True, text=True,
                           cwd=sfrun.folder, timeout=HANG_S)  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "[0, 1]\n"), ended.stderr


@pytest.mark.parametrize(("option", "files"), [("--local", 8), pytest.param("", 24, marks=vms)])
def test_a_limit_of_open_files_is_named(sfrun: Sfrun, option: str, files: int) -> None:
    command = f"ulimit -n {files}; exec {BIN / 'sfrun'} {option} -c 'print(1)'"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=sfrun.folder, timeout=HANG_S)
    assert ended.returncode == 70 and "ulimit -n" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


FULL = """
import os, resource, sys
from pathlib import Path
from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm.command_errors import errors_told
from sfparallel.vmm.data import data_image
from sfparallel.vmm.launcher import Launcher
from sfparallel.vmm.subprocesses import run
def step_down():
    os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
def full():
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
    while True:
        os.open("/dev/null", os.O_RDONLY)
def image():
    try:
        full()
    except OSError:
        data_image(Path("/usr/share"), print)
with errors_told("sfrun"):
    {fails}
"""


@pytest.mark.needs("root")
@pytest.mark.parametrize(("fails", "said"), [
    ("step_down(); os.fork()", "ulimit -u"), ("step_down(); run(['true'], what='try')", "ulimit -u"),
    ("step_down(); Launcher(['true'], '')", "ulimit -u"),
    ("full()", "ulimit -n"), ("image()", "ulimit -n"), ("raise OSError(23, 'open')", "fs.file-max"),
])  # fmt: skip
def test_a_limit_that_is_reached_is_named(tmp_path: Path, fails: str, said: str) -> None:
    """By a user without privileges: root may have more processes than that, and more open files than the host."""
    environment = {**os.environ, "SF_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, "-c", FULL.format(fails=fails)], capture_output=True, text=True, env=environment,
                           timeout=60)  # fmt: skip
    assert ended.returncode == 70 and said in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def test_a_thread_that_cannot_be_started_is_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), errors_told("sfrun"):
        raise RuntimeError("can't start new thread")  # as threading says it
    assert "ulimit -u" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "hint"), [
    (errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max"), (errno.EAGAIN, "ulimit -u"), (errno.EROFS, "SF_CACHE"),
])  # fmt: skip
def test_a_limit_of_the_machine_is_told_with_its_remedy(number: int, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors_told("sfrun"):
        raise OSError(number, os.strerror(number))
    told = capsys.readouterr().err
    assert ended.value.code == 70 and os.strerror(number) in told and hint in told and "Traceback" not in told


def test_a_limit_of_address_space_is_named_whatever_meets_it() -> None:
    program = """
import errno, os
from sfparallel.vmm.command_errors import errors_told
with errors_told("sfrun"):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "some/folder")
"""
    for command, hint in ("ulimit -v 4000000; ", "ulimit -v"), ("", "sf doctor"):
        words = ["sh", "-c", f'{command}exec "$0" -c "$1"', sys.executable, program]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=HANG_S)
        assert ended.returncode == 70 and "some/folder" in ended.stderr and hint in ended.stderr, ended.stderr


@vms
@pytest.mark.parametrize("kib", [150_000, 300_000])
def test_a_limit_of_address_space_is_named(sfrun: Sfrun, kib: int) -> None:
    """The first is too low for the supervisor itself (from 140,000 down numpy's library ends it), the second for QEMU."""
    command = f"ulimit -v {kib}; exec {BIN / 'sfrun'} -c 'print(1)'"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=sfrun.folder, timeout=HANG_S)
    assert ended.returncode == 70 and "ulimit -v" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
