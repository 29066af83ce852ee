"""The parent as a libvirt domain: by a daemon, which lives in namespaces of its own, and by the embedded driver; and without any
libvirt, where it is not asked for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfparallel.config import cache_folder
from sfparallel.errors import VMError
from sfparallel.net.network import CloneNetwork
from sfparallel.vmm import libvirt_parent, signals
from sfparallel.vmm.confinement import Places
from sfparallel.vmm.machine import Accelerator, MachineSpec
from tests.conftest import BIN, HANG_S, LEAK_GRACE_S, Sfrun, children_of, command_of, descendants, job_of

pytestmark = pytest.mark.needs("qemu", "image", "root", "libvirtd")

URI = "qemu:///system"

# The init reaps: libvirt kills the QEMU that it probes, and asks again and again whether that process is gone.
INIT = """
import os, subprocess
for folder in ("/run", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"):
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
os.mkdir("/run/lock")
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["virtlogd", "-d"], check=True)
subprocess.run(["libvirtd", "-d"], check=True)
print("ready", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


@dataclass
class Daemon:
    """libvirtd in mount, network and PID namespaces of its own, that of process `pid`."""

    pid: int
    folder: Path

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", f"-W{self.folder}", *words]

    def run(self, *words: str) -> str:
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=HANG_S).stdout

    def sfrun(self, program: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(str(BIN / "sfrun"), "--connect", URI, "-c", program), stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def left(self) -> str:
        """Domains, VMs and folders of jobs."""
        domains = self.run("virsh", "-c", URI, "list", "--all", "--name").strip()
        folders = [name for name in os.listdir(Path("/proc", str(self.pid), "root", "run")) if name.startswith("sfparallel-")]
        machines = [pid for pid in descendants(self.pid) if "qemu-system" in command_of(pid)]
        return f"domains {domains!r}, folders {folders}, machines {machines}"


NOTHING = "domains '', folders [], machines []"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A libvirt daemon that only this test can reach."""
    command = ["unshare", "-m", "-n", "-p", "-f", "--kill-child=SIGKILL", "--mount-proc", sys.executable, "-c", INIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            (init,) = children_of(process.pid)
            yield Daemon(init, tmp_path)
        finally:
            process.kill()


def _wait_for(daemon: Daemon, expected: str) -> None:
    deadline = time.monotonic() + LEAK_GRACE_S
    while (left := daemon.left()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == expected


FORK = "import sfparallel as sf; print(sf.parallel(n=2)(lambda: sf.comm().rank)(), sf.parallel(n=1)(lambda: 'again')())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with all but what libvirt keeps there."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("images", "initrd", "templates"):
        (cache_folder() / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(cache_folder() / name)
    monkeypatch.setenv("SF_CACHE", str(folder))
    return folder


def test_the_embedded_driver_with_nothing_kept_from_earlier(sfrun: Sfrun, cache: Path) -> None:
    """libvirt probes QEMU: four processes that it kills, and waits for, 40 s for each that stays a zombie."""
    ended = sfrun(FORK, "--connect", "embed").ok()
    assert ended.out == "[0, 1] ['again']\n"
    assert list((cache / "libvirt").rglob("capabilities/*.xml")), "its probe is kept"


@pytest.mark.parametrize("options", [(), ("--connect", "embed")])
def test_libvirt_is_loaded_only_where_it_is_asked_for(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    process = sfrun.start("print('up', flush=True); input()", *options, stdin=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "up\n"
    loaded = "libvirt" in Path(f"/proc/{job_of(process.pid)}/maps").read_text()
    assert loaded is bool(options)
    process.communicate("\n", timeout=HANG_S)
    assert process.returncode == 0


@pytest.mark.parametrize("how", ["--timeout", "SIGTERM", "SIGINT"])
def test_a_libvirt_that_does_not_answer_keeps_nobody(sfrun: Sfrun, how: str) -> None:
    """The thread that is in libvirt cannot be interrupted; the job ends without it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sfrun.folder / "silent"))
        listener.listen()
        uri = f"qemu+unix:///system?socket={sfrun.folder / 'silent'}"
        options = ("--timeout", "3") if how == "--timeout" else ()
        process = sfrun.start("pass", "--connect", uri, *options)
        with listener.accept()[0]:
            if how != "--timeout":
                process.send_signal(signal.Signals[how])
            process.communicate(timeout=HANG_S)
    assert process.returncode == (124 if how == "--timeout" else 128 + signal.Signals[how])


class Hanging:
    """A libvirt that answers until it is asked for this."""

    embedded = False

    def __init__(self, folder: Path, call: str) -> None:
        self.folder = folder
        self.call = call

    def _answers(self, call: str) -> None:
        if call == self.call:
            threading.Event().wait()

    def security_models(self) -> tuple[str, ...]:
        self._answers("security_models")
        return ()

    def start(self, _xml: str) -> Hanging:
        self._answers("start")
        return self  # its domain; nothing listens at the sockets of its QEMU

    def destroy(self) -> None:
        self._answers("destroy")

    def close(self) -> None:
        self._answers("close")


@pytest.mark.parametrize(("call", "says"), [
    ("security_models", "waited 5 s for libvirt to name its security models"),
    ("start", "waited 5 s for libvirt to start the parent"),
    ("destroy", "cannot connect to its page"), ("close", "cannot connect to its page"),
])  # fmt: skip
def test_each_call_of_libvirt_has_a_limit(call: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_parent, "Connection", lambda *_: Hanging(tmp_path, call))
    monkeypatch.setattr(libvirt_parent, "_LIBVIRT_LIMIT_S", 5.0)
    spec = MachineSpec(Accelerator.TCG, cpus=1, memory_bytes=384 << 20, root_image=tmp_path)

    async def start() -> None:
        with CloneNetwork() as network:
            async with contextlib.AsyncExitStack() as stack:
                places = Places(tmp_path, tmp_path, signals.Interrupts())
                await libvirt_parent.start_domain(spec, "hanging:", places, network, "parent", stack)

    with pytest.raises(VMError, match=says):
        asyncio.run(start())


def test_a_fork(daemon: Daemon) -> None:
    with daemon.sfrun(FORK) as job:
        out, err = job.communicate(timeout=HANG_S)
    assert (job.returncode, out) == (0, "[0, 1] ['again']\n"), err
    _wait_for(daemon, NOTHING)
    assert not os.path.exists("/run/libvirt/libvirt-sock"), "others must not find this daemon"


def test_kill_9_leaves_no_domain_no_machine_and_no_folder(daemon: Daemon) -> None:
    program = "import time, sfparallel as sf; sf.parallel(n=2)(lambda: (print('up', flush=True), time.sleep(1000)))()"
    with daemon.sfrun(program) as job:
        assert job.stdout and job.stdout.readline().endswith("up\n")
        left = daemon.left()
        assert "domains 'sf" in left and "sfparallel-" in left
        (sfrun,) = children_of(job.pid)
        os.kill(sfrun, signal.SIGKILL)
        job.communicate(timeout=HANG_S)
    _wait_for(daemon, NOTHING)
