"""What a guest can fill on the host has a bound; each of these fills one (SECURITY.md lists them)."""

from __future__ import annotations

import asyncio
import inspect
import os
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm import agent_port
from sfparallel.vmm import vm as vms
from sfparallel.vmm.console import LIMIT_BYTES, Console
from sfparallel.vmm.file_service import FileService
from sfparallel.vmm.fuse_wire import MAX_READ_BYTES, Opcode
from sfparallel.vmm.guest_events import EVENTS_AT_ONCE
from sfparallel.vmm.host_work import MOST_THREADS_OF_VM, MOST_WAITING_BYTES
from sfparallel.vmm.output import LabelledOutput
from sfparallel.vmm.vm import VmState
from sfparallel.wire import HEADER, Frame, FrameType, pack
from tests.conftest import HANG_S
from tests.host_folders import handle
from tests.hostile_guest import HostileGuest, hostile_guest

TAG = 7
GENEROUS_BYTES = 48 << 20
"""By how much a test's process may grow in all: what waits, the copies that are made of it, and the allocator's leftovers."""


def alone(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop of its own."""

    def wrapper(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), HANG_S))

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    wrapper.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]  # pytest asks for the fixtures by it
    return wrapper


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def waiting_bytes(guest: HostileGuest) -> int:
    transport = guest.vm._port._transport
    assert transport
    return transport.get_write_buffer_size()


def fuse_request(opcode: int, node: int, body: bytes, unique: int = 2) -> bytes:
    payload = struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body
    return Frame(FrameType.FUSE, payload, TAG).encode()


def read_request(node: int, unique: int = 2) -> bytes:
    return fuse_request(Opcode.READ, node, struct.pack("<QQIIQII", node, 0, MAX_READ_BYTES, 0, 0, 0, 0), unique)


@pytest.fixture(params=["in the loop", "in threads"])
def served(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[FileService, int]:
    """Files for guests, and the node of a file of 128 KiB."""
    (tmp_path / "file").write_bytes(bytes(MAX_READ_BYTES))
    service = FileService({TAG: tmp_path}, print, slow=[TAG] if request.param == "in threads" else [])
    answer = handle(service._server, TAG, fuse_request(Opcode.LOOKUP, 1, b"file\0")[HEADER.size:])
    assert answer
    return service, int.from_bytes(answer[16:24], "little")


def serve(guest: HostileGuest, service: FileService) -> None:
    """As the job does."""
    guest.vm.events.on_frame = lambda vm, frame: service.request(vm, frame.channel, frame.payload)
    guest.vm.events.on_room = service.go_on


@alone
async def test_reads_whose_answers_are_never_read(served: tuple[FileService, int]) -> None:
    service, node = served
    async with hostile_guest() as guest:
        serve(guest, service)
        before = resident_bytes()
        for _ in range(100):
            await guest.say(read_request(node) * 1000)
            if guest.lost.done():
                break
        under_way = MOST_THREADS_OF_VM if service._slow else 1
        assert waiting_bytes(guest) <= agent_port.HIGH_WATER_BYTES + under_way * (MAX_READ_BYTES + 100)
        assert "does not read the answers" in await guest.end()
        assert resident_bytes() - before < GENEROUS_BYTES
        assert service._work._lines == {}


@alone
async def test_a_guest_that_reads_late_gets_every_answer(served: tuple[FileService, int]) -> None:
    """What waits is no loss: 64 MiB of answers, through half a MiB."""
    service, node = served
    async with hostile_guest() as guest:
        serve(guest, service)
        await guest.say(b"".join(read_request(node, unique) for unique in range(2, 1026, 2)))
        await asyncio.sleep(0)
        answered = set()
        while len(answered) < 512:
            for frame in await guest.hear():
                assert frame.type is FrameType.FUSE_REPLY and len(frame.payload) == MAX_READ_BYTES + 16
                answered.add(int.from_bytes(frame.payload[8:16], "little"))
        assert answered == set(range(2, 1026, 2)) and service._work._lines == {}


@alone
async def test_requests_that_wait_are_few_however_large(served: tuple[FileService, int]) -> None:
    service, node = served
    async with hostile_guest() as guest:
        serve(guest, service)
        await guest.say(read_request(node) * 20)
        for _ in range(2 * MOST_WAITING_BYTES >> 20):
            await guest.say(fuse_request(Opcode.WRITE, node, bytes(1 << 19)) * 2)
        assert "does not read the answers" in await guest.end()


@alone
async def test_events_for_a_parent_that_does_not_read() -> None:
    async with hostile_guest("parent") as guest:
        before = resident_bytes()
        sent = 0
        while not guest.vm.cause:
            guest.vm.send(FrameType.REPLY, pack({"event": "lost", "cause": "x" * 1000}))
            sent += 1
            assert sent < 1_000_000
        assert sent * 1000 < 2 * agent_port.MOST_UNREAD_BYTES
        assert "did not read" in await guest.end()
        assert resident_bytes() - before < GENEROUS_BYTES


@alone
async def test_frames_for_a_guest_that_stands_still_are_bounded() -> None:
    async with hostile_guest() as guest:
        guest.vm.state = VmState.FROZEN
        while not guest.vm.cause:
            guest.vm.send(FrameType.REPLY, bytes(100_000))
        assert sum(len(frame.payload) for frame in guest.vm._held) < 2 * agent_port.MOST_UNREAD_BYTES
        assert "did not read" in await guest.end()


@alone
async def test_who_waits_for_room_goes_on_when_the_guest_reads_or_is_gone() -> None:
    async with hostile_guest() as guest:
        await guest.vm.room()
        for _ in range(10):
            guest.vm.send(FrameType.REPLY, bytes(100_000))
        waiting = asyncio.ensure_future(guest.vm.room())
        await asyncio.sleep(0)
        assert guest.vm.congested and not waiting.done()
        while not waiting.done():
            await guest.hear()
        for _ in range(10):
            guest.vm.send(FrameType.REPLY, bytes(100_000))
        waiting = asyncio.ensure_future(guest.vm.room())
        guest.vm.kill()
        await guest.end()
        await waiting


@alone
async def test_thawing_makes_room_too() -> None:
    async with hostile_guest() as guest:
        guest.vm.state = VmState.FROZEN
        guest.vm.send(FrameType.REPLY, bytes(agent_port.HIGH_WATER_BYTES + 1))
        waiting = asyncio.ensure_future(guest.vm.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        guest.vm.thaw({})
        while not waiting.done():
            await guest.hear()


@alone
async def test_files_are_served_while_much_is_held_for_a_vm_that_freezes(served: tuple[FileService, int]) -> None:
    """It freezes only when it has its files."""
    service, node = served
    async with hostile_guest() as guest:
        serve(guest, service)
        freezing = asyncio.ensure_future(guest.vm.freeze())
        await asyncio.sleep(0)
        guest.vm.send(FrameType.REPLY, bytes(2 * agent_port.HIGH_WATER_BYTES)[:1 << 20])
        await guest.say(read_request(node))
        seen: list[FrameType] = []
        while FrameType.FUSE_REPLY not in seen:
            seen += [frame.type for frame in await guest.hear()]
        assert seen == [FrameType.FREEZE, FrameType.FUSE_REPLY]
        await guest.send(FrameType.FROZEN, pack({"oom_kills": 0, "agent": "1"}))
        await freezing
        assert guest.vm.state is VmState.FROZEN


@alone
async def test_output_without_end_while_it_is_to_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not held then, as FREEZE must come through."""
    monkeypatch.setattr(vms, "MOST_WHILE_FREEZING_BYTES", 32 << 20)
    async with hostile_guest() as guest:
        freezing = asyncio.ensure_future(guest.vm.freeze())
        await asyncio.sleep(0)
        sent = 0
        while not guest.lost.done() and sent < 4 * vms.MOST_WHILE_FREEZING_BYTES:
            await guest.send(FrameType.OUTPUT, bytes(1 << 20), 1)
            sent += 1 << 20
        assert "after it was told to freeze" in await guest.end()
        assert sent <= 2 * vms.MOST_WHILE_FREEZING_BYTES
        assert isinstance((await asyncio.gather(freezing, return_exceptions=True))[0], vms.VMError)


def test_a_line_without_end_is_written_in_pieces() -> None:
    written = []
    output = LabelledOutput("[1] ", lambda stream, data: written.append(len(data)))
    for _ in range(64):
        output.feed(1, bytes(1 << 20))
        assert sum(map(len, output._partial.values())) <= 64 << 10
    assert len(written) == 64


@alone
async def test_a_console_without_end_stays_small() -> None:
    async with hostile_guest() as guest:
        for number in range(64):
            os.write(guest.console, (b"%06d line of a console\n" % number) * 20000)
            guest.vm._console.trim()
            assert os.fstat(guest.console).st_blocks * 512 <= LIMIT_BYTES + (1 << 20)
        os.write(guest.console, b"Kernel panic\n")
        tail = guest.vm.console_tail()
        assert tail.endswith("000063 line of a console\nKernel panic") and len(tail) > 4000


@alone
async def test_a_console_is_trimmed_without_being_told() -> None:
    async with hostile_guest() as guest:
        os.write(guest.console, bytes(8 << 20))
        while os.fstat(guest.console).st_blocks * 512 > LIMIT_BYTES:
            await asyncio.sleep(0.1)


def test_a_console_that_is_not_appended_to(tmp_path: Path) -> None:
    """A libvirt daemon's QEMU goes on where it was: behind a hole."""
    with open(tmp_path / "console", "wb", buffering=0) as file:
        console = Console(os.open(tmp_path / "console", os.O_RDONLY))
        for number in range(8):
            file.write(b"%d\n" % number * 500_000)
            console.trim()
            assert os.fstat(file.fileno()).st_blocks * 512 <= LIMIT_BYTES
        file.write(b"end\n")
        assert console.tail().endswith("7\n7\nend")
        console.close()


@alone
async def test_events_of_qemu_without_end() -> None:
    async with hostile_guest() as guest:
        event = b'{"event": "ACPI_DEVICE_OST", "data": {"info": {}}, "timestamp": {"seconds": 1, "microseconds": 2}}\n'
        await guest.say(b'{"event": "STOP"}\n' * 3 * EVENTS_AT_ONCE + event * (EVENTS_AT_ONCE - 10), to_monitor=True)
        await asyncio.sleep(0.05)
        assert not guest.vm.cause
        await guest.say(event * 20 * EVENTS_AT_ONCE, to_monitor=True)
        assert "ACPI_DEVICE_OST" in await guest.end()


@alone
async def test_a_crash_kernel_is_a_panic() -> None:
    async with hostile_guest() as guest:
        await guest.say(b'{"event": "GUEST_CRASHLOADED"}\n', to_monitor=True)
        assert await guest.end() == "guest kernel panic"
