"""The seam between parallel regions and whatever forks: what a region needs of the supervisor, and nothing else.

`connection.Connection` is the real thing, a client of the guest agent. Anything else that can fork the caller may stand in its
place; a fork made with `os.fork` differs in one respect, which is why it is part of the protocol: see `keeps_threads`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol


@dataclass(frozen=True, slots=True)
class Hello:
    """What the supervisor says about this VM and its job.

    Attributes:
        role: "parent" or "clone".
        address: this VM's address on the clone network.
        default_n: clones of a region that asks for no number (`sfrun -n`), None without one.
        seed: seed of the whole job, None without one.
        job: name of the job.
    """

    role: str
    address: str
    default_n: int | None = None
    seed: int | None = None
    job: str = ""
    answer_bytes: int = 0
    """Largest answer that a clone may hand over with its exit; 0 if none."""
    shares_files: bool = False
    """Whether what a clone writes is in the parent's files at once."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A ticket as the supervisor numbers it, for `granted` clones."""

    number: int
    granted: int


class Sibling(NamedTuple):  # rather than a dataclass: clones make n of these on the way to the user's function
    """One clone of a fork: low-level rank (1..m), address on the clone network, and the host that runs it."""

    rank: int
    address: str
    host: str


class Fork(NamedTuple):
    """How the call that forked returns, once in the parent (rank 0) and once in each clone (ranks 1..m).

    Attributes:
        rank: low-level rank of this VM.
        address: this VM's address, new in a clone.
        parent: the address of the VM that forked.
        clones: all clones, the same list in every VM.
        entropy: bytes that no other VM got; empty in the parent.
    """

    rank: int
    address: str
    parent: str
    clones: tuple[Sibling, ...]
    entropy: bytes = b""


class Moment(NamedTuple):
    """How the request for a checkpoint returns: once in the VM that made it, and once in each clone that is made from it.

    Attributes:
        number: of the checkpoint; 0 in a clone.
        batch: which call of `create_clones` made this clone, from 1; 0 in the VM that made the checkpoint.
        fork: as for a fork; rank 0 in the VM that made the checkpoint.
    """

    number: int
    batch: int
    fork: Fork


class Batch(NamedTuple):
    """Clones that were made from a checkpoint by one request.

    Attributes:
        number: as `Moment.batch` has it in them.
        clones: all of them.
    """

    number: int
    clones: tuple[Sibling, ...]


class End(enum.StrEnum):
    """How a clone ended without having handed over an answer."""

    DIED = "died"
    """Its machine is gone."""
    EXITED = "exited"
    """Its program ended, by itself or by a signal."""
    QUIT = "quit"
    """It called exit, without an answer (told only to who does not `join` at that time). An answer may have gone another way."""
    ABORTED = "aborted"
    """It wants the whole job to end (`Hypervisor.abort`), and may not have ended yet."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A clone ended without having handed over an answer; `rank` is its low-level rank.

    Attributes:
        status: of its program, as `os.waitstatus_to_exitcode` has it (0 for DIED); for QUIT, what it passed to exit; for ABORTED,
            what the job shall end with.
    """

    ticket: int
    rank: int
    cause: str
    host: str = ""
    console: str = ""
    end: End = End.DIED
    status: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A clone handed over its answer and ended; `rank` is its low-level rank, as the supervisor knows it."""

    ticket: int
    rank: int
    data: bytes


class Hypervisor(Protocol):
    """One line to whatever forks this VM. Used by one thread at a time."""

    @property
    def keeps_threads(self) -> bool:
        """Whether a clone goes on with all threads of the parent (a VM's does; after `os.fork` only the calling thread is left,
        and with it no ZeroMQ context that existed before)."""

    def hello(self) -> Hello:
        """Ask who this VM is."""

    def request_ticket(self, n: int) -> Grant:
        """Reserve room for up to n clones."""

    def clone(self, ticket: int, clones: int, context: bytes, within_s: float | None = None) -> Fork:
        """Fork; returns in the parent and in every clone.

        Args:
            within_s: the time after which there shall be no fork any more.

        Raises:
            RegionTimeout: it was not made in time, and will not be.
        """

    def exit(self, status: int, answer: bytes = b"", *, ran_ns: int = 0) -> NoReturn:
        """End this clone, with an answer for the parent if there is one (of at most `Hello.answer_bytes`).

        `ran_ns` is how long ago the user's code began, for `sfrun --trace`; 0 if that is not known.
        """

    def abort(self, status: int, cause: str) -> None:
        """Tell the parent that its whole job should end, and why; returns at once. May be called from any thread of a clone."""

    def signal(self, ticket: int, ranks: list[int] | None, number: int) -> None:
        """Send a signal to the programs of clones (all without `ranks`)."""

    def join(self, ticket: int, timeout_s: float | None) -> dict[int, int | None] | None:
        """Wait until all clones of the ticket are gone: exit status by low-level rank (None for a clone that was lost), or None
        when time ran out."""

    def kill(self, ticket: int, ranks: list[int] | None) -> None:
        """End clones (all without `ranks`) and wait until they are gone."""

    def report(self, ticket: int, first_s: float, last_s: float) -> None:
        """Tell when the first and the last answer arrived, in seconds since the fork was asked for (`sfrun --stats`)."""

    def fileno(self) -> int:
        """A descriptor that is readable when `events` may have something new."""

    def events(self) -> list[Lost | Answer]:
        """What has become of clones since the last call, in that order; never blocks."""

    def close(self) -> None:
        """Hang up; clones of open tickets are discarded."""
