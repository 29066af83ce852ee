"""What programs in the VMs ask the supervisor for: tickets, clones, their end. One object per job.

Every request is a msgpack map with "op" and "id" (see ARCHITECTURE.md, "The agent port"), read and checked by `requests.decode`;
each handler here answers one op.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfparallel.errors import CapacityError, ProtocolError, SfError, StateError, UsageError, VMError
from sfparallel.net.addresses import address_of, mac_of
from sfparallel.vmm import engine
from sfparallel.vmm.capacity import Capacity
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.engine import Birth
from sfparallel.vmm.machine import MachineSpec
from sfparallel.vmm.pool import Pool
from sfparallel.vmm.processes import cpu_seconds, private_memory
from sfparallel.vmm.quotas import Pending, check_checkpoints, check_tickets, too_many_requests
from sfparallel.vmm.record import SUPERVISOR, ForkReport, Phase
from sfparallel.vmm.requests import ANSWER_BYTES, REQUESTS, BadRequest, Caller, decode, shortened
from sfparallel.vmm.saved import Saved, SavedStates
from sfparallel.vmm.tickets import Member, Ticket, TicketState
from sfparallel.vmm.vm import FREEZE_TIMEOUT_S, Vm, VmState
from sfparallel.wire import FrameType, pack

log = logging.getLogger("sfparallel")

PREFIX_LENGTH = 16
"""All VMs of a job are in one subnet (net.addresses)."""

MEASURED = 8
"""Clones of a fork whose memory is measured: the kernel looks at each of their pages for that, while others want to wake."""

_LAST_WORDS_S = 1.0

Handler = Callable[[Vm, int, dict[str, Any]], Awaitable[dict[str, Any] | None]]


@dataclass(frozen=True)
class RegionSettings:
    """What `sfrun` was told that programs in the guest want to know."""

    job: str
    default_n: int | None
    labels: bool
    statistics: bool
    seed: int | None = None
    world: bool = False
    """The parent's own clones run the whole program (`--spmd`)."""


