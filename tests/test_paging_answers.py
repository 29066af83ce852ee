"""Whatever a paging layer answers, whose QEMU its guest may have taken over: a result in range, or an error of that VM's."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.errors import PagingError
from sfparallel.vmm.layers import PAGE_BYTES, RUN, MemoryMap
from sfparallel.vmm.paging import (
    CommitResult,
    MapResult,
    PagingHello,
    PagingLayer,
    PagingRefused,
    PagingStatistics,
    control_pair,
)
from sfparallel.vmm.plans import CommitPlan, MapPlan
from tests.conftest import PATIENCE

HANG_S = 60.0 * PATIENCE
PAGES = 16
OPERATIONS = {"hello": 1, "map": 2, "carry_out": 3, "statistics": 4, "prepare": 5, "warm": 7}
REPLY = struct.Struct("<IHHIiII8Q")

wide = st.one_of(st.integers(0, PAGES),
                 st.sampled_from([PAGE_BYTES, PAGES + 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
statuses = st.one_of(st.just(0), st.just(0), st.integers(-200, 5), st.sampled_from([-(1 << 31), (1 << 31) - 1, -4096]))
runs = st.lists(st.tuples(st.one_of(st.integers(0, PAGES), st.just((1 << 64) - 1)), st.integers(0, PAGES), st.integers(0, 3)),
                max_size=4)


def reply(operation: str, fields: tuple[int, int, int, int, int, int], values: list[int]) -> bytes:
    magic, version, serial, status, step, flags = fields
    return REPLY.pack(magic, version, OPERATIONS[operation], serial, status, step, flags, *values)


replies = st.builds(
    reply, st.sampled_from(list(OPERATIONS)),
    st.tuples(st.sampled_from([0x47504653] * 9 + [0]), st.sampled_from([1] * 9 + [2]), st.sampled_from([1] * 6 + [0, 2]),
              statuses, st.one_of(st.integers(0, 20), st.just((1 << 32) - 1)), st.integers(0, 8)),
    st.lists(wide, min_size=8, max_size=8),
)  # fmt: skip
packets = st.lists(st.one_of(replies, replies, st.binary(min_size=1, max_size=120)), max_size=3)


def check(result: object, plan: CommitPlan) -> None:
    match result:
        case CommitResult():
            assert max(result.dirty_pages, result.stored_pages, result.zero_pages) <= PAGES
            MemoryMap.zero(PAGES).apply(result.runs, 1)  # does not raise
        case PagingHello():
            assert result.page_bytes == PAGE_BYTES
        case int():
            assert result >= 0
        case _:
            assert isinstance(result, MapResult | PagingStatistics)


def is_hung_up(peer: socket.socket) -> bool:
    """Whether the connection was closed at the other end, behind the requests that came from there."""
    peer.setblocking(False)
    try:
        while peer.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:  # it was closed with answers that nobody has read
        pass
    return True


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(list(OPERATIONS)), packets, runs)
def test_any_answer_of_a_paging_layer(operation: str, answers: list[bytes], written: list[tuple[int, int, int]]) -> None:
    """Over a real socket, whose other end is closed behind the answers. What violates the protocol is told once."""
    told: list[str] = []
    ours, peer = control_pair()
    layer = PagingLayer(ours, on_violation=told.append)
    empty, target = MemoryMap.zero(PAGES), os.memfd_create("target")

    async def ask(plan: CommitPlan, image: MapPlan) -> object:
        calls: dict[str, Awaitable[object]] = {
            "hello": layer.hello(), "map": layer.map(0, image), "carry_out": layer.carry_out(0, plan),
            "statistics": layer.statistics(0, PAGES * PAGE_BYTES), "prepare": layer.prepare(0, plan), "warm": layer.warm(1),
        }  # fmt: skip
        chosen = calls.pop(operation)
        for other in calls.values():
            other.close()  # type: ignore[attr-defined]
        for answer in answers:
            peer.send(answer)
        peer.shutdown(socket.SHUT_WR)
        return await asyncio.wait_for(chosen, HANG_S)

    with CommitPlan(empty, target, 1) as plan, MapPlan(empty, {}) as image:
        struct_of_runs = b"".join(struct.pack("<QII", *run) for run in written)
        assert len(struct_of_runs) == len(written) * RUN.itemsize
        os.pwrite(plan.fds[1], struct_of_runs, 0)
        try:
            check(asyncio.run(ask(plan, image)), plan)
        except PagingRefused as error:
            assert 0 < error.errno < 4096 and told == []
        except PagingError as error:
            assert bool(told) == ("violated" in error.message) and len(told) < 2 and len(str(error)) < 500
    assert is_hung_up(peer) == bool(told)
    layer.close()
    peer.close()
    os.close(target)


def test_a_flood_of_answers_to_nothing_is_ended_at_once() -> None:
    """It would be passed over for as long as it comes, and the loop that serves all VMs with it."""
    ours, peer = control_pair()
    layer = PagingLayer(ours)
    flood = reply("hello", (0x47504653, 1, 0, 0, 0, 0), [0] * 8)

    async def ask() -> None:
        peer.setblocking(False)
        asyncio.get_running_loop().add_writer(peer.fileno(), peer.send, flood)
        try:
            await asyncio.wait_for(layer.hello(), HANG_S)
        finally:
            asyncio.get_running_loop().remove_writer(peer.fileno())

    with peer, pytest.raises(PagingError, match="violated the protocol: an answer to what was not asked"):
        asyncio.run(ask())
