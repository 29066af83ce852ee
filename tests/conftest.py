"""What all tests share: programs run by `sfrun` on real VMs, and the proof that nothing is left over after each of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfparallel.errors import SfError
from sfparallel.vmm import image as images

# A shell without job control starts background programs with SIGINT ignored (POSIX), and with them all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):  # nohup(1) ignores the first
    signal.signal(_number, signal.SIG_DFL)

BIN = Path(sys.prefix) / "bin"
PATIENCE = float(os.environ.get("SF_TEST_PATIENCE", "1"))
"""How much longer hang limits are on this machine: the outer VM of tests/kvm is about ten times slower than others."""
HANG_S = 300.0 * PATIENCE
"""How long tests wait for what is to come at once. A hang is for ever, and a busy machine is slow: no test fails by the clock."""
LEAK_GRACE_S = 30.0 * PATIENCE
"""What a test started must be gone this long after it, at the latest: a moment on a free machine, seconds on a busy one."""


def command_of(pid: int) -> str:
    """Command line of a process, words separated by spaces; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    return [found for child in children_of(pid) for found in (child, *descendants(child))]


def job_of(pid: int) -> int:
    """The process that runs the job of an `sfrun` (vmm.confinement), its supervisor."""
    (init,) = children_of(pid)
    return min(children_of(init))  # orphans of the job become the init's children later than it


def machines_of(pid: int) -> list[int]:
    """QEMUs of an `sfrun`, in the order in which they were started: first the parent, then clones and shells of the pool."""
    return sorted(each for each in descendants(pid) if "qemu-system" in command_of(each))


def _processes() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(b"qemu-system" in word or word.endswith((b"/sfrun", b"sf-launcher")) for word in words[:2]):
                found.add(f"process {entry.name} {b' '.join(words[:2]).decode(errors='replace')}")
    return found


def _namespaces() -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for kind in ("net", "mnt"):
                try:
                    found.add(f"namespace {os.readlink(entry / 'ns' / kind)}")
                except OSError:
                    continue
    return found


def _mounts() -> set[str]:
    return {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def left_overs() -> set[str]:
    """Everything that a job could leave behind, as strings."""
    found = _processes() | _namespaces() | _mounts()
    found |= {f"shared memory {entry.name}" for entry in Path("/dev/shm").iterdir()}
    found |= {f"interface {entry.name}" for entry in Path("/sys/class/net").iterdir()}
    run = Path("/run/sfparallel")
    if run.exists():
        found |= {f"file {entry}" for entry in run.iterdir()}
    return found


def wait_for_nothing_new(before: set[str], grace_s: float = LEAK_GRACE_S) -> set[str]:
    """What is there beyond `before` once things have settled; empty when nothing leaked."""
    deadline = time.monotonic() + grace_s
    while (new := left_overs() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return new


def _have_program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _opens(device: str) -> Callable[[], bool]:
    def probe() -> bool:
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError:
            return False
        return True

    return probe


def _have_image(name: str) -> Callable[[], bool]:
    def probe() -> bool:
        try:
            images.find(name)
        except SfError:
            return False
        return True

    return probe


NEEDS: dict[str, Callable[[], bool]] = {
    "root": lambda: os.geteuid() == 0,
    "net": lambda: os.path.exists("/dev/net/tun"),
    "fuse": lambda: os.path.exists("/dev/fuse"),
    "kvm": _opens("/dev/kvm"),
    "qemu": _have_program("qemu-system-x86_64"),
    "libvirtd": _have_program("libvirtd"),
    "squashfs": _have_program("mksquashfs"),
    "image": _have_image("default"),
    "blast": _have_image("blast"),
    "ml": _have_image("ml"),
    "numba": _have_image("numba"),
    "render": _have_image("render"),
}
MAY_BE_MISSING = {"kvm"}
"""What a machine may lack: a test that needs it is skipped. Anything else that is missing fails: it hides a broken setup."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for need in marker.args:
            if not NEEDS[need]():
                report = pytest.skip if need in MAY_BE_MISSING else pytest.fail
                report(f"this machine lacks {need!r}; see `sf doctor`")


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no process, namespace, mount, interface or shared-memory file that was not there before."""
    before = left_overs()
    yield
    if request.node.get_closest_marker("needs"):
        leaked = set() if os.environ.get("SF_NOLEAK") else wait_for_nothing_new(before)
        assert not leaked, f"left over: {sorted(leaked)}"


@dataclass
class Ended:
    """A program that ran under `sfrun`."""

    code: int
    out: str
    err: str
    seconds: float

    def ok(self) -> Ended:
        assert self.code == 0, f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
        return self


class Sfrun:
    """Runs programs under `sfrun` in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()

    def write(self, program: str, name: str = "program.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(program))
        return path

    def start(
        self, program: str, *options: str, args: tuple[str, ...] = (), stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        """Start `sfrun`; the caller waits for it."""
        path = self.write(program)
        process = subprocess.Popen(
            [str(BIN / "sfrun"), *options, str(path), *args], cwd=self.folder, stdin=stdin, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def __call__(
        self, program: str, *options: str, args: tuple[str, ...] = (), stdin: str | None = None, timeout: float = 500
    ) -> Ended:
        started = time.monotonic()
        process = self.start(program, *options, args=args, stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL)
        try:
            out, err = process.communicate(stdin, timeout=timeout * PATIENCE)
        except BaseException:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            raise
        return Ended(process.returncode, out, err, time.monotonic() - started)


@pytest.fixture
def sfrun(tmp_path: Path) -> Iterator[Sfrun]:
    """`sfrun` in a temporary folder."""
    runner = Sfrun(tmp_path)
    yield runner
    runner.close()


@pytest.fixture
def sf() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command `sf`."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(BIN / "sf"), *arguments], capture_output=True, text=True, timeout=600)

    return call