class Regions:
    """Tickets and clones of a job.

    Args:
        on_clone: called with each new clone, and the label of its output, before it runs.
        on_world: called with the clones that run the whole program, in the order of ranks, when all run.
        on_report: called when a fork's clones are all gone and its program is done with them.
    """

    def __init__(
        self,
        settings: RegionSettings,
        spec: MachineSpec,
        pool: Pool,
        store: LayerStore,
        *,
        on_clone: Callable[[Vm, str], None],
        on_world: Callable[[list[Vm]], None],
        on_report: Callable[[ForkReport], None],
    ) -> None:
        self._settings = settings
        self._spec = spec
        self._pool = pool
        self._store = store
        self._on_clone = on_clone
        self._on_world = on_world
        self._on_report = on_report
        self._tickets: dict[int, Ticket] = {}
        self._members: dict[Vm, tuple[Ticket, Member]] = {}
        self._capacity = Capacity(spec)
        self._saved = SavedStates()
        self._keeping: set[tuple[Vm, int]] = set()
        """VMs, and the channels of their programs, that a checkpoint is just being made for."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = Pending()
        self._next_ticket = 1
        self._forks = 0
        self._handlers: dict[str, Handler] = {
            "hello": self._hello, "ticket": self._ticket, "clone": self._clone, "exit": self._exit,
            "checkpoint": self._checkpoint, "create": self._create, "drop": self._drop,
            "join": self._join, "kill": self._kill, "stats": self._stats,
            "abort": self._abort, "signal": self._signal,
        }  # fmt: skip

    # -- requests --------------------------------------------------------------------------------------------------

    def request(self, vm: Vm, channel: int, payload: bytes) -> None:
        """Take a request from a program; the answer goes back when there is one."""
        if not self._pending.begin(vm, len(payload)):
            self._refuse(vm, channel, payload)
            return
        task = asyncio.get_running_loop().create_task(self._serve(vm, channel, payload))
        self._tasks.add(task)

        def done(task: asyncio.Task[None], size: int = len(payload)) -> None:
            self._tasks.discard(task)
            self._pending.end(vm, size)

        task.add_done_callback(done)

    def _refuse(self, vm: Vm, channel: int, payload: bytes) -> None:
        try:
            number = decode(payload).id
        except BadRequest as error:
            number = error.id
        vm.send(FrameType.REPLY, pack({"id": number, **failure(too_many_requests())}), channel)

    async def _serve(self, vm: Vm, channel: int, payload: bytes) -> None:
        number: int | None = None
        try:
            request = decode(payload)
            number = request.id
            if REQUESTS[request.op].caller is Caller.CLONE:
                self._member(vm)
            if self._inherited(vm, channel, request.fields):
                vm.send(FrameType.REPLY, pack({"id": number, **_CANCELLED}), channel)
                return
            answer = await self._handlers[request.op](vm, channel, {"id": number, **request.fields})
            if answer is not None:
                vm.send(FrameType.REPLY, pack({"id": number, **answer}), channel)
        except (SfError, OSError) as error:
            log.info("%s: request failed: %s", vm.name, error)
            if isinstance(error, BadRequest):
                number = error.id
                self._misspoke(vm, error)
            vm.send(FrameType.REPLY, pack({"id": number, **failure(error)}), channel)
        except Exception as error:  # a mistake of ours; who knows in which state it leaves the VM: do not let it wait for ever
            log.exception("%s: request %r failed", vm.name, payload[:200])
            vm.end(f"the supervisor failed: {error!r}")

    def _member(self, vm: Vm) -> tuple[Ticket, Member]:
        found = self._members.get(vm)
        if found is None:
            raise StateError("only a clone can ask for that; this is the parent")
        return found

    def _misspoke(self, vm: Vm, error: BadRequest) -> None:
        """A clone's last request that cannot be read is its end all the same: nobody would wait for an answer to it."""
        found = self._members.get(vm)
        if found is not None and error.op in ("exit", "abort") and found[1].leaving is None:
            self._sample(*found)
            self._lost(*found, f"it wanted to end, but not in a way that can be understood: {error}")
            vm.kill()

    def _inherited(self, vm: Vm, channel: int, fields: Mapping[str, Any]) -> bool:
        """Whether a request is of another program of the clone than the one that it was made for, which was cloned between two
        requests of its own: the ticket or the checkpoint that it names is of the VM that was cloned."""
        found = self._members.get(vm)
        if found is None or channel == found[1].channel:
            return False
        issued = found[0]
        number, checkpoint = fields.get("ticket"), fields.get("checkpoint")
        foreign = isinstance(number, int) and number < issued.number and not self._owns(vm, number)
        if isinstance(checkpoint, int) and checkpoint <= issued.checkpoints:
            return foreign or not self._saved.has(vm, checkpoint)
        return foreign

    def _owns(self, vm: Vm, number: int) -> bool:
        ticket = self._tickets.get(number)
        return ticket is not None and ticket.owner is vm

    def _find(self, vm: Vm, channel: int, message: dict[str, Any]) -> Ticket:
        ticket = self._tickets.get(message["ticket"])
        # Of another program in this VM, too: its region would wait for clones that nobody says are lost.
        if ticket is None or ticket.owner is not vm or ticket.channel != channel:
            raise StateError(f"there is no ticket {message['ticket']} here", hint="ask for one with request_ticket")
        return ticket

    async def _hello(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket, member = self._members.get(vm, (None, None))
        return {
            "role": "clone" if member else "parent",
            "rank": member.rank if member else 0,
            "n": ticket.granted if ticket else None,
            "default_n": self._settings.default_n,
            "address": address_of(vm.number),
            "job": self._settings.job,
            "labels": self._settings.labels,
            "seed": self._settings.seed,
            "answer_bytes": ANSWER_BYTES,
        }

    async def _ticket(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        n = message["n"]
        check_tickets(sum(1 for ticket in self._tickets.values() if ticket.owner is vm))
        running = sum(1 for _, member in self._members.values() if not member.gone)
        granted = self._capacity.grant(n, running=running, warm=len(self._pool))
        ticket = Ticket(self._next_ticket, vm, channel, granted)
        self._next_ticket += 1
        self._tickets[ticket.number] = ticket
        return {"ticket": ticket.number, "granted": granted}

    async def _exit(self, vm: Vm, channel: int, message: dict[str, Any]) -> None:
        ticket, member = self._member(vm)
        if member.leaving is not None:
            return  # it has said so before
        member.status = message["status"]
        member.leaving = time.monotonic()
        if message["answer"]:
            await ticket.owner.room()  # the answer waits here, not with the parent's other mail
            if member.discarded:
                return
        if ticket.report:
            _note_user_code(ticket.report, vm, message["ran_ns"])
            if message["answer"]:
                ticket.report.mark(vm.name, Phase.ANSWER)
        if message["answer"]:
            self._tell(ticket, {"event": "answer", "ticket": ticket.number, "rank": member.rank, "data": message["answer"]})
        elif not ticket.joining:
            # Nobody is told who only waits for the end. But a region would wait for the answer.
            self._tell_end(ticket, member, f"it ended by exit({member.status}) before it answered", "quit", member.status)
        if not member.gone:
            self._sample(ticket, member)
            vm.kill()

    async def _join(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket = self._find(vm, channel, message)
        ticket.require(TicketState.RUNNING, TicketState.ENDED)
        ticket.joining = True
        if not await ticket.join():
            raise StateError(f"ticket {ticket.number} is waited for by a later request", hint="wait for the answer to that one")
        self._finish(ticket)
        return {"status": ticket.statuses()}

    async def _kill(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket = self._find(vm, channel, message)
        if ticket.state is TicketState.GRANTED:
            ticket.give_up()
        ticket.discard(message["ranks"])
        if message["ranks"] is None:
            await ticket.wait_ended()
            self._finish(ticket)
        return {}

    async def _abort(self, vm: Vm, channel: int, message: dict[str, Any]) -> None:
        ticket, member = self._member(vm)
        if not member.aborted:  # once is enough
            member.aborted = True
            self._tell_end(ticket, member, message["cause"], "aborted", message["status"])

    async def _signal(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket, number, ranks = self._find(vm, channel, message), message["number"], message["ranks"]
        for member in ticket.members.values():
            if ranks is None or member.rank in ranks:
                member.vm.send(FrameType.SIGNAL, number.to_bytes(4, "little"))
        return {}

    async def _stats(self, vm: Vm, channel: int, message: dict[str, Any]) -> None:
        report = self._find(vm, channel, message).report
        if report and not any(report.of(Phase.LAST_ANSWER)):
            # The program tells it at once when it has the last answer; its clock is not ours, so only the difference counts.
            now = time.monotonic()
            first = now - message["last_s"] + message["first_s"]
            report.mark(vm.name, Phase.FIRST_ANSWER, max(report.started, first))
            report.mark(vm.name, Phase.LAST_ANSWER, now)

    # -- the fork --------------------------------------------------------------------------------------------------

    async def _clone(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any] | None:
        ticket = self._find(vm, channel, message)
        ticket.require(TicketState.GRANTED)
        ticket.state = TicketState.CLONING
        # sf.parallel says what it forks for and counts ranks from 0; the low-level calls say nothing and count from 1.
        ticket.label_base = 0 if message["context"] else 1
        ticket.world = self._settings.world and vm not in self._members
        now = asyncio.get_running_loop().time
        until = None if message["within_s"] is None else now() + message["within_s"]
        limit = asyncio.timeout_at(until)
        with contextlib.ExitStack() as stack:
            try:
                # Two programs of one VM may fork it one after the other. Other VMs go their own way meanwhile.
                async with limit, vm.save_lock:
                    self._require_asker(ticket)
                    stack.enter_context(self._pool.held())
                    saved, clones, report = await self._fork(vm, ticket, message, limit)
            except (SfError, OSError) as error:  # TimeoutError is an OSError
                ticket.give_up()
                if until is not None and now() >= until:
                    answer = {"error": "timeout", "message": f"there was not enough time to fork: {error}"}
                else:
                    answer = failure(error)
                if vm.state not in (VmState.FROZEN, VmState.FREEZING):
                    return answer
                vm.thaw(_thaw(channel, {"id": message["id"], **answer}))
                return None
            try:
                await self._launch(ticket, clones, saved, report)
            finally:
                saved.checkpoint.close()
                if vm.memory and vm not in self._members:
                    self._pool.follow(vm.memory)
        return None

    def _require_asker(self, ticket: Ticket) -> None:
        """Check, after any wait, that somebody still wants the clones: they would run on from a state in which nobody waits for
        them, and so run the parent's program a second time.

        Raises:
            StateError: the program that asked for them has hung up, or its VM is gone.
        """
        if self._tickets.get(ticket.number) is not ticket:
            raise StateError(f"the program that asked for the clones of ticket {ticket.number} has ended")
        ticket.require(TicketState.CLONING)

    def _new_report(self, n: int, vm: Vm) -> ForkReport:
        self._forks += 1
        return ForkReport(n, time.monotonic(), self._forks, vm.name)

    async def _take_shells(self, report: ForkReport) -> list[Vm]:
        shells = await self._pool.take(report.n)
        self._pool.aim(report.n)
        report.note(SUPERVISOR, Phase.SHELLS, report.started)
        return shells

    async def _fork(
        self, vm: Vm, ticket: Ticket, message: dict[str, Any], limit: asyncio.Timeout
    ) -> tuple[Saved, list[dict[str, Any]], ForkReport]:
        """Save the VM and thaw it with its answer; what is returned is for `_launch`."""
        ticket.report = report = self._new_report(ticket.granted, vm)
        shells = await self._take_shells(report)
        try:
            self._require_asker(ticket)
            checkpoint = await engine.save(vm, self._store, report, freeze_limit_s=_end_wait(limit))
            try:
                self._require_asker(ticket)
            except StateError:
                checkpoint.close()
                raise
        except BaseException:
            self._pool.give_back(shells)
            raise
        clones = self._start(ticket, shells, report, ticket.channel)
        vm.thaw(_thaw(ticket.channel, {"id": message["id"], "rank": 0, "role": "parent", "clones": clones}))
        return Saved(0, vm, ticket.channel, message["id"], checkpoint), clones, report

    def _start(self, ticket: Ticket, shells: list[Vm], report: ForkReport, channel: int) -> list[dict[str, Any]]:
        """From here on the shells are clones of the ticket, made for the program of a channel; returns what all of them are told
        about each."""
        members = [Member(rank, shell, address_of(shell.number), channel) for rank, shell in enumerate(shells, 1)]
        for member in members:
            report.note(member.vm.name, Phase.START, member.vm.started, member.vm.ready)
            report.mark(member.vm.name, Phase.TAKEN, rank=member.rank)
            self._adopt(ticket, member)
        ticket.checkpoints = self._saved.newest
        ticket.start(members)
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
        role = "clone" if self.rank_of(member.vm) is None else "rank"
        return _thaw(saved.channel, answer, identity(role, member.vm.number, self._settings.job, self._spec.mtu, [parent]))

    # -- checkpoints -----------------------------------------------------------------------------------------------

    async def _checkpoint(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any] | None:
        asker = (vm, channel)
        try:
            async with vm.save_lock:
                check_checkpoints(self._saved.count(vm))
                self._capacity.grant(1, running=0, warm=0)  # it takes memory as a clone does
                self._keeping.add(asker)
                report = self._new_report(0, vm)
                checkpoint = await engine.save(vm, self._store, report)
                if asker not in self._keeping:
                    checkpoint.close()
                    raise StateError("the program that asked for the checkpoint has ended")
        except (SfError, OSError) as error:
            if vm.state not in (VmState.FROZEN, VmState.FREEZING):
                raise
            vm.thaw(_thaw(channel, {"id": message["id"], **failure(error, "clone_failed")}))
            return None
        finally:
            self._keeping.discard(asker)
        saved = self._saved.add(vm, channel, message["id"], checkpoint)
        answer = {"id": message["id"], "rank": 0, "role": "parent", "clones": [], "checkpoint": saved.number, "batch": 0}
        vm.thaw(_thaw(channel, answer))
        self._on_report(report)
        return None

    async def _create(self, vm: Vm, channel: int, message: dict[str, Any]) -> None:
        """Clones of a checkpoint: as for a fork, but for the save; the VM that asks goes on meanwhile."""
        ticket = self._find(vm, channel, message)
        ticket.require(TicketState.GRANTED)
        saved = self._saved.find(vm, message["checkpoint"])
        ticket.state = TicketState.CLONING
        ticket.label_base = message["first"]
        try:
            async with saved.lock:
                self._require_asker(ticket)
                with self._pool.held():
                    await self._create_clones(vm, ticket, message)
        except (SfError, OSError):
            ticket.give_up()
            raise

    async def _create_clones(self, vm: Vm, ticket: Ticket, message: dict[str, Any]) -> None:
        ticket.report = report = self._new_report(ticket.granted, vm)
        shells = await self._take_shells(report)
        try:
            self._require_asker(ticket)
            # Looked up only now: it may have been closed while this waited.
            saved = self._saved.find(vm, message["checkpoint"])
        except StateError:
            self._pool.give_back(shells)
            raise
        saved.batches += 1
        clones = self._start(ticket, shells, report, saved.channel)
        vm.send(FrameType.REPLY, pack({"id": message["id"], "batch": saved.batches, "clones": clones}), ticket.channel)
        try:
            await self._launch(ticket, clones, saved, report)
        finally:
            saved.checkpoint.forget_plans()

    async def _drop(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        saved = self._saved.find(vm, message["checkpoint"])
        async with saved.lock:  # not while clones are being made from it
            self._saved.drop(saved)
        return {}

    def _adopt(self, ticket: Ticket, member: Member) -> None:
        label = f"[{member.rank - 1 + ticket.label_base}] " if self._settings.labels else ""
        self._members[member.vm] = (ticket, member)
        self._on_clone(member.vm, label)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _could_not_start(self, vm: Vm, cause: str) -> None:
        ticket, member = self._members.get(vm, (None, None))
        if ticket is None or member is None:
            return  # it is gone, and `vm_gone` has told
        if vm.state is VmState.GONE:
            self.vm_gone(vm, vm.cause)  # it was gone before it became a clone: nobody else will tell
        elif not member.discarded and member.lost is None:
            self._lost(ticket, member, cause)

    def clone_exited(self, vm: Vm, status: int, oom_kills: int) -> None:
        """The program in a clone ended without calling `exit`."""
        ticket, member = self._members[vm]
        if member.leaving is not None:
            return  # it has ended before
        if os.WIFEXITED(status):
            member.status = os.WEXITSTATUS(status)
            cause = f"its program ended with exit status {member.status} before it answered"
        else:
            cause = f"its program was killed by signal {os.WTERMSIG(status)}"
            if oom_kills:
                cause = f"the guest ran out of memory ({self._spec.memory_bytes >> 20} MiB) and its kernel killed the program"
        self._sample(ticket, member)
        if member.status is None or not member.discarded:
            self._lost(ticket, member, cause, "exited", os.waitstatus_to_exitcode(status))
        vm.kill()

    def vm_gone(self, vm: Vm, cause: str) -> None:
        """A VM has ended; everything that it owned ends with it."""
        self._store.release(vm)
        self._keeping = {asker for asker in self._keeping if asker[0] is not vm}
        self._saved.drop_all(vm)
        self._pool.discard(vm)
        for ticket in [ticket for ticket in self._tickets.values() if ticket.owner is vm]:
            ticket.discard()
            self._finish(ticket)
        if vm not in self._members:
            return
        ticket, member = self._members.pop(vm)
        member.gone = True
        if ticket.report:
            ticket.report.note(vm.name, Phase.EXIT, member.leaving or time.monotonic(), **member.measured)
        if member.status is None and member.lost is None and not member.discarded:
            self._lost(ticket, member, cause)
        ticket.check()
        self._conclude(ticket)

    def client_gone(self, vm: Vm, channel: int) -> None:
        """A program closed its connection: its clones have nobody left to answer to."""
        self._keeping.discard((vm, channel))
        for ticket in [t for t in self._tickets.values() if t.owner is vm and t.channel == channel]:
            ticket.discard()
            self._finish(ticket)
        own, member = self._members.get(vm, (None, None))
        if own and member and member.channel == channel and not own.world:
            # What else of the parent's programs goes on in this clone must not outlive the process that it was made for. If that
            # was the program itself, its exit status is about to come.
            vm.end_later("the process that the clone was made for has ended in it", _LAST_WORDS_S)

    def _finish(self, ticket: Ticket) -> None:
        """Its owner is done with the ticket, and has said by now when the answers came."""
        self._tickets.pop(ticket.number, None)
        self._conclude(ticket)

    def _conclude(self, ticket: Ticket) -> None:
        """Report the fork, once: when its owner is done with it and its clones are gone."""
        report = ticket.report
        if report and ticket.state is TicketState.ENDED and ticket.number not in self._tickets:
            ticket.report = None
            self._capacity.learn(report.anonymous_bytes)
            self._on_report(report)

    def _lost(self, ticket: Ticket, member: Member, cause: str, end: str = "died", status: int = 0) -> None:
        member.lost = cause = shortened(cause)
        log.info("%s (rank %d of ticket %d) is lost: %s", member.vm.name, member.rank, ticket.number, cause)
        self._tell_end(ticket, member, cause, end, status)

    def _tell_end(self, ticket: Ticket, member: Member, cause: str, end: str, status: int) -> None:
        """Tell the ticket's owner how a clone ended (hypervisor.End)."""
        self._tell(ticket, {"event": "lost", "ticket": ticket.number, "rank": member.rank, "cause": cause, "host": "",
                            "console": member.vm.console_tail(), "end": end, "status": status})  # fmt: skip

    @staticmethod
    def _tell(ticket: Ticket, event: dict[str, Any]) -> None:
        """Send an event to the ticket's owner. All that comes from a clone in it is of a bounded size: a packet holds 128 KiB."""
        if ticket.owner.state is not VmState.GONE:
            ticket.owner.send(FrameType.REPLY, pack(event), ticket.channel)

    def _sample(self, ticket: Ticket, member: Member) -> None:
        """Note the private memory of a clone that is about to go: of `MEASURED` per fork with `--stats`, else of one."""
        member.leaving = time.monotonic()
        measured = sum(1 for other in ticket.members.values() if other.measured)
        if measured < (MEASURED if self._settings.statistics else 1):
            memory = private_memory(member.vm.pid)
            member.measured = {"private_bytes": memory.total, "anonymous_bytes": memory.anonymous,
                               "host_cpu_s": cpu_seconds(member.vm.pid)}  # fmt: skip

    def rank_of(self, vm: Vm) -> int | None:
        """The rank of a clone that runs the whole program; None for other VMs."""
        ticket, member = self._members.get(vm, (None, None))
        return member.rank - 1 if ticket and member and ticket.world else None

    async def close(self) -> None:
        """End all clones and forget all requests and checkpoints."""
        for vm in list(self._members):
            vm.kill()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._saved.drop_all()


def _end_wait(limit: asyncio.Timeout) -> float:
    """From here on the wait may not be cut short, for a VM is being saved. Returns how long it may take to freeze."""
    until = limit.when()
    if until is None:
        return FREEZE_TIMEOUT_S
    limit.reschedule(None)
    return min(FREEZE_TIMEOUT_S, until - asyncio.get_running_loop().time())


def _note_user_code(report: ForkReport, vm: Vm, ran_ns: int) -> None:
    """From the first line of the user's function to now; the clone has measured how long that is on its own clock."""
    if vm.woken_at is not None and ran_ns > 0:
        report.note(vm.name, Phase.USER, max(vm.woken_at, time.monotonic() - ran_ns / 1e9))


def identity(role: str, number: int, job: str, mtu: int, neighbours: list[list[Any]]) -> dict[str, Any]:
    """The identity part of a THAW message; every value in it is unique to this VM."""
    return {
        "role": role,
        "time_ns": time.time_ns(),
        "entropy": os.urandom(64),
        "hostname": f"{job}-{number}" if number else job,
        "machine_id": uuid.uuid4().hex,
        "mac": mac_of(number),
        "address": address_of(number),
        "prefix": PREFIX_LENGTH,
        "mtu": mtu,
        "neighbours": neighbours,
    }


def _thaw(channel: int, answer: dict[str, Any], who: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"identity": who, "channel": channel, "reply": pack(answer), "mounts": []}


_CANCELLED = {"error": "cancelled", "message": "what it names is of the VM that this one was cloned from", "hint": None}
"""The runtime's answer to this is to wait for ever, as for requests that were pending when the VM was cloned (agent/clients.c):
an error would have the program go on in the clone, up to ending the processes that it has begun, the clone's own among them."""

_KINDS: tuple[tuple[type[SfError], str], ...] = (
    (CapacityError, "capacity"), (UsageError, "invalid"), (ProtocolError, "invalid"), (StateError, "state"),
)  # fmt: skip
"""What an error means to the program that asked; any other says that no clone could be made."""


def failure(error: SfError | OSError, kind: str = "") -> dict[str, Any]:
    """An error as a program's answer."""
    if isinstance(error, OSError):
        error = VMError(f"the host could not do it: {error}", hint="free memory, descriptors or disk space on the host")
    kind = kind or next((name for cls, name in _KINDS if isinstance(error, cls)), "clone_failed")
    extra = {"fits": error.fits} if hasattr(error, "fits") else {}
    if extra:
        kind = "capacity"
    return {"error": kind, "message": error.message, "hint": error.hint, **extra}
