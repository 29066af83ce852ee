"""Host files whose file system does not answer: the request that asks for one waits, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfparallel.errors import GuestError
from sfparallel.vmm import host_work
from sfparallel.vmm.exports import may_hang
from sfparallel.vmm.file_service import FileService
from sfparallel.vmm.fuse_wire import Opcode
from sfparallel.vmm.host_work import MOST_THREADS_OF_VM
from sfparallel.vmm.waiting import in_thread
from sfparallel.wire import FrameType, pack
from tests.conftest import HANG_S, Sfrun, machines_of
from tests.hostile_guest import HostileGuest, hostile_guest
from tests.stuck_folder import stuck_folder
from tests.test_guest_bounds import TAG, alone, fuse_request, read_request

pytestmark = pytest.mark.needs("fuse", "root")


Stuck = tuple[Path, "subprocess.Popen[str]"]


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    """A folder with a file, and below it a mount in which `fine` can be read, and `stuck` cannot; and who serves that."""
    (tmp_path / "served").mkdir()
    for name in ("served/stuck", "served/fine", "file"):
        (tmp_path / name).write_text(name)
    with stuck_folder(tmp_path / "served", tmp_path / "mount") as server:
        yield tmp_path, server


async def node_of(guest: HostileGuest, parent: int, name: str) -> int:
    await guest.say(fuse_request(Opcode.LOOKUP, parent, name.encode() + b"\0"))
    (frame,) = await guest.hear()
    return int.from_bytes(frame.payload[16:24], "little")


async def read(guest: HostileGuest, node: int) -> bytes:
    await guest.say(read_request(node))
    (frame,) = await guest.hear()
    return frame.payload[16:]


def serve(guest: HostileGuest, service: FileService) -> None:
    """As the job does."""
    guest.vm.events.on_frame = lambda vm, frame: (
        service.request(vm, frame.channel, frame.payload) if frame.type is FrameType.FUSE
        else service.change(vm, frame.channel, None, frame.payload))
    guest.vm.events.on_room = service.go_on
    guest.vm.events.waits_for = service.hanging


@alone
async def test_a_file_that_hangs_stops_its_request_only(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same VM reads other files meanwhile, and others do; the user is told which file is waited for, and so is who forks."""
    monkeypatch.setattr(host_work, "SLOW_S", 2.0)
    folder, server = stuck
    told: list[str] = []
    service = FileService({TAG: folder}, told.append)
    async with hostile_guest() as guest, hostile_guest("clone 2", 2) as other:
        serve(guest, service)
        serve(other, service)
        mount = await node_of(guest, 1, "mount")
        await guest.say(read_request(await node_of(guest, mount, "stuck")))
        for each in (guest, other):
            assert await read(each, await node_of(each, 1, "file")) == b"file"
            assert await read(each, await node_of(each, mount, "fine")) == b"served/fine"
        name = str(folder / "mount/stuck")
        while f"sfrun: the host has not answered for {name} for 2 s; clone 1 waits for it" not in told:
            await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):
            guest.port.recv(1)
        with pytest.raises(GuestError, match=f"waits for the host's {name}"):
            await guest.vm.freeze(0.1)
        assert await service.end() == (False, [f"the host did not answer for {name}"])
        server.kill()


@alone
async def test_a_change_that_hangs_is_named(stuck: Stuck) -> None:
    folder, server = stuck
    service = FileService({TAG: folder}, print)
    async with hostile_guest() as guest:
        serve(guest, service)
        change = {"op": "file", "id": 1, "tag": TAG, "path": b"file", "kind": "begin"}
        await guest.send(FrameType.REQUEST, pack(change))
        await guest.hear()
        assert len(list(folder.glob(".*.sf-part"))) == 1
        await guest.send(FrameType.REQUEST, pack({**change, "path": b"mount/new"}))
        # What comes behind it waits: a file is written in order.
        await guest.send(FrameType.REQUEST, pack({**change, "path": b"other"}))
        while not service.hanging():
            await asyncio.sleep(0.01)
        used, problems = await service.end()
        assert (used, problems[0]) == (True, f"the host did not answer for {folder / 'mount/new'}")
        assert len(list(folder.glob(".*.sf-part"))) == 1
        server.kill()


@alone
async def test_threads_that_hang_are_bounded(stuck: Stuck) -> None:
    """For each VM, also one that is gone; and for all. Whoever finds none left goes on when one comes back."""
    folder, server = stuck
    for number in range(MOST_THREADS_OF_VM + 2):  # reads of one file would wait for each other: the kernel locks its page
        (folder / f"served/stuck{number}").write_text("stuck")
    service = FileService({TAG: folder}, print, most_threads=MOST_THREADS_OF_VM + 2)
    work = service._work
    async with hostile_guest() as guest, hostile_guest("clone 2", 2) as other:
        serve(guest, service)
        serve(other, service)
        mount = await node_of(guest, 1, "mount")
        hanging = [await node_of(guest, mount, f"stuck{number}") for number in range(MOST_THREADS_OF_VM + 2)]
        await guest.say(b"".join(map(read_request, hanging[:MOST_THREADS_OF_VM])) + read_request(hanging[0]) * 5)
        await in_thread(_read_lines, server, MOST_THREADS_OF_VM)
        assert len(service.hanging(guest.vm)) == work._threads == MOST_THREADS_OF_VM
        service.forget(guest.vm)
        assert await read(other, await node_of(other, mount, "fine")) == b"served/fine"
        assert work._threads == MOST_THREADS_OF_VM + 1
        await other.say(b"".join(map(read_request, hanging[MOST_THREADS_OF_VM:])))
        await in_thread(_read_lines, server, 2)
        await other.say(fuse_request(Opcode.LOOKUP, 1, b"file\0", unique=4))
        while not work._short:
            await asyncio.sleep(0.01)
        assert work._threads == len(service.hanging()) == MOST_THREADS_OF_VM + 2
        server.kill()
        answers = []
        while len(answers) < 3:
            answers += [struct.unpack_from("<iQ", frame.payload, 4) for frame in await other.hear()]
        assert (0, 4) in answers
        while service.hanging() or work._threads > len(work._idle):
            await asyncio.sleep(0.01)
        assert work._threads <= MOST_THREADS_OF_VM
        assert await service.end() == (False, [])
        assert work._threads == 0


