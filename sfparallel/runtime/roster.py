"""The clones of a crew: made from one checkpoint, at once or whenever one is missing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sfparallel.errors import CapacityError, CloneLost, SfError
from sfparallel.runtime.checkpoints import Checkpointing
from sfparallel.runtime.hypervisor import Answer, Hypervisor, Lost
from sfparallel.runtime.link import Kind, ParentLink
from sfparallel.runtime.region import JOIN_LIMIT_S

TRY_AGAIN_S = 5.0
"""Clones that did not fit on the host may fit so much later."""


@dataclass(eq=False)
class Member:
    """One clone.

    Attributes:
        place: 0..n-1; what people know it by. A clone that replaces another one has the same.
        number: what the link knows it by; each clone has its own.
        ticket, rank: what the supervisor knows it by.
        hand: what the schedule knows it by, once it has asked for work.
        doomed: it is lost, but answers of it may still be on their way.
        failure: why it ends, as it has said itself.
    """

    place: int
    number: int
    ticket: int
    rank: int
    host: str
    hand: int | None = None
    doomed: bool = False
    failure: BaseException | None = None

    def __str__(self) -> str:
        return f"rank {self.place} (host {self.host})" if self.host else f"rank {self.place}"

    def lost(self, event: Lost, message: str) -> CloneLost:
        """The error for its loss."""
        return CloneLost(message, rank=self.place, cause=event.cause, host=event.host, console=event.console)


def number_of(batch: int, rank: int) -> int:
    """What a clone is called on the link: it can tell by itself."""
    return batch << 16 | rank


class Roster:
    """All clones of a crew. Used by one thread at a time.

    Args:
        line: to the supervisor.
        keeper: the same line, for checkpoints.
        link: to the clones.
        checkpoint: from which they are made.
        size: how many there shall be.

    Attributes:
        members: by number on the link.
        by_hand: those that have asked for work, by what the schedule calls them.
        next_try: when clones that did not fit may be asked for again (monotonic clock).
    """

    def __init__(self, line: Hypervisor, keeper: Checkpointing, link: ParentLink, checkpoint: int, size: int) -> None:
        self.members: dict[int, Member] = {}
        self.by_hand: dict[int, Member] = {}
        self._line = line
        self._keeper = keeper
        self._link = link
        self._checkpoint = checkpoint
        self._size = size
        self.next_try = 0.0
        self._tickets: dict[int, set[Member]] = {}
        """Open tickets, with those of their clones that are still there."""

    def __len__(self) -> int:
        return len(self.members)

    def make(self, places: Iterable[int], *, everyone: bool, within_s: float | None = None) -> int:
        """Make clones for these places, or (without `everyone`) for as many of them as fit.

        Args:
            within_s: the time after which there shall be none any more.

        Returns:
            how many.

        Raises:
            CapacityError: too few fit.
            RegionTimeout: they were not made in time, and will not be.
        """
        wanted = list(places)
        grant = self._line.request_ticket(len(wanted))
        if grant.granted < len(wanted) and (everyone or not grant.granted):
            self._line.kill(grant.number, None)
            raise CapacityError(f"{len(wanted)} clones do not fit on this host now; {grant.granted} would", fits=grant.granted,
                                hint="use a smaller n, or give each VM less memory (sfrun --memory)")
        # From here on: when the request fails, the supervisor has closed the ticket.
        batch = self._keeper.create(grant.number, self._checkpoint, wanted[0], within_s)
        members = [Member(place, number_of(batch.number, clone.rank), grant.number, clone.rank, clone.host)
                   for place, clone in zip(wanted, batch.clones, strict=False)]
        for member, clone in zip(members, batch.clones, strict=True):
            self.members[member.number] = member
            self._link.admit(member.number, clone.address)
        self._tickets[grant.number] = set(members)
        return len(members)

    def complete(self, most: int) -> bool:
        """Make up to `most` of the clones that are missing, if they fit.

        Returns:
            whether the supervisor was asked.

        Raises:
            SfError: why there is not a single one.
        """
        taken = {member.place for member in self.members.values()}
        free = [place for place in range(self._size) if place not in taken][:most]
        if not free or (self.members and time.monotonic() < self.next_try):
            return False
        # Labels of one request's clones follow each other.
        run = list(itertools.takewhile(lambda place: place - free[0] == free.index(place), free))
        try:
            self.make(run, everyone=False)
        except SfError:
            self.next_try = time.monotonic() + TRY_AGAIN_S
            if not self.members:
                raise
        return True

    def find(self, event: Lost | Answer) -> Member | None:
        """The clone that an event is about; None if it is not one of these."""
        members = self._tickets.get(event.ticket, set())
        return next((each for each in members if each.rank == event.rank), None)

    def gone(self, event: Lost) -> Member | None:
        """Strike a clone off that was lost; None if it is not one of these."""
        member = self.find(event)
        if member is None:
            return None
        members = self._tickets[event.ticket]
        members.discard(member)
        self._strike(member)
        if not members:
            self._line.kill(event.ticket, None)
            del self._tickets[event.ticket]
        return member

    def release(self) -> None:
        """Let all go, none of which has anything to do, and wait until they are gone; all they printed has been shown then."""
        for member in self.members.values():
            if not self._link.send(member.number, Kind.RELEASE):
                # It has not been heard yet, so it cannot be told.
                self._line.kill(member.ticket, [member.rank])
        for ticket in self._tickets:
            if self._line.join(ticket, JOIN_LIMIT_S) is None:
                self._line.kill(ticket, None)
        self._strike_all()

    def kill(self) -> None:
        """End all, whatever they are doing."""
        for ticket in self._tickets:
            self._line.kill(ticket, None)
        self._strike_all()

    def report(self, first_s: float, last_s: float) -> None:
        """Tell the supervisor when the first and the last answer came (`sfrun --stats`)."""
        for ticket in itertools.islice(self._tickets, 1):
            self._line.report(ticket, first_s, last_s)

    def _strike(self, member: Member) -> None:
        del self.members[member.number]
        if member.hand is not None:
            del self.by_hand[member.hand]
        self._link.forget(member.number)

    def _strike_all(self) -> None:
        self._tickets.clear()
        for member in list(self.members.values()):
            self._strike(member)
