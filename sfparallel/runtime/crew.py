"""A crew: clones that take tasks as they come, one after the other, and are replaced when they are lost.

`sf.parallel_imap` and `sf.Executor` give it their tasks; what a region knows before its fork comes to a crew in messages. The
program's state is kept as a checkpoint, and clones are made from it, at once or whenever one is missing. So each of them begins
in the thread and in the memory of the call that made the crew, however long ago that was.

One thread of the parent, the steward, looks after the clones. Other threads hand it tasks, and wake it only if a clone waits for
one: an answer wakes it anyway.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import zmq

from sfparallel.errors import CloneLost, Closed, CollectConflict, ExecutorBroken, ResultNotPicklable, SfError, StateError
from sfparallel.runtime.checkpoints import keep_state, require_checkpoints
from sfparallel.runtime.clone_messages import BadMessage, Kind, Message
from sfparallel.runtime.collect import unwanted
from sfparallel.runtime.connection import park
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Answer, Lost
from sfparallel.runtime.lowlevel import prepare
from sfparallel.runtime.payload import Buffer, another, load_error, loads, message_of
from sfparallel.runtime.region import LOSS_GRACE_S, Alarm, bind_link, free_port
from sfparallel.runtime.roster import Member, Roster, number_of
from sfparallel.runtime.schedule import Schedule
from sfparallel.runtime.work import Work
from sfparallel.runtime.worker import Place, die, live

STILLBORN_LIMIT = 3
"""So many clones in a row may be lost before they ask for work; then something is wrong with all of them."""

SHARE_NS = 4_000_000
"""A clone is given so much to do at a time, if tasks take less: a message costs as much as many small tasks."""

LONGEST_NS = 60_000_000_000
"""A task that takes longer counts as if it took so long."""

MAX_SHARE = 64
"""Tasks in one share at most."""


class Task(Protocol):
    """One piece of work. All calls come from the steward."""

    frames: list[Buffer]
    """What goes to the clone."""
    label: str
    """What it is called in errors, before its rank; may be empty."""
    retries: int
    """How many retries are left after the loss of a clone."""
    index: int | None
    """Its number in messages; None: in the order of submission."""

    def begin(self, rank: int) -> bool:
        """It is about to be sent to a clone; False if it has been cancelled meanwhile."""

    def give_back(self) -> None:
        """It was sent to a clone, and was not begun there after all."""

    def cancel(self) -> bool:
        """It need not be begun any more; False if it must be."""

    def succeed(self, value: Any) -> None:
        """This came out."""

    def fail(self, error: BaseException) -> None:
        """This was raised, or went wrong."""


def _left_s(end: float | None) -> float | None:
    """What is left of a time limit, if there is one."""
    return None if end is None else max(0.0, end - time.monotonic())


class _Steward(threading.Thread):
    """Looks after the clones of one crew."""


class Crew:
    """Up to `work.ranks` clones.

    Args:
        work: `call` finds in `work.inputs` what came with a key; `prepare` is called in each clone first.
        chunk: tasks that a clone is given at a time; None: as many as take a few milliseconds (`SHARE_NS`).
        replaces: whether clones that are lost are replaced.
        idle_s: all clones are discarded after this many seconds without a task, and created again for the next one.

    Attributes:
        began: when the program asked for the clones, on the monotonic clock; later by what is done once only in a program.
    """

    def __init__(self, work: Work, *, chunk: int | None = None, replaces: bool = False, idle_s: float | None = None) -> None:
        self._work = work
        self._replaces = replaces
        self._idle_s = idle_s
        self._generation = HERE.generation
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._keys = itertools.count()
        self._arrivals: deque[tuple[int, Task]] = deque()
        self._schedule = Schedule.stream(chunk or 1)
        self._adapts = chunk is None
        self._task_ns = float(SHARE_NS)
        """How long a task takes: a moving average."""
        self._tasks: dict[int, Task] = {}
        self._attempts: dict[int, int] = {}
        self._stillborn = 0
        self._losses: deque[tuple[float, Lost]] = deque()
        """Clones that are lost, and when they are struck off."""
        self._hungry = False
        """The steward sleeps, and wants to know of tasks."""
        self._idle_since: float | None = None
        self._closing = False
        self._cancelling = False
        self._killed = False
        self._broken: BaseException | None = None
        self._over = threading.Event()
        self._orderly = False
        self._first_s: float | None = None
        self._alarm: Alarm | None = None
        self._steward: threading.Thread | None = None
        self._resources = contextlib.ExitStack()

    # -- calls of the program's threads ----------------------------------------------------------------------------

    def enlist(self, timeout_s: float | None = None) -> int:
        """Keep this program's present state, and make the clones. Returns in the parent only.

        Args:
            timeout_s: the time that this may take.

        Returns:
            how many there are.

        Raises:
            CapacityError: the host cannot hold so many clones.
            OutsideVMError: this is not a VM of sfparallel.
            RegionTimeout: there was not enough time to make them.
        """
        self.require_program()
        HERE.park_if_ghost()
        self._generation = HERE.generation
        self.began = time.monotonic()
        with contextlib.ExitStack() as stack:
            with HERE.interrupts_deferred():
                self._line = HERE.take_hypervisor()
                stack.callback(self._hang_up)
                keeper = require_checkpoints(self._line)
                hello = HERE.hello(self._line)
                self._link = bind_link(hello.address)
                stack.callback(self._link.close)
                self._alarm = stack.enter_context(Alarm())
                stack.enter_context(HERE.wakes(self))
                self.began += prepare(self._line)  # a time limit is for what every call does
                end = None if timeout_s is None else self.began + timeout_s
                self._checkpoint = self._keep(free_port(hello.address), _left_s(end))
                stack.callback(self._drop)
                self._roster = Roster(self._line, keeper, self._link, self._checkpoint, self._work.ranks)
                made = self._roster.make(range(self._work.ranks), everyone=self._work.all_ranks, within_s=_left_s(end))
            self._resources = stack.pop_all()
        # A daemon, so that the program can end while clones are at work; who wants them to finish waits for `finish`.
        self._steward = _Steward(target=self._serve, name=f"sf-crew-{self._work.name}", daemon=True)
        self._steward.start()
        return made

    def submit(self, task: Task) -> None:
        """Have a task done; may be called by any thread.

        Raises:
            Closed: the crew has been told to finish.
            ExecutorBroken: its clones cannot work.
        """
        with self._lock:
            if self._broken is not None:
                raise another(self._broken)
            if self._closing:
                raise Closed("cannot schedule new tasks after shutdown", hint="make a new Executor")
            self._arrivals.append((next(self._keys), task))
        if self._hungry:
            self._hungry = False  # one ring is enough
            self.wake()

    def finish(self, *, cancel: bool = False, kill: bool = False) -> None:
        """Take no more tasks, and let the clones go when all are done. Returns at once.

        Args:
            cancel: tasks that have not begun need not be done.
            kill: let the clones go now.
        """
        with self._lock:
            self._closing = True
            self._cancelling |= cancel
            self._killed |= kill
        if self._alarm is None:
            self._over.set()  # it never began
        self.wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all is over after `finish`; False if it is not. A callback of one of its own tasks would wait for itself."""
        if self.is_steward:
            return False
        if not self._over.wait(timeout_s):
            return False
        if self._steward is not None:
            self._steward.join()
        return True

    def wake(self) -> None:
        """Have the steward look around."""
        if self._alarm is not None:
            self._alarm.ring()

    @property
    def broken(self) -> BaseException | None:
        """Why no clone can work, if that is so."""
        return self._broken

    @property
    def is_steward(self) -> bool:
        """Whether the calling thread is the one that looks after the clones."""
        return threading.current_thread() is self._steward

    @staticmethod
    def require_program() -> None:
        """Check that the calling thread is one of the program's own.

        Raises:
            StateError: it is a steward, which calls futures' callbacks: what the program does meanwhile would go on in clones.
        """
        if isinstance(threading.current_thread(), _Steward):
            raise StateError("a future's callback cannot make clones", hint="submit from another thread")

    @property
    def is_ours(self) -> bool:
        """Whether this is the VM that the clones belong to, and not a clone of it."""
        return HERE.generation == self._generation

    def require_ours(self, what: str, hint: str) -> None:
        """Check the same (see `Here.require_own`)."""
        HERE.require_own(self._generation, what, hint)

    # -- making clones ---------------------------------------------------------------------------------------------

    def _keep(self, port: int, within_s: float | None) -> int:
        """The number of the checkpoint. Clones made from it work and end in here."""
        try:
            moment, line, renewal = keep_state(within_s)
            if moment.fork.rank:
                number = number_of(moment.batch, moment.fork.rank)
                live(self._work, Place(line, renewal, self._link, moment.fork, port, number, []))
        except BaseException:
            if HERE.generation != self._generation:
                die()
            raise
        HERE.give_back(line)
        return moment.number

    def _complete(self) -> None:
        """Make the clones that are missing, if there is work for them."""
        idle = sum(1 for each in self._roster.members.values() if each.hand is None or not self._schedule.in_hand(each.hand))
        missing = self._schedule.waiting - idle
        if missing > 0 and self._replaces and len(self._roster) < self._work.ranks:
            try:
                self._unread |= self._roster.complete(missing)
            except SfError as error:
                self._break(error)

    # -- the steward -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The steward's whole life."""
        try:
            with self._resources:
                self._work_on()
                self._see_off()
        except BaseException as error:  # a thread's exception has nowhere else to go
            if not self.is_ours:
                park()
            self._break(error)
        finally:
            self._over.set()

    def _work_on(self) -> None:
        assert self._alarm is not None
        poller = zmq.Poller()
        self._link.watch(poller)
        poller.register(self._line.fileno(), zmq.POLLIN)
        poller.register(self._alarm.fileno(), zmq.POLLIN)
        line, alarm = self._line.fileno(), self._alarm.fileno()
        self._unread = True
        ready: dict[Any, int] = {}
        while True:
            events = self._line.events() if self._unread or line in ready else []
            self._unread = False
            # A limited number: whatever a clone sends, the rest has its turn.
            for message in self._link.take():
                self._on_message(message)
            for event in events:
                self._on_event(event)
            now = time.monotonic()
            while self._losses and self._losses[0][0] <= now - (0.0 if self._link.drained else LOSS_GRACE_S):
                self._lose(self._losses.popleft()[1])
            self._take_arrivals()
            if self._cancelling:
                self._cancel_waiting()
            if self._killed or (self._closing and not self._tasks and not self._arrivals):
                return
            self._deal()
            self._complete()
            wait_ms = self._link.poll_ms(self._wait_s())
            self._hungry = len(self._roster) < self._work.ranks or bool(self._schedule.idle())
            # Dealing may have found that the last tasks were cancelled: then nothing will come that ends the poll.
            done = self._closing and not self._tasks
            if self._arrivals or self._unread or done or self._broken is not None:
                self._hungry = False
                if self._broken is not None:
                    return
                continue
            ready = dict(poller.poll(wait_ms))
            self._hungry = False
            if not self.is_ours:
                park()  # another thread forked the VM while this one waited; this is the clone, where nobody will answer
            if alarm in ready:
                self._alarm.reset()

    def _take_arrivals(self) -> None:
        arrivals = self._arrivals
        while arrivals:
            key, task = arrivals.popleft()
            self._tasks[key] = task
            self._schedule.add(key)

    def _cancel_waiting(self) -> None:
        self._cancelling = False
        for key in self._schedule.clear():
            if self._tasks[key].cancel():
                del self._tasks[key]
            else:
                self._schedule.put_back(key)

    def _wait_s(self) -> float | None:
        """How long nothing has to be done unless something happens."""
        now = time.monotonic()
        waits = [self._idle_wait_s(), *(max(0.0, when - now) for when, _ in itertools.islice(self._losses, 1))]
        if self._schedule.waiting and self._roster.next_try > now:
            waits.append(self._roster.next_try - now)
        return min((wait_s for wait_s in waits if wait_s is not None), default=None)

    def _idle_wait_s(self) -> float | None:
        """How long to wait for something to do before the clones are let go."""
        if self._idle_s is None or self._tasks or not len(self._roster):
            self._idle_since = None
            return None
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        left = self._idle_since + self._idle_s - now
        if left > 0:
            return left
        self._let_go()
        return None

    def _deal(self) -> None:
        if self._schedule.waiting:
            self._adapt()
            for hand in self._schedule.idle():
                if not self._roster.by_hand[hand].doomed:
                    self._give(hand)

    def _adapt(self) -> None:
        if self._adapts:
            self._schedule.set_chunk(min(MAX_SHARE, int(SHARE_NS / self._task_ns)))

    def _give(self, hand: int) -> None:
        """Send a clone its next share."""
        member = self._roster.by_hand[hand]
        while keys := self._schedule.refill(hand):
            wanted = [key for key in keys if self._begin(key, member)]
            if wanted:
                self._link.send_work(member.number, wanted, [self._tasks[key].frames for key in wanted], member.place)
                return

    def _begin(self, key: int, member: Member) -> bool:
        if self._tasks[key].begin(member.place):
            return True
        self._schedule.answered(member.hand or 0, key)
        del self._tasks[key]
        return False

    def _on_message(self, message: Message | BadMessage) -> None:
        member = self._roster.members.get(message.rank)
        if member is None:
            return
        why = message.why if isinstance(message, BadMessage) else self._read(message, member)
        if why:
            self._on_bad(member, why)

    def _read(self, message: Message, member: Member) -> str:
        """Do what a message asks for, or say what is wrong with it."""
        match message.kind:
            case Kind.READY if member.hand is None and member.failure is None:
                self._stillborn = 0
                member.hand = self._schedule.join()
                self._roster.by_hand[member.hand] = member
            case Kind.UNFIT if member.hand is None and member.failure is None:
                error = load_error(message.error, message.frames, str(member))
                self._break(ExecutorBroken(f"the initializer failed in {member}: {type(error).__qualname__}: {message_of(error)}",
                                           rank=member.place), error)
            case Kind.FAILED if member.hand is None and member.failure is None:
                # An error of this clone. What it has printed comes before the news of its end.
                member.failure = load_error(message.error, message.frames, str(member))
                self._link.send(member.number, Kind.RELEASE)
            case Kind.BACK if member.hand is not None:
                for key in reversed(message.keys):
                    if not self._schedule.take_back(member.hand, key):
                        return f"task {key} back, which it did not have"
                    self._tasks[key].give_back()
            case Kind.RESULT | Kind.ERROR if member.hand is not None:
                if message.files and (path := unwanted(self._work.collector, message.files)) is not None:
                    return f"the file {path[:100]!r}, which collect= does not match"
                if not self._schedule.answered(member.hand, message.key):
                    return f"an answer for task {message.key}, which it did not have"
                self._task_ns += (min(max(1, message.ran_ns), LONGEST_NS) - self._task_ns) / 8
                self._adapt()
                # First the clone's next task: what becomes of this answer may take a while.
                if not member.doomed:
                    self._give(member.hand)
                self._on_answer(message, member, message.key)
            case _:
                return f"a message {message.kind.value!r}, which a clone never sends at this point"
        return ""

    def _on_bad(self, member: Member, why: str) -> None:
        """A clone has sent what no clone sends: it is lost, and with it the task that it was at."""
        self._line.kill(member.ticket, [member.rank])
        self._lose(Lost(member.ticket, member.rank, f"it sent {why}, and was killed", member.host))

    def _on_answer(self, message: Message, member: Member, key: int) -> None:
        task = self._tasks.pop(key)
        self._attempts.pop(key, None)
        if self._first_s is None:
            self._first_s = time.monotonic() - self.began
        error: BaseException | None = None
        value = None
        if message.kind is Kind.RESULT:
            try:
                value = loads(message.frames, str(member))
            except BaseException as raised:  # a result's own __setstate__ may raise anything; it is this task's error
                error = raised
                if not isinstance(raised, Exception):  # nobody meant to end the parent
                    error = ResultNotPicklable(f"a result arrived and raised {type(raised).__qualname__} when it was unpickled")
                error.add_note(f"in the result of {member}")
            else:
                error = self._collect(message, task, key)
        else:
            error = load_error(message.error, message.frames, f"{task.label}{member}")
        self._settle(task, error, value)

    def _collect(self, message: Message, task: Task, key: int) -> BaseException | None:
        """Write the files that came with a result, before the program has it; what went wrong is the task's error."""
        if self._work.collector is None:
            return None
        try:
            self._work.collector.receive(key if task.index is None else task.index, message.files, message.contents)
            self._work.collector.write()
        except (CollectConflict, OSError) as error:
            return error
        return None

    @staticmethod
    def _settle(task: Task, error: BaseException | None, value: Any = None) -> None:
        """Tell how a task ended; what the program does on hearing that must not end the steward."""
        try:
            if error is None:
                task.succeed(value)
            else:
                task.fail(error)
        except BaseException as raised:
            told = (type(raised), raised, raised.__traceback__, threading.current_thread())
            threading.excepthook(threading.ExceptHookArgs(told))

    def _on_event(self, event: Lost | Answer) -> None:
        member = self._roster.find(event)
        if member is None or member.doomed:
            return
        if isinstance(event, Answer):
            self._on_bad(member, "an answer with its exit, which only ranks of regions send")
        elif member.failure is not None:
            name = type(member.failure).__qualname__
            cause = f"a function of sf.on_clone failed: {name}: {message_of(member.failure)}"
            self._lose(replace(event, cause=cause))
        elif member.hand is not None and self._schedule.in_hand(member.hand):
            member.doomed = True
            self._losses.append((time.monotonic() + LOSS_GRACE_S, event))
        else:
            self._lose(event)

    def _lose(self, event: Lost) -> None:
        """A clone is lost, and with it what it had in hand."""
        member = self._roster.gone(event)
        if member is None:
            return
        self._unread = True  # there may have been events between the answers to our requests
        if member.hand is None:
            self._stillborn += 1
            if self._stillborn >= STILLBORN_LIMIT or not self._replaces:
                self._last_one_gone(event, member)
            return
        for unbegun in self._schedule.in_hand(member.hand)[1:]:
            self._tasks[unbegun].give_back()
        key = self._schedule.lose(member.hand)
        if key is not None:
            self._again(key, member.lost(event, f"{member} was lost: {event.cause}"))
        if not self._replaces:
            self._last_one_gone(event, member)

    def _again(self, key: int, error: CloneLost) -> None:
        """Retry the task of a lost clone, if it has retries left."""
        task = self._tasks[key]
        attempts = self._attempts[key] = self._attempts.get(key, 0) + 1
        if attempts <= task.retries:
            self._schedule.put_back(key)
            return
        del self._tasks[key], self._attempts[key]
        self._settle(task, error)

    def _last_one_gone(self, event: Lost, member: Member) -> None:
        if not len(self._roster) or self._stillborn >= STILLBORN_LIMIT:
            text = f"no clone is left: the last one, rank {member.place}, was lost: {event.cause}"
            self._break(member.lost(event, text), member.failure)

    # -- ends ------------------------------------------------------------------------------------------------------

    def _break(self, error: BaseException, cause: BaseException | None = None) -> None:
        """No clone can work: fail what there is, and refuse what comes."""
        error.__cause__ = cause
        with self._lock:
            if self._broken is None:
                self._broken = error
            self._closing = True
        self._fail_all(lambda: another(error))

    def _fail_all(self, make: Callable[[], BaseException]) -> None:
        self._take_arrivals()
        tasks, self._tasks = self._tasks, {}
        self._schedule.clear()
        for task in tasks.values():
            self._settle(task, make())

    def _let_go(self) -> None:
        """Release all clones, none of which has anything to do."""
        for hand in self._roster.by_hand:
            self._schedule.lose(hand)
        self._roster.release()
        self._unread = True

    def _see_off(self) -> None:
        """The end of the crew: everybody goes, and everything is given back."""
        now = time.monotonic() - self.began
        self._roster.report(now if self._first_s is None else self._first_s, now)
        if self._killed or self._broken is not None:
            self._roster.kill()
            self._fail_all(lambda: Closed("the clones were ended before this task was done"))
        else:
            self._let_go()
        self._orderly = True

    def _drop(self) -> None:
        """Give up the checkpoint. This may come on top of an error, which must not be hidden by another one from here."""
        with contextlib.suppress(SfError):
            line = HERE.take_hypervisor()
            require_checkpoints(line).drop(self._checkpoint)
            HERE.give_back(line)

    def _hang_up(self) -> None:
        """Give the line back; after an error, have the supervisor discard all clones that were made by it."""
        if self._orderly:
            HERE.give_back(self._line)
        else:
            self._line.close()
