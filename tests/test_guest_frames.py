"""Whatever bytes a guest writes to its agent port, they end that VM at most; what passes is typed and in range."""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import astuple
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfparallel.errors import ProtocolError
from sfparallel.vmm import guest_frames
from sfparallel.vmm.file_service import FileService
from sfparallel.vmm.guest_frames import Exited, Frozen, Woken
from sfparallel.vmm.vm import VmState
from sfparallel.wire import HEADER, MAX_PAYLOAD_BYTES, Frame, FrameParser, FrameType, unpack
from tests.hostile_guest import hostile_guest

numbers = st.one_of(st.integers(-(1 << 63), (1 << 64) - 1), st.sampled_from([0, 1, 127, 128, 256, 0x7F, 0xFF7F, 1 << 16]))
atoms = st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=10), st.binary(max_size=10),
                  st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9)))
keys = st.sampled_from(["status", "oom_kills", "cpu_ns", "wall_ns", "agent", "op", "id", b"status"])
values = st.recursive(atoms, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(keys, atoms), inner,
                                                                                                   max_size=4)), max_leaves=20)
maps = st.dictionaries(st.one_of(keys, keys, atoms), values, max_size=6)


def packed(value: object) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass"))


nests = st.builds(lambda head, depth: head * depth, st.sampled_from([b"\x91", b"\x81", b"\x81\xa1x", b"\xc7\x0c\xff"]),
                  st.sampled_from([1, 10, 511, 512, 1023, 1024, 5000]))
texts = st.one_of(st.builds(packed, maps), st.builds(packed, values), nests, st.binary(max_size=40),
                  st.builds(lambda key: b"\x81" + packed(key) + b"\x01", values), st.sampled_from([
                      b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x82\xa1a\x01\xa1a\x02",
                      b"\x81\xd6\xff\xff\xff\xff\xff\x01", b"\xc7\x0c\xff" + b"\xff" * 12,
                      b"\x81\xcb\x7f\xf8" + bytes(6) + b"\x01",
                      packed({"status": 10 ** 18, "oom_kills": 0}), packed({"status": 0x7F, "oom_kills": 0})]))
fuse = st.builds(lambda opcode, node, body: struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 2, node, 0, 0, 0, 0, 0) + body,
                 st.integers(0, 60), st.integers(0, 3), st.binary(max_size=60))
frames = st.builds(lambda kind, payload, channel: Frame(kind, payload, channel).encode(),
                   st.one_of(st.sampled_from([kind for kind in FrameType if kind < 32]), st.sampled_from(FrameType)),
                   st.one_of(texts, fuse), st.sampled_from([0, 1, 2, 7, 999, 65535]))
heads = st.builds(HEADER.pack, st.sampled_from([0, 1, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, (1 << 32) - 1]),
                  st.integers(0, 65535), st.integers(0, 65535))
streams = st.lists(st.one_of(frames, frames, heads, st.binary(max_size=20)), max_size=12).map(b"".join)


@settings(max_examples=2000, deadline=None)
@given(texts)
def test_a_message_is_a_map_or_an_error(data: bytes) -> None:
    try:
        message = unpack(data)
    except ProtocolError as error:
        assert len(str(error)) < 1000
    else:
        assert type(message) is dict


@settings(max_examples=1000, deadline=None)
@given(st.lists(streams, max_size=3).map(b"".join), st.lists(st.integers(1, 30), max_size=10))
def test_frames_do_not_depend_on_the_pieces_they_come_in(data: bytes, sizes: list[int]) -> None:
    def parsed(pieces: list[bytes]) -> list[Frame | str]:
        parser, found = FrameParser(), list[Frame | str]()
        try:
            for piece in pieces:
                for frame in parser.feed(piece):
                    found.append(frame)
                assert parser.pending_bytes <= MAX_PAYLOAD_BYTES + HEADER.size
        except ProtocolError as error:
            found.append(str(error))
        return found

    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at:at + size])
        at += size
    assert parsed([*pieces, data[at:]]) == parsed([data])


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from([kind for kind in FrameType if kind < 32]), texts, st.integers(0, 65535))
def test_what_passes_is_typed_and_in_range(kind: FrameType, payload: bytes, channel: int) -> None:
    frame = Frame(kind, payload, channel)
    try:
        guest_frames.check(frame)
        match kind:
            case FrameType.FROZEN:
                report: Frozen | Woken | Exited | str = guest_frames.frozen(frame)
            case FrameType.WOKEN:
                report = guest_frames.woken(frame)
            case FrameType.EXITED:
                report = guest_frames.exited(frame)
                assert -65 < os.waitstatus_to_exitcode(report.status) < 256
            case FrameType.FAILED:
                report = guest_frames.failed(frame)
                assert len(report) < 1100
            case _:
                assert kind is not FrameType.OUTPUT or channel in (1, 2)
                return
    except ProtocolError as error:
        assert len(error.message) < 1000
    else:
        assert isinstance(report, str) or all(0 <= value < 1 << 63 for value in astuple(report))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=streams, state=st.sampled_from([VmState.RUNNING, VmState.RUNNING, VmState.FROZEN]))
def test_a_stream_ends_its_vm_at_most(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes, state: VmState) -> None:
    """A real `Vm` and file service; no exception is left to the event loop, and none is a mistake of ours."""
    failures: list[object] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with hostile_guest() as guest:
            service = FileService({7: tmp_path}, print)
            vm = guest.vm
            vm.events.on_frame = lambda vm, frame: (
                service.request(vm, frame.channel, frame.payload) if frame.type is FrameType.FUSE else None)
            vm.events.on_room = service.go_on
            vm.state = state
            await guest.say(data + b"\0" * (MAX_PAYLOAD_BYTES + 64))  # completes the last frame; type 0 is none
            assert "broke the protocol" in await guest.end() or "its agent gave up" in vm.cause

    asyncio.run(scenario())
    assert failures == [] and not [record for record in caplog.records if record.levelname == "ERROR"]


def test_no_frame_may_come_from_one_that_stands_still() -> None:
    async def scenario() -> str:
        async with hostile_guest() as guest:
            guest.vm.state = VmState.FROZEN
            await guest.send(FrameType.OUTPUT, b"x", 1)
            return await guest.end()

    assert "OUTPUT while it was frozen" in asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "payload", "channel", "what"), [
    (FrameType.OUTPUT, b"x", 999, "channel 999"),
    (FrameType.THAW, b"", 0, "sent to guests"),
    (FrameType.REQUEST, bytes((128 << 10) + 1), 0, "a request of"),
    (FrameType.EXITED, packed({"status": 10 ** 18, "oom_kills": 0}), 0, "not the wait status"),
    (FrameType.EXITED, packed({"status": 0x7F, "oom_kills": 0}), 0, "not the wait status"),
    (FrameType.EXITED, packed({"status": 0}), 0, "oom_kills"),
    (FrameType.WOKEN, b"\x81\x90\x01", 0, "undecodable"),
    (FrameType.FROZEN, packed({"oom_kills": 1.5}), 0, "oom_kills"),
    (FrameType.TAKEN, b"x", 0, "TAKEN with 1 bytes"),
])  # fmt: skip
def test_a_vm_that_lies_is_ended_with_what_it_said(kind: FrameType, payload: bytes, channel: int, what: str) -> None:
    async def scenario() -> str:
        async with hostile_guest() as guest:
            await guest.send(kind, payload, channel)
            return await guest.end()

    cause = asyncio.run(scenario())
    assert what in cause and "broke the protocol" in cause
