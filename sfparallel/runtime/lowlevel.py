"""The low level: SnowFlock's calls and meaning. The parent has rank 0, clones have ranks 1..m.

(H. A. Lagar-Cavilla et al., "SnowFlock: Rapid Virtual Machine Cloning for Cloud Computing", EuroSys 2009.)
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import time
from typing import NoReturn, TextIO

from sfparallel.errors import Closed, StateError, UsageError
from sfparallel.runtime import after_fork
from sfparallel.runtime.c_output import C_OUTPUT
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Fork, Hypervisor
from sfparallel.runtime.identity import Renewal


class TicketState(enum.Enum):
    """GRANTED -> CLONED -> CLOSED; a ticket may be closed without having been used."""

    GRANTED = "granted"
    CLONED = "cloned"
    CLOSED = "closed"


class Ticket:
    """Permission for `granted` clones, for one fork.

    Attributes:
        granted: number of clones that it permits, at most the number requested.
        state: granted, cloned or closed.
    """

    def __init__(self, hypervisor: Hypervisor, number: int, granted: int) -> None:
        self.hypervisor = hypervisor
        self.number = number
        self.granted = granted
        self.state = TicketState.GRANTED
        self.renewal: Renewal | None = None
        self._generation = HERE.generation

    def __repr__(self) -> str:
        return f"<Ticket {self.number}: {self.granted} clones, {self.state.value}>"

    def require(self, *states: TicketState) -> None:
        """Check that the ticket is this VM's own and in one of `states`.

        Raises:
            StateError: it is not.
            Closed: its clones were joined or killed already.
        """
        HERE.require_own(self._generation, f"ticket {self.number} belongs",
                         hint="end the clone with sf.exit(), or request a ticket in it")
        if self.state in states:
            return
        if self.state is TicketState.CLOSED:
            raise Closed(f"ticket {self.number} was used up: its clones are gone", hint="ask for a new one")
        required = " or ".join(state.value for state in states)
        raise StateError(f"ticket {self.number} is {self.state.value}; this call needs one that is {required}")

    def close(self) -> None:
        """The clones are gone: the line to the supervisor is free for the next ticket."""
        if self.state is not TicketState.CLOSED:
            self.state = TicketState.CLOSED
            HERE.give_back(self.hypervisor)


    def abandon(self) -> None:
        """Hang up instead: the supervisor discards the clones of a line that is closed."""
        self.state = TicketState.CLOSED
        self.hypervisor.close()


def check_count(name: str, value: object) -> int:
    """`value` as a number of clones or items, which is at least 1.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def request_ticket(n: int) -> Ticket:
    """Request permission to create up to n clones.

    Returns:
        a ticket for `ticket.granted` <= n clones.

    Raises:
        OutsideVMError: this is not a VM of sfparallel.
        CapacityError: not even one clone fits now.
    """
    check_count("n", n)
    hypervisor = HERE.take_hypervisor()
    grant = hypervisor.request_ticket(n)
    return Ticket(hypervisor, grant.number, grant.granted)


def prepare(hypervisor: Hypervisor, *, whole_program: bool = False) -> float:
    """In the parent, before its first fork: have in memory what clones will need.

    Args:
        whole_program: clones will run the program from its first line, and import themselves what it asks for: numpy looks at
            the environment when it is imported, which the program may change before.

    Returns:
        how many seconds that took, which is nothing that a fork takes.
    """
    if HERE.warm or not hypervisor.keeps_threads:  # in no VM, what clones import costs them little
        return 0.0
    begun = time.monotonic()
    HERE.warm = not whole_program
    # The program may have modules of its own with the names of others; whatever needs those tells about it.
    with contextlib.suppress(ImportError, AttributeError):
        from sfparallel.runtime.warm import warm_up
        warm_up(whole_program=whole_program)
    return time.monotonic() - begun


def fork(ticket: Ticket, context: str = "", within_s: float | None = None, *, whole_program: bool = False) -> Fork:
    """Fork, without renewing the Python-level identity in the clones: the caller does, before anything else.

    Args:
        ticket: a ticket that was not used yet.
        context: what the fork is for, for people who look at the running job.
        within_s: the time after which there shall be no fork any more.
        whole_program: see `prepare`.

    Raises:
        RegionTimeout: it was not made in time, and will not be.
    """
    ticket.require(TicketState.GRANTED)
    prepare(ticket.hypervisor, whole_program=whole_program)
    ticket.renewal = Renewal()
    with AtFork(ticket.hypervisor):
        # What is still buffered would otherwise be printed by the parent and by every clone.
        flush_output()
        number = HERE.about_to_fork()
        result = ticket.hypervisor.clone(ticket.number, ticket.granted, context.encode(), within_s)
        ticket.state = TicketState.CLONED
        if result.rank:
            HERE.became_clone(result, ticket.hypervisor, number)
    return result


