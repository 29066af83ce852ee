"""Forks and checkpoints of VMs: requests of programs for clones, from the ticket to clones that run. One object per job."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from sfparallel.errors import SfError, StateError
from sfparallel.net.addresses import address_of, mac_of
from sfparallel.vmm import engine
from sfparallel.vmm.capacity import Capacity
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.engine import Birth
from sfparallel.vmm.machine import MachineSpec
from sfparallel.vmm.pool import Pool
from sfparallel.vmm.quotas import check_checkpoints
from sfparallel.vmm.record import SUPERVISOR, ForkReport, Phase
from sfparallel.vmm.replies import RegionSettings, failure, identity, thaw
from sfparallel.vmm.saved import Saved, SavedStates
from sfparallel.vmm.tickets import Member, Ticket, Tickets, TicketState
from sfparallel.vmm.vm import FREEZE_TIMEOUT_S, Vm, VmState
from sfparallel.wire import FrameType, pack


class Forks:
    """Makes the clones of a job's tickets, and its programs' checkpoints.

    `clone`, `checkpoint`, `create` and `drop` serve the requests of these names: the VM, the channel of the program that asks,
    its message; they return the answer, or None if they have given it themselves.

    Args:
        on_clone: called with each new clone, and the label of its output, before it runs.
        on_world: called with the clones that run the whole program, in the order of ranks, when all run.
        on_report: called when a checkpoint has been made.
        could_not_start: called with a clone that could not be woken, and why.
    """

    def __init__(
        self,
        settings: RegionSettings,
        spec: MachineSpec,
        pool: Pool,
        store: LayerStore,
        tickets: Tickets,
        capacity: Capacity,
        *,
        on_clone: Callable[[Vm, str], None],
        on_world: Callable[[list[Vm]], None],
        on_report: Callable[[ForkReport], None],
        could_not_start: Callable[[Vm, str], None],
    ) -> None:
        self._settings = settings
        self._spec = spec
        self._pool = pool
        self._store = store
        self._tickets = tickets
        self._capacity = capacity
        self._on_clone = on_clone
        self._on_world = on_world
        self._on_report = on_report
        self._could_not_start = could_not_start
        self._saved = SavedStates()
        self._keeping: set[tuple[Vm, int]] = set()
        """VMs, and the channels of their programs, that a checkpoint is just being made for."""
        self._forks = 0

    async def clone(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any] | None:
        ticket = self._tickets.find(vm, channel, message["ticket"])
        ticket.require(TicketState.GRANTED)
        ticket.state = TicketState.CLONING
        # sf.parallel says what it forks for and counts ranks from 0; the low-level calls say nothing and count from 1.
        ticket.label_base = 0 if message["context"] else 1
        ticket.world = self._settings.world and not self._tickets.is_clone(vm)
        limit = _Limit(message["within_s"])
        with contextlib.ExitStack() as stack:
            try:
                # Two programs of one VM may fork it one after the other. Other VMs go their own way meanwhile.
                async with limit.waits, vm.save_lock:
                    self._require_asker(ticket)
                    stack.enter_context(self._pool.held())
                    saved, clones, report = await self._fork(vm, ticket, message, limit)
            except (SfError, OSError) as error:  # TimeoutError is an OSError
                ticket.give_up()
                answer = limit.failure(error)
                if vm.state not in (VmState.FROZEN, VmState.FREEZING):
                    return answer
                vm.thaw(thaw(channel, {"id": message["id"], **answer}))
                return None
            try:
                await self._launch(ticket, clones, saved, report)
            finally:
                saved.checkpoint.close()
                if vm.memory and not self._tickets.is_clone(vm):
                    self._pool.follow(vm.memory)
        return None

    def _require_asker(self, ticket: Ticket) -> None:
        """Check, after any wait, that somebody still wants the clones: they would run on from a state in which nobody waits for
        them, and so run the parent's program a second time.

        Raises:
            StateError: the program that asked for them wants them no more or has hung up, or its VM is gone.
        """
        if not self._tickets.is_open(ticket):
            raise StateError(f"the program that asked for the clones of ticket {ticket.number} has ended")
        ticket.require_wanted()

    def _new_report(self, n: int, vm: Vm) -> ForkReport:
        self._forks += 1
        return ForkReport(n, time.monotonic(), self._forks, vm.name)

    async def _take_shells(self, report: ForkReport) -> list[Vm]:
        shells = await self._pool.take(report.n)
        self._pool.aim(report.n)
        report.note(SUPERVISOR, Phase.SHELLS, report.started)
        return shells

    async def _fork(
        self, vm: Vm, ticket: Ticket, message: dict[str, Any], limit: _Limit
    ) -> tuple[Saved, list[dict[str, Any]], ForkReport]:
        """Save the VM and thaw it with its answer; what is returned is for `_launch`."""
        ticket.report = report = self._new_report(ticket.granted, vm)
        shells = await self._take_shells(report)
        try:
            self._require_asker(ticket)
            checkpoint = await engine.save(vm, self._store, report, freeze_limit_s=limit.end_wait())
            try:
                self._require_asker(ticket)
            except StateError:
                checkpoint.close()
                raise
        except BaseException:
            self._pool.give_back(shells)
            raise
        clones = self._start(ticket, shells, report, ticket.channel)
        vm.thaw(thaw(ticket.channel, {"id": message["id"], "rank": 0, "role": "parent", "clones": clones}))
        return Saved(0, vm, ticket.channel, message["id"], checkpoint), clones, report

    def _start(self, ticket: Ticket, shells: list[Vm], report: ForkReport, channel: int) -> list[dict[str, Any]]:
        """From here on the shells are clones of the ticket, made for the program of a channel; returns what all of them are told
        about each."""
        members = [Member(rank, shell, address_of(shell.number), channel) for rank, shell in enumerate(shells, 1)]
        for member in members:
            report.note(member.vm.name, Phase.START, member.vm.started, member.vm.ready)
            report.mark(member.vm.name, Phase.TAKEN, rank=member.rank)
        self._tickets.start(ticket, members)
        for member in members:
            self._on_clone(member.vm, f"[{member.rank - 1 + ticket.label_base}] " if self._settings.labels else "")
        return [{"rank": member.rank, "address": member.address, "host": ""} for member in members]

    async def _launch(self, ticket: Ticket, clones: list[dict[str, Any]], saved: Saved, report: ForkReport) -> None:
        members = ticket.members.values()
        births = [Birth(member.vm, self._birth_message(saved, member, clones)) for member in members]
        launched = time.monotonic()
        try:
            await engine.launch(births, saved.checkpoint, report, self._could_not_start)
        finally:
            report.note(SUPERVISOR, Phase.LAUNCH, launched)
        if ticket.world:
            self._on_world([member.vm for member in members])

    def _birth_message(self, saved: Saved, member: Member, clones: list[dict[str, Any]]) -> dict[str, Any]:
        source = saved.owner.number
        answer = {
            "id": saved.request, "rank": member.rank, "role": "clone", "parent": address_of(source),
            "address": member.address, "clones": clones, "entropy": os.urandom(32),
            **({"checkpoint": saved.number, "batch": saved.batches} if saved.number else {}),
        }  # fmt: skip
        parent = [address_of(source), mac_of(source)]
        role = "clone" if self._tickets.rank_of(member.vm) is None else "rank"
        return thaw(saved.channel, answer, identity(role, member.vm.number, self._settings.job, self._spec.mtu, [parent]))

    async def checkpoint(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any] | None:
        asker = (vm, channel)
        limit = _Limit(message["within_s"])
        try:
            async with limit.waits, vm.save_lock:
                check_checkpoints(self._saved.count(vm))
                self._capacity.grant(1, running=0, warm=0)  # it takes memory as a clone does
                self._keeping.add(asker)
                report = self._new_report(0, vm)
                checkpoint = await engine.save(vm, self._store, report, freeze_limit_s=limit.end_wait())
                if asker not in self._keeping:
                    checkpoint.close()
                    raise StateError("the program that asked for the checkpoint has ended")
        except (SfError, OSError) as error:
            frozen = vm.state in (VmState.FROZEN, VmState.FREEZING)
            answer = limit.failure(error, "clone_failed" if frozen else "")
            if not frozen:
                return answer
            vm.thaw(thaw(channel, {"id": message["id"], **answer}))
            return None
        finally:
            self._keeping.discard(asker)
        saved = self._saved.add(self._tickets.new_number(), vm, channel, message["id"], checkpoint)
        answer = {"id": message["id"], "rank": 0, "role": "parent", "clones": [], "checkpoint": saved.number, "batch": 0}
        vm.thaw(thaw(channel, answer))
        self._on_report(report)
        return None

    async def create(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any] | None:
        """Clones of a checkpoint: as for a fork, but for the save; the VM that asks goes on meanwhile."""
        ticket = self._tickets.find(vm, channel, message["ticket"])
        ticket.require(TicketState.GRANTED)
        saved = self._saved.find(vm, message["checkpoint"])
        ticket.state = TicketState.CLONING
        ticket.label_base = message["first"]
        limit = _Limit(message["within_s"])
        try:
            async with limit.waits, saved.lock:
                self._require_asker(ticket)
                with self._pool.held():
                    await self._create_clones(vm, ticket, message, limit)
        except (SfError, OSError) as error:
            ticket.give_up()
            return limit.failure(error)
        return None

    async def _create_clones(self, vm: Vm, ticket: Ticket, message: dict[str, Any], limit: _Limit) -> None:
        ticket.report = report = self._new_report(ticket.granted, vm)
        shells = await self._take_shells(report)
        try:
            self._require_asker(ticket)
            # Looked up only now: it may have been closed while this waited.
            saved = self._saved.find(vm, message["checkpoint"])
        except StateError:
            self._pool.give_back(shells)
            raise
        limit.end_wait()
        saved.batches += 1
        clones = self._start(ticket, shells, report, saved.channel)
        vm.send(FrameType.REPLY, pack({"id": message["id"], "batch": saved.batches, "clones": clones}), ticket.channel)
        try:
            await self._launch(ticket, clones, saved, report)
        finally:
            saved.checkpoint.forget_plans()

    async def drop(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        saved = self._saved.find(vm, message["checkpoint"])
        async with saved.lock:  # not while clones are being made from it
            self._saved.drop(saved)
        return {}

    def vm_gone(self, vm: Vm) -> None:
        """A VM has ended; what was kept of it, or made for it, ends with it."""
        self._store.release(vm)
        self._keeping = {asker for asker in self._keeping if asker[0] is not vm}
        self._saved.drop_all(vm)
        self._pool.discard(vm)

    def client_gone(self, vm: Vm, channel: int) -> None:
        """A program closed its connection: it takes no checkpoint any more."""
        self._keeping.discard((vm, channel))

    def close(self) -> None:
        """Forget all checkpoints."""
        self._saved.drop_all()


class _Limit:
    """The time that a request for clones has, as the program that asks says.

    Attributes:
        waits: bounds what may be given up.
    """

    def __init__(self, within_s: float | None) -> None:
        self._now = asyncio.get_running_loop().time
        self._until = None if within_s is None else self._now() + within_s
        self.waits = asyncio.timeout_at(self._until)

    def end_wait(self) -> float:
        """From here on the wait may not be cut short, for a VM is being saved, or clones begin. Returns how long a VM may take to
        freeze."""
        self.waits.reschedule(None)
        return FREEZE_TIMEOUT_S if self._until is None else min(FREEZE_TIMEOUT_S, self._until - self._now())

    def failure(self, error: SfError | OSError, kind: str = "") -> dict[str, Any]:
        """What is answered to a request that failed."""
        if self._until is not None and self._now() >= self._until:
            return {"error": "timeout", "message": f"there was not enough time to fork: {error}"}
        return failure(error, kind)
