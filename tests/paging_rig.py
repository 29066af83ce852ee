"""What the tests of the paging layer stand on: a harness process in QEMU's place (ASan and UBSan build), and layer files."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm import paging
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap, Records
from sfparallel.vmm.paging import PagingLayer, PagingRefused, PagingStep, ScanMethod
from sfparallel.vmm.plans import CommitMode, CommitPlan, MapPlan
from tests.conftest import HANG_S

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "sfparallel/vmm/native"
PAGES = 64
BYTES = PAGES * PAGE_BYTES


@pytest.fixture(name="program", scope="session")
def program_fixture() -> Path:
    """The harness with sanitizers; also makes sure that the library itself is built."""
    subprocess.run(["make", "-s", "-C", str(NATIVE), "all", "asan"], check=True)
    return ROOT / "build/native/harness"


class Guest:
    """A harness process: "guest memory" that does what it is told, and its paging layer."""

    def __init__(self, process: subprocess.Popen[str], layer: PagingLayer, pages: int) -> None:
        assert process.stdout
        self.process = process
        self.layer = layer
        self.address = int(process.stdout.readline().split()[1])
        self.map = MemoryMap.zero(pages)

    def tell(self, *words: object) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def fill(self, page: int, pages: int, byte: int) -> None:
        self.tell("fill", page, pages, byte)

    def show(self, page: int = 0, pages: int = PAGES) -> list[int]:
        return [int(word) for word in self.tell("show", page, pages).split()]

    def mappings(self) -> int:
        """Of guest memory, at least in part; the sanitizers' own come and go."""
        lines = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        bounds = [[int(number, 16) for number in line.split()[0].split("-")] for line in lines]
        return sum(begin < self.address + self.map.size_bytes and end > self.address for begin, end in bounds)

    @asynccontextmanager
    async def prepared(
        self, target: int, number: int, mode: CommitMode = CommitMode.FRESH, layers: dict[int, int] | None = None
    ) -> AsyncIterator[CommitPlan]:
        """Prepare a commit, then settle. Its end waits until that is done."""
        with CommitPlan(self.map, target, number, mode, layers=layers) as plan:
            await self.layer.prepare(self.address, plan)
            yield plan
            await self.layer.settle()
            await self.layer.hello()

    async def carry_out(self, plan: CommitPlan) -> paging.CommitResult:
        result = await self.layer.carry_out(self.address, plan)
        assert result.remapped
        self.map = self.map.apply(result.runs, plan.target_number)
        return result

    async def commit(
        self, target: int, number: int, mode: CommitMode = CommitMode.FRESH, layers: dict[int, int] | None = None
    ) -> paging.CommitResult:
        result = await self.layer.commit(self.address, self.map, target, number, mode, layers=layers)
        if not mode & CommitMode.NO_REMAP:
            assert result.remapped
            self.map = self.map.apply(result.runs, number)
        return result

    async def load(self, memory_map: MemoryMap, layers: dict[int, int]) -> None:
        with MapPlan(memory_map, layers) as plan:
            await self.layer.map(self.address, plan)
            self.map = plan.memory_map


class Rig:
    """What a test starts: harness processes and layer files; all of it is gone afterwards."""

    def __init__(self, program: Path, scan: ScanMethod, stack: ExitStack) -> None:
        self.program, self.scan, self.stack = program, scan, stack
        self.stderr = stack.enter_context(os.fdopen(os.memfd_create("stderr"), "w+"))

    def guest(self, pages: int = PAGES) -> Guest:
        ours, theirs = paging.control_pair()
        with theirs:
            process = self.spawn({"SFPAGE_FD": str(theirs.fileno())}, pages, (theirs.fileno(),))
        layer = PagingLayer(ours, "guest", scan=self.scan)
        self.stack.callback(layer.close)
        return Guest(process, layer, pages)

    def spawn(self, variables: dict[str, str], pages: int = PAGES, fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        environment = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1", **variables}
        process = subprocess.Popen([str(self.program), str(pages)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=self.stderr, env=environment, pass_fds=fds, text=True)
        self.stack.enter_context(process)
        self.stack.callback(process.kill)
        return process

    def memfd(self, size_bytes: int = BYTES) -> int:
        fd = os.memfd_create("layer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.stack.callback(os.close, fd)
        os.ftruncate(fd, size_bytes)
        return fd

    def check_stderr(self) -> None:
        self.stderr.seek(0)
        assert self.stderr.read() == "", "a sanitizer complained"


@pytest.fixture(name="rig", params=list(ScanMethod), ids=lambda method: method.value)
def rig_fixture(program: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with ExitStack() as stack:
        rig = Rig(program, request.param, stack)
        yield rig
        rig.check_stderr()


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[Rig], None]:
    def wrapper(rig: Rig) -> None:
        asyncio.run(asyncio.wait_for(test(rig), HANG_S))

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    return wrapper


def rows(runs: Records) -> list[tuple[int, int, int]]:
    return [tuple(row) for row in runs.tolist()]


def stored_pages(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512 // PAGE_BYTES


async def refused(call: Awaitable[object], number: int, step: PagingStep) -> PagingRefused:
    with pytest.raises(PagingRefused) as caught:
        await call
    assert (caught.value.errno, caught.value.step) == (number, step), caught.value
    return caught.value


@contextmanager
def small_tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
