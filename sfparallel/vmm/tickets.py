"""Tickets: permission for clones, what became of the clones made with it, and which there are in a job."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Collection
from dataclasses import dataclass, field

from sfparallel.errors import StateError
from sfparallel.vmm.record import ForkReport
from sfparallel.vmm.vm import Vm


class TicketState(enum.Enum):
    """Life of a ticket."""

    GRANTED = "granted"
    CLONING = "cloning"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Member:
    """One clone of a ticket.

    Attributes:
        rank: 1..m.
        channel: in the clone, of the program that it was made for.
        status: what it passed to `exit`, or None while it runs or when it was lost.
        lost: why it died before it called `exit`.
        leaving: when it was about to end, on the monotonic clock; None when that was not seen.
        aborted: it has asked for the end of the whole job.
        measured: what it needed, taken when it was about to end.
    """

    rank: int
    vm: Vm
    address: str
    channel: int
    status: int | None = None
    lost: str | None = None
    gone: bool = False
    discarded: bool = False
    aborted: bool = False
    leaving: float | None = None
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Ticket:
    """Permission for `granted` clones, given to one program (a channel of a VM's agent).

    Attributes:
        label_base: with what number the labels of their output begin.
        world: they run the whole program, as ranks.
        joining: its owner waits for nothing but their end.
        unwanted: its owner wants none of them any more.
        before: the newest number of a ticket or checkpoint of the job when the clones were made.
    """

    number: int
    owner: Vm
    channel: int
    granted: int
    label_base: int = 1
    world: bool = False
    joining: bool = False
    before: int = 0
    state: TicketState = TicketState.GRANTED
    members: dict[int, Member] = field(default_factory=dict)
    report: ForkReport | None = None
    unwanted: bool = False
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _joiner: asyncio.Future[bool] | None = None

    def require(self, *states: TicketState) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"ticket {self.number} is {self.state.value}; this call requires {wanted}")

    def require_wanted(self) -> None:
        """Check that its clones may begin.

        Raises:
            StateError: they exist, or its owner does not want them any more.
        """
        self.require(TicketState.CLONING)
        if self.unwanted:
            raise StateError(f"the clones of ticket {self.number} are no longer wanted")

    def start(self, members: list[Member]) -> None:
        """The clones exist from here on."""
        self.require_wanted()
        self.members = {member.rank: member for member in members}
        self.state = TicketState.RUNNING
        self.check()

    def check(self) -> None:
        """End the ticket when its last clone is gone."""
        if self.state is TicketState.RUNNING and all(member.gone for member in self.members.values()):
            self._end()

    def give_up(self) -> None:
        """Cloning failed: there are no clones."""
        self._end()

    def _end(self) -> None:
        self.state = TicketState.ENDED
        self._ended.set()
        if self._joiner and not self._joiner.done():
            self._joiner.set_result(True)

    def discard(self, ranks: Collection[int] | None = None) -> None:
        """End clones now, and let none begin any more if it is all; their death is no loss."""
        self.unwanted |= ranks is None
        for member in self.members.values():
            if ranks is None or member.rank in ranks:
                member.discarded = True
                member.vm.kill()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    async def join(self) -> bool:
        """Wait for the end; False as soon as somebody else does: who asks again and again, each time not for long, is one."""
        if self._ended.is_set():
            return True
        if self._joiner and not self._joiner.done():
            self._joiner.set_result(False)
        self._joiner = asyncio.get_running_loop().create_future()
        return await self._joiner

    def statuses(self) -> dict[int, int | None]:
        """Exit status by rank; None for a clone that was lost or discarded."""
        return {rank: member.status for rank, member in self.members.items()}


class Tickets:
    """The tickets of a job's programs, and the clones made with them. Tickets and checkpoints are numbered together."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._clones: dict[Vm, tuple[Ticket, Member]] = {}
        self._newest = 0

    def new_number(self) -> int:
        """For a ticket or a checkpoint: 1, 2, ..."""
        self._newest += 1
        return self._newest

    def issue(self, owner: Vm, channel: int, granted: int) -> Ticket:
        """A new ticket for a program."""
        ticket = Ticket(self.new_number(), owner, channel, granted)
        self._tickets[ticket.number] = ticket
        return ticket

    def find(self, owner: Vm, channel: int, number: int) -> Ticket:
        """A program's ticket.

        Raises:
            StateError: it has none of that number. Another program in its VM may: a region of the first one would wait for clones
                that nobody says are lost.
        """
        ticket = self._tickets.get(number)
        if ticket is None or ticket.owner is not owner or ticket.channel != channel:
            raise StateError(f"there is no ticket {number} here", hint="request one with request_ticket")
        return ticket

    def inherited(self, vm: Vm, channel: int, *numbers: int | None) -> bool:
        """Whether one of these numbers, of tickets or checkpoints, is of the VM that this one was cloned from, and is named by
        another program than the one that the clone was made for: it was between two requests when the VM was cloned."""
        found = self._clones.get(vm)
        return found is not None and channel != found[1].channel and any(n is not None and n <= found[0].before for n in numbers)

    def of(self, owner: Vm, channel: int | None = None) -> list[Ticket]:
        """Those of a VM, or of one program in it."""
        return [ticket for ticket in self._tickets.values() if ticket.owner is owner and channel in (None, ticket.channel)]

    def is_open(self, ticket: Ticket) -> bool:
        """Whether its owner is not done with it yet."""
        return self._tickets.get(ticket.number) is ticket

    def close(self, ticket: Ticket) -> None:
        """Its owner is done with it."""
        self._tickets.pop(ticket.number, None)

    def start(self, ticket: Ticket, members: list[Member]) -> None:
        """The ticket's clones exist from here on."""
        ticket.before = self._newest
        ticket.start(members)
        for member in members:
            self._clones[member.vm] = (ticket, member)

    def clone(self, vm: Vm) -> tuple[Ticket, Member] | None:
        """What a VM is a clone of; None for the parent, and for VMs that are gone."""
        return self._clones.get(vm)

    def is_clone(self, vm: Vm) -> bool:
        return vm in self._clones

    def clones(self) -> list[Vm]:
        return list(self._clones)

    def running(self) -> int:
        """How many clones there are."""
        return sum(1 for _, member in self._clones.values() if not member.gone)

    def rank_of(self, vm: Vm) -> int | None:
        """The rank of a clone that runs the whole program; None for other VMs."""
        ticket, member = self._clones.get(vm, (None, None))
        return member.rank - 1 if ticket and member and ticket.world else None

    def forget(self, vm: Vm) -> tuple[Ticket, Member] | None:
        """A VM is gone; returns what it was a clone of."""
        return self._clones.pop(vm, None)
