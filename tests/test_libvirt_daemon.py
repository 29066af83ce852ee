"""A parent that a libvirt daemon starts: the daemon is in other namespaces than the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Sfrun, left_overs, wait_for_nothing_new

pytestmark = pytest.mark.needs("qemu", "image", "root")


def _start(program: str, socket: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not socket.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{program} does not come up"
        time.sleep(0.05)
    return process


@pytest.fixture(scope="module")
def daemon() -> Iterator[None]:
    """The system's libvirtd: the one that runs, or one for the length of these tests."""
    socket = Path("/run/libvirt/libvirt-sock")
    if socket.exists():
        yield
        return
    processes = [_start("virtlogd", Path("/run/libvirt/virtlogd-sock")), _start("libvirtd", socket)]
    yield
    for process in reversed(processes):
        process.terminate()
        process.wait()
    for name in ("libvirt-sock", "libvirt-sock-ro", "libvirt-admin-sock", "virtlogd-sock", "virtlogd-admin-sock"):
        (socket.parent / name).unlink(missing_ok=True)


@pytest.mark.usefixtures("daemon")
def test_forks_of_a_parent_under_the_daemon(sfrun: Sfrun) -> None:
    before = left_overs()
    ended = sfrun(
        """
        import sfparallel as sf
        for i in range(2):
            print(sf.parallel(n=2)(lambda: sf.comm().rank + 10 * i)())
        """,
        "--connect", "qemu:///system",
    ).ok()  # fmt: skip
    assert ended.out.splitlines() == ["[0, 1]", "[10, 11]"]
    assert not wait_for_nothing_new(before)
    assert _domains() == []


@pytest.mark.usefixtures("daemon")
def test_kill_9_leaves_no_domain(sfrun: Sfrun) -> None:
    before = left_overs()
    process = sfrun.start("print('up', flush=True); input()", "--connect", "qemu:///system", stdin=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "up\n"
    assert _domains() == [f"sf{process.pid}"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not wait_for_nothing_new(before)
    deadline = time.monotonic() + 5
    while _domains():
        assert time.monotonic() < deadline, "the domain is still there"
        time.sleep(0.1)
    assert not list(Path("/run").glob("sfparallel-*/*"))


def _domains() -> list[str]:
    code = ("import libvirt; print(*(d.name() for d in libvirt.open('qemu:///system').listAllDomains() "
            "if d.name().startswith('sf')))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()
