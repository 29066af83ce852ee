"""Tickets: permission for clones, and what became of the clones made with it."""

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
        checkpoints: the number of the newest checkpoint of the job when the clones were made.
    """

    number: int
    owner: Vm
    channel: int
    granted: int
    label_base: int = 1
    world: bool = False
    joining: bool = False
    checkpoints: int = 0
    state: TicketState = TicketState.GRANTED
    members: dict[int, Member] = field(default_factory=dict)
    report: ForkReport | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _joiner: asyncio.Future[bool] | None = None

    def require(self, *states: TicketState) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"ticket {self.number} is {self.state.value}; this needs it {wanted}")

    def start(self, members: list[Member]) -> None:
        """The clones exist from here on."""
        self.require(TicketState.CLONING)
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
        """End clones now; their death is no loss."""
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