def _read_lines(server: subprocess.Popen[str], count: int) -> None:
    assert server.stdout
    for _ in range(count):
        assert server.stdout.readline() == "stuck\n"


@alone
async def test_open_files_of_a_server_are_bounded(tmp_path: Path) -> None:
    """They are closed by the threads that open others; 64 requests at a time ask for 300 files."""
    for number in range(300):
        (tmp_path / str(number)).write_text(str(number))
    service = FileService({TAG: tmp_path}, print, slow=[TAG])
    most = 0
    async with hostile_guest() as guest:
        serve(guest, service)
        before = len(os.listdir("/proc/self/fd"))
        nodes = [await node_of(guest, 1, str(number)) for number in range(300)]
        for start in range(0, 300, 60):
            await guest.say(b"".join(read_request(node, 2 * node) for node in nodes[start:start + 60]))
            answers: list[bytes] = []
            while len(answers) < 60:
                answers += [frame.payload[16:] for frame in await guest.hear()]
                most = max(most, len(os.listdir("/proc/self/fd")) - before)
            assert sorted(answers) == sorted(str(number).encode() for number in range(start, start + 60))
        assert 32 <= most <= 32 + 2 * MOST_THREADS_OF_VM
        await service.end()


MOUNTS = b"""\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:20 / /proc rw - proc proc rw
24 22 0:50 / /home rw shared:2 master:1 - nfs4 server:/home rw
25 24 0:51 / /home/me/scratch rw - tmpfs tmpfs rw
26 22 0:52 / /data\\040of\\040all/far rw - fuse.sshfs me@there: rw
27 22 0:53 / /over rw - autofs systemd-1 rw
28 27 254:1 / /over rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(("folder", "expected"), [
    ("/", True), ("/srv", False), ("/home", True), ("/home/me/project", True), ("/homes", False), ("/home/me/scratch/x", False),
    ("/data of all", True), ("/data of all/near", False), ("/data of all/far", True), ("/data", False), ("/over/x", False),
])  # fmt: skip
def test_which_folders_may_hang(folder: str, expected: bool) -> None:
    assert may_hang(Path(folder), MOUNTS) is expected


PROGRAM = """
import sys
import sfparallel as sf

def read(name):
    print("reads", name, flush=True)
    with open(name) as file:
        return file.read()

first, second = sf.Executor(1), sf.Executor(1)
first.submit(read, "mount/stuck")
print(second.submit(read, "mount/fine").result(), flush=True)
first.kill()
second.shutdown()
open("made", "w").close()
if "write" in sys.argv:
    open("mount/new", "w").close()
else:
    read("mount/stuck too")
"""


@pytest.mark.needs("qemu", "image")
@pytest.mark.parametrize(("how", "by"), [("read", signal.SIGTERM), ("write", signal.SIGTERM), ("write", signal.SIGKILL)])
def test_signals_end_a_job_whose_files_hang(sfrun: Sfrun, how: str, by: signal.Signals) -> None:
    """A clone reads one and is given up, its sibling goes on; then the program reads it, or what it wrote is brought back. The
    folder never answers; when its server is gone, nothing is left of the job."""
    served = sfrun.folder.parent / f"{sfrun.folder.name}-served"
    served.mkdir()
    for name in ("stuck", "stuck too", "fine"):
        (served / name).write_text(name)
    with stuck_folder(served, sfrun.folder / "mount") as server:
        process = sfrun.start(PROGRAM, args=(how,))
        assert process.stdout and process.stderr
        told = sorted(process.stdout.readline() for _ in range(3))
        assert told == ["[0] reads mount/fine\n", "[0] reads mount/stuck\n", "fine\n"]
        _read_lines(server, 2)
        machines = machines_of(process.pid)
        assert machines
        process.send_signal(by)
        assert process.wait(HANG_S) == (128 + by if by is signal.SIGTERM else -by)
        # The process that the kernel keeps has let go of these; after kill -9 it has not.
        if by is signal.SIGTERM:
            assert process.stdout.read() == ("reads mount/stuck too\n" if how == "read" else "")
            said = process.stderr.read()
            assert f"the host did not answer for {sfrun.folder / 'mount' / ('stuck too' if how == 'read' else 'new')}" in said
            # A read is given up with its thread, but no request that changes something.
            assert ("waits for a file system that does not answer" in said) is (how == "write")
            assert not [pid for pid in machines if Path(f"/proc/{pid}").exists()]
        assert server.poll() is None
