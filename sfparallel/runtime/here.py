"""Where this process is: outside, in the parent or in a clone, and in which region.

This is the runtime's one piece of global state, because it describes what is global: the VM around the process. It survives a
fork (the whole VM is cloned) and is corrected in the clone by `became_clone`. Nothing in it may be keyed on process ids or host
names: `os.getpid()` is the same in the parent and in all clones.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sfparallel.bootstrap import orders
from sfparallel.errors import OutsideVMError, StateError
from sfparallel.runtime import connection
from sfparallel.runtime.hypervisor import Fork, Hello, Hypervisor

if TYPE_CHECKING:
    import zmq

    from sfparallel.runtime.link import CloneLink
    from sfparallel.runtime.mpi.endpoint import Endpoint
    from sfparallel.runtime.rng import Streams

CloneHook = Callable[[int], object]


def connect() -> Hypervisor:
    """A new line to the supervisor.

    Raises:
        OutsideVMError: there is none.
    """
    if "control" not in orders:
        return connection.connect()
    from sfparallel.runtime import local
    return local.connect()


class Orphanable(Protocol):
    """Something that waits in a thread of the parent and must notice when it wakes up in a clone."""

    def wake(self) -> None:
        """Make the waiting thread look around."""


@dataclass
class Membership:
    """This clone's place in the region that it was made for.

    Attributes:
        rank: 0..size-1.
        addresses: of all ranks, in order.
        port: where each rank listens for messages of the others.
        link: the line to the parent.
        streams: the region's random streams.
        key: what this rank works on now: its rank, or the index of an item of a map.
        endpoint: where this rank sends and receives, once it has asked for that.
    """

    rank: int
    addresses: list[str]
    port: int
    link: CloneLink
    streams: Streams
    key: int
    endpoint: Endpoint | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.addresses)

    @property
    def is_open(self) -> bool:
        """Whether this rank has had to do with others."""
        return self.endpoint is not None and self.endpoint.is_open

    def leave(self) -> None:
        """This rank will not send to others any more: get everything on its way."""
        if self.endpoint is not None:
            self.endpoint.finish()


class Here:
    """State of the runtime in this process."""

    forgetful: ClassVar[list[Callable[[], None]]] = []
    """Called in a clone, before anything else can ask who this process is."""

    def __init__(self) -> None:
        self.connect = connect
        self.generation = 0
        """How often this process was cloned: code that must not go on in a clone compares it before and after."""
        self.rank = 0
        """Low-level rank; 0 in the parent."""
        self.membership: Membership | None = None
        self.lifeline: Hypervisor | None = None
        """In a clone, the line by which it was made and by which it ends."""
        self.forked = False
        """Whether this is a process that one of the program's has made with `os.fork`, and no clone."""
        self.hooks: list[CloneHook] = []
        self._forks = itertools.count(1)
        """Numbers of the forks that this VM makes."""
        self.warm = False
        """Whether all that clones need is in memory."""
        self.seed_path: tuple[int, ...] = ()
        """This VM's place in the tree of forks, by which streams of random numbers branch off the job's seed."""
        self.fork_path: tuple[int, ...] = ()
        """Place in that tree of the fork that made this clone: its clones' streams branch off there."""
        self.own_streams: Streams | None = None
        self.alone: Endpoint | None = None
        """Where this process sends to itself, when it belongs to no region."""
        self.first_use = threading.Lock()
        """Held while a thread makes what all threads of this process use."""
        self._waiting: list[Orphanable] = []
        self._parents_threads: tuple[threading.Thread, ...] = ()
        self._idle: list[Hypervisor] = []
        self._hello: Hello | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._ghosts: list[object] = []

    def take_hypervisor(self) -> Hypervisor:
        """An idle line to the supervisor, or a new one; give it back when its clones are gone.

        Raises:
            OutsideVMError: this process does not run in a VM of sfparallel.
        """
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return self.connect()

    def give_back(self, hypervisor: Hypervisor) -> None:
        self._idle.append(hypervisor)

    def hello(self, hypervisor: Hypervisor) -> Hello:
        """What the supervisor says about this VM; asked once."""
        if self._hello is None:
            self._hello = hypervisor.hello()
        return self._hello

    def require_vm(self) -> Hello:
        """Check that this is a VM of sfparallel.

        Raises:
            OutsideVMError: it is not.
        """
        if self._hello is None:
            hypervisor = self.take_hypervisor()
            self.hello(hypervisor)
            self.give_back(hypervisor)
        assert self._hello is not None
        return self._hello

    def zmq_context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """The ZeroMQ context of all regions of this process; its I/O thread goes on in clones of the VM."""
        if self._context is None:
            import zmq
            self._context = zmq.Context()
        return self._context

    @contextlib.contextmanager
    def wakes(self, orphan: Orphanable) -> Iterator[None]:
        """While this is open, `orphan` is woken in clones that other threads make."""
        self._waiting.append(orphan)
        try:
            yield
        finally:
            self._waiting.remove(orphan)

    def about_to_fork(self) -> int:
        """The number of a fork of this VM, of which another thread may make one meanwhile."""
        return next(self._forks)

    def became_clone(self, fork: Fork, hypervisor: Hypervisor, number: int, batch: int = 0) -> None:
        """First thing in a clone: from here on this process is not the parent any more.

        `number` is that of the fork; `batch` tells clones of one checkpoint apart that were made at different times and have the
        same rank.
        """
        # All of now: while a fork waits for QEMU, the program goes on in the parent, and begins others. They must be known for
        # what they are before the generation tells them where they are: they go on while this one comes back from its request.
        own = threading.current_thread()
        others = threading.enumerate() if hypervisor.keeps_threads else ()
        self._parents_threads = tuple(each for each in others if each is not own)
        self.generation += 1
        self.forked = False
        self.rank = fork.rank
        self.fork_path = (*self.seed_path, number)
        self.seed_path = (*self.fork_path, *([batch] if batch else []), fork.rank)
        self._forks = itertools.count(1)
        self.own_streams = None
        self.membership = None
        self.alone = None
        self.first_use = threading.Lock()  # the old one may be held by a thread that does not exist on this side
        for forget in self.forgetful:
            forget()
        self.lifeline = hypervisor
        self._hello = None
        for stream in (sys.stdout, sys.stderr):
            if getattr(stream, "write_through", False):  # PYTHONUNBUFFERED: print() would write in pieces, and those of ranks mix
                stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
        if not hypervisor.keeps_threads:
            return  # it was made with `os.fork`, and `became_child` has left the parent's lines behind
        # The parent's other lines stay open but unused: closing them would cost wake-ups on the way to the user's function.
        self._ghosts.append(self._idle)
        self._idle = []
        if self._parents_threads:
            for orphan in self._waiting:
                orphan.wake()

    def became_child(self) -> None:
        """First thing in a process that this one makes with `os.fork`, as `multiprocessing` does: it has no part in this one's
        lines, sockets and clones, and makes its own. (Two processes on one line would take each other's replies.)"""
        self.generation += 1
        self.forked = True
        self.first_use = threading.Lock()  # the old one may be held by a thread that does not exist on this side
        # Kept, not closed: what closes a ZeroMQ context waits for its I/O thread, which does not exist on this side.
        self._ghosts += [self._idle, self._context]
        self._idle, self._context, self._waiting = [], None, []

    def park_if_ghost(self) -> None:
        """Stop a thread that came along from the parent when it is about to start a region in a region's clone.

        Two threads of the parent may start regions at the same time. Each fork also clones the other thread, which would go on
        to fork the clones: n * n VMs that nobody asked for, and whose results nobody sees.
        """
        if self.is_ghost:
            connection.park()

    @property
    def is_ghost(self) -> bool:
        """Whether the calling thread came along from the parent into a region's clone."""
        return self.membership is not None and self.came_along

    @property
    def came_along(self) -> bool:
        """Whether this is a clone, and the calling thread is another one of the parent's than the one that forked."""
        return bool(self._parents_threads) and threading.current_thread() in self._parents_threads

    def require_own(self, generation: int, what: str, hint: str) -> None:
        """Check that something which was made in `generation` is this VM's own. If it is not, a thread that came along from the
        parent waits for ever, as processes do that came along: it has its answer in the parent, where it goes on, too.

        Raises:
            StateError: it is the parent's.
        """
        if generation != self.generation:
            if self.came_along:
                connection.park()
            raise StateError(f"{what} to the parent; this is a clone", hint=hint)

    @contextlib.contextmanager
    def interrupts_deferred(self) -> Iterator[None]:
        """Hold Ctrl-C back: while a fork is under way, so that a KeyboardInterrupt cannot strike between the fork and the moment
        at which the program knows which side it is on; or while a message of several frames is taken. It is raised at the end in
        the parent, and dropped in a clone, because it was meant for the parent. (A clone keeps the changed handler, which then
        does what the original does: to put that back would be one more thing on the way to the user's function.)
        """
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield  # Python delivers signals to the main thread only
            return
        generation = self.generation
        caught: list[tuple[int, FrameType | None]] = []

        def remember(number: int, frame: FrameType | None) -> Any:
            if self.generation != generation:
                return handler(number, frame)
            caught.append((number, frame))
            return None

        signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            if self.generation == generation:
                signal.signal(signal.SIGINT, handler)
                if caught:
                    handler(*caught[0])


HERE = Here()
os.register_at_fork(after_in_child=HERE.became_child)


def in_clone() -> bool:
    """Whether this process runs in a clone; False in the parent and outside any VM."""
    if HERE.rank:
        return True
    try:
        hypervisor = HERE.take_hypervisor()
    except OutsideVMError:
        return False
    # Asked anew every time: another process of this VM may have forked it since.
    role = hypervisor.hello().role
    HERE.give_back(hypervisor)
    return role == "clone"


def on_clone(hook: CloneHook) -> CloneHook:
    """Register a function to be called at the start of every clone, after it has its new identity; usable as a decorator.

    Args:
        hook: called with the clone's rank, in order of registration. An exception in it is an error of that rank.

    Returns:
        `hook` itself.
    """
    HERE.hooks.append(hook)
    return hook
