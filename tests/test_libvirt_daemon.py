"""The parent run by a libvirt daemon. The daemon lives in namespaces of its own, for while there is one that can be reached it is
every job's default."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import BIN, children_of, command_of, descendants

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
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=120).stdout

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
    deadline = time.monotonic() + 5
    while (left := daemon.left()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == expected


def test_a_fork(daemon: Daemon) -> None:
    program = "import sfparallel as sf; print(sf.parallel(n=2)(lambda: sf.comm().rank)(), sf.parallel(n=1)(lambda: 'again')())"
    with daemon.sfrun(program) as job:
        out, err = job.communicate(timeout=120)
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
        job.communicate(timeout=30)
    _wait_for(daemon, NOTHING)