class AtFork:
    """Around a fork of this VM: calls what modules have registered for forks. (`os.fork` does so by itself, and in clones
    `assume_identity`.)"""

    def __init__(self, line: Hypervisor) -> None:
        self._forks_vm = line.keeps_threads
        self._generation = 0

    def __enter__(self) -> None:
        if self._forks_vm:
            after_fork.before()
        self._generation = HERE.generation
        if HERE.is_ghost:  # it waited for a lock that another thread's fork has given back, and this is the clone
            after_fork.in_parent()
            HERE.park_if_ghost()

    def __exit__(self, *_: object) -> None:
        if self._forks_vm and HERE.generation == self._generation:
            after_fork.in_parent()


def clone(ticket: Ticket) -> int:
    """Fork this VM: the call returns in the parent and in `ticket.granted` clones of it, each in its own VM.

    Args:
        ticket: from `request_ticket`; valid for one fork.

    Returns:
        0 in the parent, 1..m in the clones.
    """
    with HERE.interrupts_deferred():
        result = fork(ticket)
        if result.rank:
            assume_identity(ticket.renewal, result.entropy, result.rank)
    return result.rank


def assume_identity(renewal: Renewal | None, entropy: bytes, rank: int, *, reads_terminal: bool = False) -> None:
    """In a clone: renew this process's identity as prepared before the fork, then call the hooks of `os.register_at_fork`, and
    those of `sf.on_clone` with `rank`.

    Args:
        reads_terminal: what is typed at the terminal is for this clone; for others standard input ends. (Where it is no terminal,
            the agent has closed it.)
    """
    assert renewal is not None, "made before every fork"
    if not reads_terminal and os.isatty(0):
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
    renewal.apply(entropy)
    if HERE.lifeline is not None and HERE.lifeline.keeps_threads:
        after_fork.in_clone()
    for hook in HERE.hooks:
        hook(rank)


def exit(status: int = 0) -> NoReturn:
    """End this clone; never returns. In a parallel region this is an error of the rank, like `sys.exit`.

    Args:
        status: 0..255, which `sf.join` reports for this rank.

    Raises:
        StateError: this is the parent.
    """
    if HERE.membership is not None:
        raise SystemExit(status)
    if HERE.lifeline is None:
        raise StateError("sf.exit() ends a clone; this is the parent", hint="the parent ends like any program: sys.exit()")
    flush_output()
    HERE.lifeline.exit(status)


def abort(status: int, cause: str) -> NoReturn:
    """End this clone without ado, and tell the parent that the whole job should end: a region then fails with CloneLost, a whole
    program (`sfrun --spmd`) with `status` as its exit code. In the parent: end the program. May be called from any thread.

    Args:
        status: 0..255.
        cause: for people; what this rank did.
    """
    with contextlib.suppress(OSError, ValueError):
        flush_output()
    if HERE.lifeline is not None:
        HERE.lifeline.abort(status, cause)
    os._exit(status)


def join(ticket: Ticket) -> dict[int, int | None]:
    """Wait until every clone of the ticket has called `sf.exit` or died.

    Returns:
        exit status by rank; None for a clone that was lost.
    """
    ticket.require(TicketState.CLONED)
    status = ticket.hypervisor.join(ticket.number, None)
    ticket.close()
    return status or {}


def kill(ticket: Ticket) -> None:
    """End all clones of the ticket at once; also releases a ticket that was not used."""
    ticket.require(TicketState.GRANTED, TicketState.CLONED)
    ticket.hypervisor.kill(ticket.number, None)
    ticket.close()


def flush_output() -> None:
    """Flush what Python and C buffer of standard output and error, in this order, which is that of an interpreter's exit.

    A program may have put streams of its own there, which need have nothing but `write`; they may have been closed, or have lost
    their reader. That is an error for who prints, and for nobody else.
    """
    for stream, original in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)):
        _flush(stream)
        if original is not stream:
            _flush(original)
    C_OUTPUT.flush()


def _flush(stream: TextIO | None) -> None:
    if stream is not None:
        try:  # noqa: SIM105 (clones come by here on their way: contextlib is more code that is new there)
            stream.flush()
        except Exception:
            pass
