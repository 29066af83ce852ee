"""Checkpoints at the low level: clones that begin in the past of this VM.

(SnowFlock's `sf_checkpoint_parent` and `sf_create_clones`: H. A. Lagar-Cavilla et al., "SnowFlock: Rapid Virtual Machine Cloning
for Cloud Computing", EuroSys 2009, table 1.)
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from sfparallel.errors import Closed, SfError, StateError, UsageError
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Batch, Hypervisor, Moment
from sfparallel.runtime.identity import Renewal
from sfparallel.runtime.lowlevel import AtFork, Ticket, TicketState, assume_identity, flush_output, prepare


@runtime_checkable
class Checkpointing(Protocol):
    """What a line to the supervisor can do beyond `Hypervisor`, if VMs are forked and not processes."""

    def checkpoint(self, within_s: float | None = None) -> Moment:
        """Keep the state of this VM; returns again in every clone made from it.

        Args:
            within_s: the time after which it shall not be kept any more.

        Raises:
            RegionTimeout: it was not kept in time, and will not be.
        """

    def create(self, ticket: int, checkpoint: int, first: int = 1, within_s: float | None = None) -> Batch:
        """Make clones from a checkpoint; what they print is labelled with `first` and the numbers after it. The rest as above."""

    def drop(self, checkpoint: int) -> None:
        """Forget a checkpoint."""


class Checkpoint:
    """One immutable state of this VM, from which clones can be created at any later time; `close` it to free its memory.

    Attributes:
        rank: 0 in the VM that created the checkpoint; 1..m in a clone of it.
    """

    def __init__(self, number: int, rank: int) -> None:
        self.rank = rank
        self._number = number
        self._closed = False
        self._generation = HERE.generation

    def __repr__(self) -> str:
        return f"<Checkpoint {self._number}{' (closed)' if self._closed else ''}, rank {self.rank}>"

    def number(self) -> int:
        """The supervisor's number for it.

        Raises:
            StateError: it belongs to another VM: this is a clone.
            Closed: it was closed.
        """
        hint = "create one in the clone with checkpoint_parent()"
        HERE.require_own(self._generation, "this checkpoint belongs", hint)
        if self.rank:
            raise StateError("this checkpoint belongs to the parent; this is a clone", hint=hint)
        if self._closed:
            raise Closed("this checkpoint was closed", hint="make a new one with checkpoint_parent()")
        return self._number

    def close(self) -> None:
        """Free the checkpoint; existing clones of it continue. Does nothing in a clone."""
        if self._closed or self.rank or self._generation != HERE.generation:
            return
        line = HERE.take_hypervisor()
        require_checkpoints(line).drop(self._number)
        self._closed = True
        HERE.give_back(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_checkpoints(line: object) -> Checkpointing:
    if not isinstance(line, Checkpointing):
        raise UsageError("checkpoints are states of virtual machines; this program does not run in one")
    return line


def checkpoint_parent() -> Checkpoint:
    """Save this VM's current state: memory, processes, open files. This VM continues.

    The call returns again in every clone that `create_clones` later creates from the checkpoint: a clone starts here, and `rank`
    tells it apart.

    Returns:
        the checkpoint; its `rank` is 0 in this VM, and 1..m in the clones.

    Raises:
        OutsideVMError: this is not a VM of sfparallel.
        VMError: the state could not be saved; the VM continues.
    """
    with HERE.interrupts_deferred():
        moment, line, renewal = keep_state()
        rank = moment.fork.rank
        if not rank:
            HERE.give_back(line)
        else:
            assume_identity(renewal, moment.fork.entropy, rank)
        return Checkpoint(moment.number, rank)


def keep_state(within_s: float | None = None) -> tuple[Moment, Hypervisor, Renewal]:
    """Make a checkpoint, without renewing the Python-level identity in its clones: the caller does, before anything else.

    Args:
        within_s: see `Checkpointing`.

    Returns:
        how the call returned, the line by which it did, and what will renew the identity.
    """
    line = HERE.take_hypervisor()
    prepare(line)
    renewal = Renewal()
    with AtFork(line):
        # What is still buffered would otherwise be printed by this VM and by every clone.
        flush_output()
        number = HERE.about_to_fork()
        try:
            moment = require_checkpoints(line).checkpoint(within_s)
        except SfError:
            HERE.give_back(line)
            raise
        if moment.fork.rank:
            HERE.became_clone(moment.fork, line, number, moment.batch)
    return moment, line, renewal


def create_clones(checkpoint: Checkpoint, ticket: Ticket) -> None:
    """Create `ticket.granted` clones of an earlier state of this VM: in them, `checkpoint_parent` returns, with ranks 1..m.

    May be called any number of times for one checkpoint, each time with a new ticket. This VM is not stopped for it.

    Args:
        checkpoint: from `checkpoint_parent`, called in this VM.
        ticket: from `request_ticket`; `join` and `kill` take it afterwards.

    Raises:
        StateError: the ticket was used, or ticket or checkpoint belong to another VM.
        Closed: the checkpoint was closed.
        VMError: the clones could not be started.
    """
    ticket.require(TicketState.GRANTED)
    number = checkpoint.number()
    require_checkpoints(ticket.hypervisor).create(ticket.number, number)
    ticket.state = TicketState.CLONED
