"""The paging layer in QEMU itself: under libvirt's sandbox, and when its supervisor is killed."""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import numpy as np
import pytest

from sfparallel.vmm import native_parts, paging
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap
from sfparallel.vmm.paging import PagingLayer
from sfparallel.vmm.plans import CommitMode, CommitPlan, MapPlan
from tests.conftest import HANG_S
from tests.paging_rig import ROOT
from tests.paging_rig import program_fixture as program_fixture

QEMU = shutil.which("qemu-system-x86_64")
WARMED_BYTES = 16 << 20
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"  # as libvirt sets it


@asynccontextmanager
async def qemu(control: int | Path, fds: tuple[int, ...] = ()) -> AsyncIterator[asyncio.subprocess.Process]:
    """A QEMU that has begun its main loop."""
    assert QEMU
    process = await asyncio.create_subprocess_exec(
        QEMU, "-S", "-display", "none", "-nodefaults", "-M", "q35", "-accel", "tcg,tb-size=32", "-m", "64", "-qmp", "stdio",
        "-sandbox", SANDBOX, "-device", "loader,addr=0x200000,data=0x5346,data-len=4",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=fds,
        env={**os.environ, **native_parts.environment(control)})
    try:
        await qmp(process, None)
        await qmp(process, b'{"execute": "qmp_capabilities"}')
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def qmp(process: asyncio.subprocess.Process, command: bytes | None) -> bytes:
    assert process.stdin and process.stdout
    if command:
        process.stdin.write(command + b"\n")
    return await asyncio.wait_for(process.stdout.readline(), HANG_S)


def code_bytes(process: asyncio.subprocess.Process) -> int:
    """Memory that QEMU has in its buffer for translated code, the only large mapping that can be written to and executed."""
    mappings = re.findall(r"rwxp (?:.*\n)+?Anonymous: +(\d+) kB", Path(f"/proc/{process.pid}/smaps").read_text())
    return sum(int(kib) for kib in mappings) << 10


async def check_qemu(process: asyncio.subprocess.Process, layer: PagingLayer) -> None:
    """Commit all of guest memory, map it anew, and see the same through QEMU itself."""
    await layer.hello()
    found = await qmp(process, b'{"execute": "human-monitor-command", "arguments": {"command-line": "gpa2hva 0"}}')
    address = int(found.split(b" is ")[1].split(b"\\")[0], 16)
    size = 64 << 20
    assert code_bytes(process) < 1 << 20
    assert [await layer.warm(WARMED_BYTES) for _ in range(2)] == [WARMED_BYTES] * 2, "what is there already stays"
    assert WARMED_BYTES <= code_bytes(process) < WARMED_BYTES + (1 << 20)
    assert await layer.warm(1 << 40) <= 32 << 20, "the buffer has no more"
    target = os.memfd_create("layer")
    try:
        os.ftruncate(target, size)
        memory_map = MemoryMap.zero(size // PAGE_BYTES)
        with CommitPlan(memory_map, target, 1, CommitMode.FRESH) as plan:
            prepared = await layer.prepare(address, plan)
            result = await layer.carry_out(address, plan)
            await layer.settle()
        assert result.remapped and 0 < prepared <= result.stored_pages
        os.pwrite(target, b"sfparallel", 4 << 20)
        source = np.zeros(size // PAGE_BYTES, dtype=np.uint16)
        source[(4 << 20) // PAGE_BYTES] = 1
        with MapPlan(MemoryMap(source), {1: target}) as image:
            await layer.map(address, image)
    finally:
        os.close(target)
    seen = await qmp(process, b'{"execute": "human-monitor-command", "arguments": {"command-line": "xp /2cb 0x400000"}}')
    assert b"'s' 'f'" in seen


@pytest.mark.needs("qemu")
@pytest.mark.skipif(QEMU is None, reason="QEMU is not installed")
@pytest.mark.parametrize("way", ["inherited", "listening"])
def test_qemu_with_its_sandbox(program: Path, way: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asynccontextmanager(start)() as (process, layer):
            await check_qemu(process, layer)
            layer.close()
            assert await asyncio.wait_for(process.wait(), HANG_S) == 0

    async def start() -> AsyncIterator[tuple[asyncio.subprocess.Process, PagingLayer]]:
        if way == "inherited":
            ours, theirs = paging.control_pair()
            async with qemu(theirs.fileno(), (theirs.fileno(),)) as process:
                theirs.close()
                yield process, PagingLayer(ours, "QEMU")
        else:
            async with qemu(tmp_path / "page") as process:
                yield process, await PagingLayer.connect(tmp_path / "page", "QEMU")

    asyncio.run(scenario())


@pytest.mark.needs("qemu")
@pytest.mark.skipif(QEMU is None, reason="QEMU is not installed")
def test_qemu_ends_when_its_supervisor_is_killed(program: Path) -> None:
    """The supervisor is a process that holds the other end and starts QEMU; kill -9 leaves nothing."""
    supervisor = (
        "import os, subprocess, sys; from sfparallel.vmm import native_parts, paging\n"
        "ours, theirs = paging.control_pair()\n"
        "q = subprocess.Popen([sys.argv[1], '-S', '-display', 'none', '-nodefaults', '-M', 'q35', '-accel', 'tcg', '-m', '64'],\n"
        "    pass_fds=(theirs.fileno(),), env={**os.environ, **native_parts.environment(theirs.fileno())})\n"
        "theirs.close(); ours.setblocking(True)\n"
        "ours.send(paging._REQUEST.pack(paging._MAGIC, 1, 1, 1, 0, 0, 0, 0, 0)); ours.recv(200)\n"
        "print(q.pid, flush=True); q.wait()\n"
    )
    assert QEMU
    with subprocess.Popen([sys.executable, "-c", supervisor, QEMU], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        try:
            pidfd = os.pidfd_open(int(process.stdout.readline()))
        finally:
            process.kill()
    with closing(os.fdopen(pidfd, "rb", buffering=0)):
        assert select.select([pidfd], [], [], 10)[0], "QEMU lives on"
