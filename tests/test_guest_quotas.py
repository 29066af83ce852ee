"""What a VM may have under way with the supervisor has a bound; each of these fills one, over a real agent port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm import quotas
from sfparallel.vmm.agent_port import HIGH_WATER_BYTES
from sfparallel.vmm.capacity import available_bytes
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.machine import Accelerator, MachineSpec
from sfparallel.vmm.pool import ImageAhead, Pool
from sfparallel.vmm.record import ForkReport
from sfparallel.vmm.regions import Regions
from sfparallel.vmm.replies import RegionSettings
from sfparallel.vmm.requests import ANSWER_BYTES
from sfparallel.vmm.tickets import Member, Ticket, TicketState
from sfparallel.vmm.vm import Vm
from sfparallel.wire import FrameType, pack, unpack
from tests.hostile_guest import HostileGuest, hostile_guest
from tests.test_guest_bounds import alone, waiting_bytes


def regions_of_a_job() -> Regions:
    async def no_shell() -> Vm:
        raise AssertionError("nobody forks here")

    store = LayerStore()
    spec = MachineSpec(Accelerator.TCG, cpus=1, memory_bytes=384 << 20, root_image=Path("/none"))
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    return Regions(RegionSettings("test", None, False, False), spec, Pool(no_shell, ImageAhead(store)), store,
                   on_clone=nothing, on_world=nothing, on_report=nothing)  # fmt: skip


def attach(regions: Regions, guest: HostileGuest) -> None:
    guest.vm.events.on_frame = lambda vm, frame: regions.request(vm, frame.channel, frame.payload)
    gone = guest.vm.events.on_gone
    guest.vm.events.on_gone = lambda vm, cause: (regions.vm_gone(vm, cause), gone(vm, cause))[1]


async def ask(guest: HostileGuest, number: int, op: str, **fields: Any) -> None:
    await guest.send(FrameType.REQUEST, pack({"id": number, "op": op, **fields}), 1)


async def answers(guest: HostileGuest, count: int) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    while len(found) < count:
        for frame in await guest.hear():
            message = unpack(frame.payload)
            found[message["id"]] = message
    return found


def running_ticket(regions: Regions, owner: Vm, clones: list[Vm]) -> Ticket:
    ticket = regions._tickets.issue(owner, 1, len(clones))
    ticket.state = TicketState.CLONING
    ticket.report = ForkReport(len(clones), 0.0)
    regions._tickets.start(ticket, [Member(rank, vm, "", 1) for rank, vm in enumerate(clones, 1)])
    return ticket


@alone
async def test_requests_that_stay_pending() -> None:
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest:
        attach(regions, guest)
        async with guest.vm.save_lock:
            for number in range(2000):
                await ask(guest, number, "checkpoint")
            refused = await answers(guest, 2000 - quotas.MOST_REQUESTS)
            assert {answer["error"] for answer in refused.values()} == {"state"} and "in progress" in refused[1999]["message"]
            assert len(regions._tasks) == quotas.MOST_REQUESTS
            await guest.say(b"")
        await regions.close()
        assert regions._pending._pending == {}


@alone
async def test_large_requests_that_stay_pending() -> None:
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest:
        attach(regions, guest)
        async with guest.vm.save_lock:
            for number in range(64):
                await ask(guest, number, "checkpoint", more=bytes(100_000))
            assert len(await answers(guest, 64 - 10)) == 54
            assert sum(size for _, size in regions._pending._pending.values()) <= quotas.MOST_REQUEST_BYTES
        await regions.close()


@alone
async def test_joins_without_end() -> None:
    """A program that asks again and again, with a time limit each time, leaves requests behind."""
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest, hostile_guest() as clone:
        attach(regions, guest)
        attach(regions, clone)
        ticket = running_ticket(regions, guest.vm, [clone.vm])
        for number in range(5000):
            await ask(guest, number, "join", ticket=1)
            if number % 500 == 499:
                await answers(guest, 499)
                assert len(regions._tasks) < 10
        ticket.discard()
        (last,) = (await answers(guest, 1)).values()
        assert last == {"id": 4999, "status": {1: None}}


@alone
async def test_tickets_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MOST_TICKETS", 50)
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest, hostile_guest() as other:
        attach(regions, guest)
        attach(regions, other)
        for number in range(100):
            await ask(guest, number, "ticket", n=1)
        found = await answers(guest, 100)
        assert [("ticket" in found[number]) for number in range(100)] == [True] * 50 + [False] * 50
        assert "neither joined nor killed" in found[99]["message"] and len(regions._tickets.of(guest.vm)) == 50
        await ask(other, 1, "ticket", n=1)
        assert "ticket" in (await answers(other, 1))[1]  # the other VM has its own
        await ask(guest, 100, "kill", ticket=1)
        await ask(guest, 101, "ticket", n=1)
        assert "ticket" in (await answers(guest, 2))[101]


@alone
async def test_a_ticket_for_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest:
        attach(regions, guest)
        monkeypatch.setattr(regions._capacity, "_clone_bytes", available_bytes() // 4)
        await ask(guest, 1, "ticket", n=100)
        assert 1 <= (await answers(guest, 1))[1]["granted"] <= 8
        monkeypatch.setattr(regions._capacity, "_clone_bytes", 1 << 60)
        await ask(guest, 2, "ticket", n=1)
        assert (await answers(guest, 1))[2]["error"] == "capacity"


@alone
async def test_checkpoints_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest:
        attach(regions, guest)
        monkeypatch.setattr(quotas, "MOST_CHECKPOINTS", 0)
        await ask(guest, 1, "checkpoint")
        assert (await answers(guest, 1))[1]["error"] == "state"
        monkeypatch.undo()
        monkeypatch.setattr(regions._capacity, "_clone_bytes", 1 << 60)
        await ask(guest, 2, "checkpoint")
        assert (await answers(guest, 1))[2]["error"] == "capacity"


@alone
async def test_answers_wait_until_the_parent_reads() -> None:
    regions = regions_of_a_job()
    async with AsyncExitStack() as stack:
        parent = await stack.enter_async_context(hostile_guest("parent", 0))
        clones = [await stack.enter_async_context(hostile_guest(f"clone {number}", number)) for number in range(1, 41)]
        for guest in (parent, *clones):
            attach(regions, guest)
        running_ticket(regions, parent.vm, [clone.vm for clone in clones])
        for clone in clones:
            await clone.send(FrameType.REQUEST, pack({"op": "exit", "status": 0, "answer": bytes(ANSWER_BYTES)}), 1)
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert waiting_bytes(parent) < HIGH_WATER_BYTES + 2 * ANSWER_BYTES
        assert sum(clone.lost.done() for clone in clones) < 20  # the others wait with their answers
        ranks: list[int] = []
        while len(ranks) < 40:
            for frame in await parent.hear():
                message = unpack(frame.payload)
                assert message["event"] == "answer" and len(message["data"]) == ANSWER_BYTES
                ranks.append(message["rank"])
        assert sorted(ranks) == list(range(1, 41))
        for clone in clones:
            await clone.end()


@alone
async def test_an_answer_that_waits_outlives_its_clone() -> None:
    """The clone has ended as it should: nobody else would tell the region."""
    regions = regions_of_a_job()
    async with hostile_guest("parent", 0) as parent, hostile_guest() as clone:
        attach(regions, parent)
        attach(regions, clone)
        running_ticket(regions, parent.vm, [clone.vm])
        parent.vm.send(FrameType.REPLY, pack({"event": "other", "data": bytes(900_000)}))
        await clone.send(FrameType.REQUEST, pack({"op": "exit", "status": 0, "answer": b"the answer"}), 1)
        await clone.send(FrameType.REQUEST, pack({"op": "exit", "status": 0, "answer": b"another"}), 1)
        while (found := regions._tickets.clone(clone.vm)) and not found[1].leaving:
            await asyncio.sleep(0)
        clone.vm.kill()
        await clone.end()
        heard: list[dict[str, Any]] = []
        while len(heard) < 2:
            heard += [unpack(frame.payload) for frame in await parent.hear()]
        assert heard[1] == {"event": "answer", "ticket": 1, "rank": 1, "data": b"the answer"}


@alone
async def test_reports_of_answers_are_taken_once() -> None:
    regions = regions_of_a_job()
    async with hostile_guest("parent") as guest, hostile_guest() as clone:
        attach(regions, guest)
        attach(regions, clone)
        ticket = running_ticket(regions, guest.vm, [clone.vm])
        for _ in range(1000):
            await guest.send(FrameType.REQUEST, pack({"op": "stats", "ticket": 1, "first_s": 1, "last_s": 2}), 1)
        await ask(guest, 1, "hello")
        await answers(guest, 1)
        assert ticket.report and len(ticket.report.spans) == 2
