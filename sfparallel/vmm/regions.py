"""What programs in the VMs ask the supervisor for: tickets, clones, their end. One object per job.

Every request is a msgpack map with "op" and "id" (see ARCHITECTURE.md, "The agent port"), read and checked by `requests.decode`;
each handler here answers one op.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sfparallel.errors import SfError, StateError
from sfparallel.net.addresses import address_of
from sfparallel.vmm.capacity import Capacity
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.forks import Forks
from sfparallel.vmm.machine import MachineSpec
from sfparallel.vmm.pool import Pool
from sfparallel.vmm.processes import cpu_seconds, private_memory
from sfparallel.vmm.quotas import Pending, check_tickets, too_many_requests
from sfparallel.vmm.record import ForkReport, Phase
from sfparallel.vmm.replies import CANCELLED, RegionSettings, failure
from sfparallel.vmm.requests import ANSWER_BYTES, REQUESTS, BadRequest, Caller, decode, shortened
from sfparallel.vmm.tickets import Member, Ticket, Tickets, TicketState
from sfparallel.vmm.vm import Vm, VmState
from sfparallel.wire import FrameType, pack

log = logging.getLogger("sfparallel")

MEASURED = 8
"""Clones of a fork whose memory is measured: the kernel looks at each of their pages for that, while others want to wake."""

_LAST_WORDS_S = 1.0

Handler = Callable[[Vm, int, dict[str, Any]], Awaitable[dict[str, Any] | None]]


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
        self._on_report = on_report
        self._tickets = Tickets()
        self._capacity = Capacity(spec)
        self._forks = Forks(settings, spec, pool, store, self._tickets, self._capacity, on_clone=on_clone, on_world=on_world,
                            on_report=on_report, could_not_start=self._could_not_start)  # fmt: skip
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = Pending()
        self._handlers: dict[str, Handler] = {
            "hello": self._hello, "ticket": self._ticket, "clone": self._forks.clone, "exit": self._exit,
            "checkpoint": self._forks.checkpoint, "create": self._forks.create, "drop": self._forks.drop,
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
            if self._tickets.inherited(vm, channel, request.fields.get("ticket"), request.fields.get("checkpoint")):
                answer: dict[str, Any] | None = CANCELLED
            else:
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
        found = self._tickets.clone(vm)
        if found is None:
            raise StateError("only a clone can send this request; this is the parent")
        return found

    def _misspoke(self, vm: Vm, error: BadRequest) -> None:
        """A clone's last request that cannot be read is its end all the same: nobody would wait for an answer to it."""
        found = self._tickets.clone(vm)
        if found is not None and error.op in ("exit", "abort") and found[1].leaving is None:
            self._sample(*found)
            self._lost(*found, f"its last request is malformed: {error}")
            vm.kill()

    async def _hello(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket, member = self._tickets.clone(vm) or (None, None)
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
        check_tickets(len(self._tickets.of(vm)))
        granted = self._capacity.grant(n, running=self._tickets.running(), warm=len(self._pool))
        ticket = self._tickets.issue(vm, channel, granted)
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
            self._tell_end(ticket, member, f"it called exit({member.status}) before it answered", "quit", member.status)
        if not member.gone:
            self._sample(ticket, member)
            vm.kill()

    async def _join(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket = self._tickets.find(vm, channel, message["ticket"])
        ticket.require(TicketState.RUNNING, TicketState.ENDED)
        ticket.joining = True
        if not await ticket.join():
            raise StateError(f"a later request waits for ticket {ticket.number}", hint="wait for the answer to that one")
        self._finish(ticket)
        return {"status": ticket.statuses()}

    async def _kill(self, vm: Vm, channel: int, message: dict[str, Any]) -> dict[str, Any]:
        ticket = self._tickets.find(vm, channel, message["ticket"])
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
        ticket, number, ranks = self._tickets.find(vm, channel, message["ticket"]), message["number"], message["ranks"]
        for member in ticket.members.values():
            if ranks is None or member.rank in ranks:
                member.vm.send(FrameType.SIGNAL, number.to_bytes(4, "little"))
        return {}

    async def _stats(self, vm: Vm, channel: int, message: dict[str, Any]) -> None:
        report = self._tickets.find(vm, channel, message["ticket"]).report
        if report and not any(report.of(Phase.LAST_ANSWER)):
            # The program tells it at once when it has the last answer; its clock is not ours, so only the difference counts.
            now = time.monotonic()
            first = now - message["last_s"] + message["first_s"]
            report.mark(vm.name, Phase.FIRST_ANSWER, max(report.started, first))
            report.mark(vm.name, Phase.LAST_ANSWER, now)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _could_not_start(self, vm: Vm, cause: str) -> None:
        ticket, member = self._tickets.clone(vm) or (None, None)
        if ticket is None or member is None:
            return  # it is gone, and `vm_gone` has told
        if vm.state is VmState.GONE:
            self.vm_gone(vm, vm.cause)  # it was gone before it became a clone: nobody else will tell
        elif not member.discarded and member.lost is None:
            self._lost(ticket, member, cause)

    def clone_exited(self, vm: Vm, status: int, oom_kills: int) -> None:
        """The program in a clone ended without calling `exit`."""
        ticket, member = self._member(vm)
        if member.leaving is not None:
            return  # it has ended before
        if os.WIFEXITED(status):
            member.status = os.WEXITSTATUS(status)
            cause = f"its program exited with status {member.status} before it answered"
        else:
            cause = f"its program was killed by signal {os.WTERMSIG(status)}"
            if oom_kills:
                cause = (f"the guest ran out of memory ({self._spec.memory_bytes >> 20} MiB) and its kernel killed the program; "
                         "give each VM more with --memory")  # fmt: skip
        self._sample(ticket, member)
        if member.status is None or not member.discarded:
            self._lost(ticket, member, cause, "exited", os.waitstatus_to_exitcode(status))
        vm.kill()

    def vm_gone(self, vm: Vm, cause: str) -> None:
        """A VM has ended; everything that it owned ends with it."""
        self._forks.vm_gone(vm)
        for ticket in self._tickets.of(vm):
            ticket.discard()
            self._finish(ticket)
        found = self._tickets.forget(vm)
        if found is None:
            return
        ticket, member = found
        member.gone = True
        if ticket.report:
            ticket.report.note(vm.name, Phase.EXIT, member.leaving or time.monotonic(), **member.measured)
        if member.status is None and member.lost is None and not member.discarded:
            self._lost(ticket, member, cause)
        ticket.check()
        self._conclude(ticket)

    def client_gone(self, vm: Vm, channel: int) -> None:
        """A program closed its connection: its clones have nobody left to answer to."""
        self._forks.client_gone(vm, channel)
        for ticket in self._tickets.of(vm, channel):
            ticket.discard()
            self._finish(ticket)
        own, member = self._tickets.clone(vm) or (None, None)
        if own and member and member.channel == channel and not own.world:
            # What else of the parent's programs goes on in this clone must not outlive the process that it was made for. If that
            # was the program itself, its exit status is about to come.
            vm.end_later("the process for which the clone was made has ended", _LAST_WORDS_S)

    def _finish(self, ticket: Ticket) -> None:
        """Its owner is done with the ticket, and has said by now when the answers came."""
        self._tickets.close(ticket)
        self._conclude(ticket)

    def _conclude(self, ticket: Ticket) -> None:
        """Report the fork, once: when its owner is done with it and its clones are gone."""
        report = ticket.report
        if report and ticket.state is TicketState.ENDED and not self._tickets.is_open(ticket):
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
        return self._tickets.rank_of(vm)

    async def close(self) -> None:
        """End all clones and forget all requests and checkpoints."""
        for vm in self._tickets.clones():
            vm.kill()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._forks.close()


def _note_user_code(report: ForkReport, vm: Vm, ran_ns: int) -> None:
    """From the first line of the user's function to now; the clone has measured how long that is on its own clock."""
    if vm.woken_at is not None and ran_ns > 0:
        report.note(vm.name, Phase.USER, max(vm.woken_at, time.monotonic() - ran_ns / 1e9))
