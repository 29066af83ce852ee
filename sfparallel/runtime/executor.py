"""`sf.Executor`: a concurrent.futures.Executor whose workers are clones."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import queue
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

from sfparallel.errors import Closed, ResultNotPicklable, UsageError
from sfparallel.runtime.api import collector_for
from sfparallel.runtime.collect import check_patterns
from sfparallel.runtime.crew import Crew
from sfparallel.runtime.futures import OwnFuture
from sfparallel.runtime.here import HERE
from sfparallel.runtime.keywords import bounded, is_time, keywords_checked
from sfparallel.runtime.lowlevel import check_count
from sfparallel.runtime.payload import Buffer, dumps, loads, owned
from sfparallel.runtime.rng import region_streams
from sfparallel.runtime.schedule import Schedule
from sfparallel.runtime.work import Work

P = ParamSpec("P")
T = TypeVar("T")


class TaskFuture(OwnFuture[T]):
    """The outcome of one task.

    Attributes:
        rank: the number of the clone that has the task or had it last; None before it was started.
        attempts: how often it was started.
    """

    rank: int | None = None
    attempts: int = 0


class _Job:
    """One task on its way; see `crew.Task`."""

    label = ""
    index: int | None = None

    def __init__(self, future: TaskFuture[Any], frames: list[Buffer], retries: int) -> None:
        self.frames = frames
        self.retries = retries
        self._future = future

    def begin(self, rank: int) -> bool:
        future = self._future
        # A future that runs already is retried, after the loss of a clone.
        if not future.running() and not future.set_running_or_notify_cancel():
            return False
        future.rank = rank
        future.attempts += 1
        return True

    def give_back(self) -> None:
        self._future.attempts -= 1

    def cancel(self) -> bool:
        if not self._future.cancel():
            return False
        self._future.set_running_or_notify_cancel()
        return True

    def succeed(self, value: Any) -> None:
        self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if self._future.running() or self._future.set_running_or_notify_cancel():
            self._future.set_exception(error)


class _Known:
    """The functions of the program's main module when its clones were made: these the clones have, by name."""

    def __init__(self) -> None:
        import __main__
        # The functions themselves are kept, so that no later one gets the identity of one that is gone.
        self._functions = {id(value): value for value in vars(__main__).values() if isinstance(value, types.FunctionType)}

    def lacks(self, function: Any) -> bool:
        """Whether clones would find another function of that name, or none."""
        return (isinstance(function, types.FunctionType) and function.__module__ == "__main__"
                and "<" not in function.__qualname__ and "." not in function.__qualname__ and id(function) not in self._functions)


class Executor(concurrent.futures.Executor):
    """A `concurrent.futures.Executor` whose workers are clones of this VM.

    The first `submit` creates all clones, with the memory that the program has at that time; clones that replace lost ones later
    have the same memory. `refresh` creates new ones with the program's current memory. Tasks are pickled and sent to clones
    (protocol 5, with large buffers beside the pickle): functions of modules and of the main module by name, others by value.

    Args:
        max_workers: number of clones; default: `sfrun -n`, else the number of CPUs, or as many as fit.
        initializer: called in each clone before its first task. It is not pickled, nor are its arguments.
        initargs: its arguments.
        retries: retries after a lost clone. When they are used up, the task's future fails with CloneLost.
        idle_timeout: seconds without a task after which the clones are discarded. The next task creates new ones with the same
            memory. Default: they are kept.
        collect: as for `sf.parallel`; files belong to the task in whose time they were written, and are written before its
            future is done.
        seed: seed of `sf.rng()`; each task has its own stream, in the order of submission.
    """

    _crews: ClassVar[weakref.WeakSet[Crew]] = weakref.WeakSet()
    """Crews that may be at work: the interpreter waits for them at its exit."""
    _exit: ClassVar[dict[str, bool]] = {"registered": False, "begun": False}

    @keywords_checked("sf.Executor")
    def __init__(self, max_workers: int | None = None, *, initializer: Callable[..., object] | None = None,
                 initargs: tuple[Any, ...] = (), retries: int = 0, idle_timeout: float | None = None,
                 collect: str | Iterable[str] | None = None, seed: int | None = None) -> None:
        if max_workers is not None and (not isinstance(max_workers, int) or max_workers < 1):
            raise UsageError(f"max_workers must be greater than 0, and a whole number, not {max_workers!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if not isinstance(retries, int) or retries < 0:
            raise UsageError(f"retries= takes a whole number of at least 0, not {retries!r}")
        if idle_timeout is not None and not is_time(idle_timeout):
            raise UsageError(f"idle_timeout= takes seconds greater than 0, or None, not {idle_timeout!r}")
        self._patterns = check_patterns(collect)
        self._hello = HERE.require_vm()
        self._max_workers = max_workers
        self._initializer = initializer
        self._initargs = initargs
        self._retries = retries
        self._idle_timeout = None if idle_timeout is None else bounded(idle_timeout)
        self._seed = seed
        # Reentrant: a clone is made while its thread holds it, and a task may use the executor that it was given to.
        self._lock = threading.RLock()
        self._crew: Crew | None = None
        self._retiring: Crew | None = None
        self._known = _Known()
        self._shutdown = False
        self._register()

    # -- what concurrent.futures has -------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Compute `fn(*args, **kwargs)` in a clone.

        Returns:
            its future, with `.rank` and `.attempts`.

        Raises:
            Closed: after `shutdown`.
            ExecutorBroken: the initializer failed in a clone.
            CapacityError: the clones do not fit in the host's memory (only from a call that creates clones).
        """
        return self._submit(fn, args, kwargs, fn)

    def map(self, fn: Callable[..., T], /, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
            buffersize: int | None = None, ordered: bool = True) -> Iterator[T]:
        """`map(fn, *iterables)` in clones.

        Args:
            fn: called once per item.
            iterables: as for `map`. Without `buffersize` they are read to the end now, else as results are taken.
            timeout: seconds from now within which results must arrive.
            chunksize: items that are one task.
            buffersize: maximum number of submitted tasks whose results have not been taken.
            ordered: results in the order of items; False: in the order in which they are computed.

        Raises:
            TimeoutError: when a result is taken that has not arrived in time.
        """
        check_count("chunksize", chunksize)
        if buffersize is not None:
            check_count("buffersize", buffersize)
        deadline = None if timeout is None else time.monotonic() + bounded(timeout)
        items = zip(*iterables, strict=False)
        chunks = iter(lambda: list(itertools.islice(items, chunksize)), [])
        futures: _Window[list[T]] = _Window(ordered=ordered)
        for chunk in itertools.islice(chunks, buffersize):
            futures.add(self._submit(_run_chunk, (fn, chunk), {}, fn))
        # Once all is submitted, the results do not need this object: a program may forget it.
        refill = (lambda chunk: self._submit(_run_chunk, (fn, chunk), {}, fn)) if buffersize is not None else None
        return _results(futures, chunks, refill, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks, and discard the clones when all tasks are done.

        Args:
            wait: whether to return only then.
            cancel_futures: cancel tasks that have not started.
        """
        with self._lock:
            self._shutdown = True
            crews = self._our_crews()
        for crew in crews:
            crew.finish(cancel=cancel_futures)
        if wait:
            for crew in crews:
                crew.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.kill()  # as the processes of a ProcessPoolExecutor, which get the signal too
        self.shutdown()

    # -- what it has beyond that -----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Create new clones with the memory that the program has now. Waits for all tasks that were submitted before.

        Raises:
            StateError: called by a future's callback, for which the clones would have to wait.
        """
        Crew.require_program()
        with self._lock:
            self._check_open()
            crew, self._crew = self._our_crew(), None
            self._retiring = crew
        if crew is None:
            return
        # Not under the lock: callbacks of the tasks that are waited for may want it.
        crew.finish()
        crew.wait()
        with self._lock:
            self._retiring = None  # not before: after a Ctrl-C, `kill` has to find it
            if not self._shutdown and self._our_crew() is None:
                self._enlist()

    def kill(self) -> None:
        """Accept no more tasks, and discard the clones at once: futures that are not done fail with Closed."""
        with self._lock:
            self._shutdown = True
            crews = self._our_crews()
        for crew in crews:
            crew.finish(kill=True)
        for crew in crews:
            crew.wait()

    @property
    def broken(self) -> BaseException | None:
        """Why the clones cannot work, if that is so."""
        crew = self._our_crew()
        return None if crew is None else crew.broken

    # -- clones ----------------------------------------------------------------------------------------------------

    def _submit(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], users: Any) -> TaskFuture[Any]:
        future: TaskFuture[Any] = TaskFuture()
        HERE.park_if_ghost()  # not with the lock, which a rank may want that uses this executor, too
        with self._lock:
            self._check_open()
            crew = self._our_crew() or self._enlist()
            try:
                frames = owned(dumps((fn, args, kwargs), what="a task", to="a clone", by_value=self._known.lacks(users)))
            except ResultNotPicklable as error:
                future.set_running_or_notify_cancel()
                future.set_exception(error)
            else:
                crew.submit(_Job(future, frames, self._retries))
        return future

    def _our_crew(self) -> Crew | None:
        return self._crew if self._crew is not None and self._crew.is_ours else None

    def _our_crews(self) -> list[Crew]:
        """That one, and one that `refresh` waits for."""
        return [crew for crew in (self._retiring, self._crew) if crew is not None and crew.is_ours]

    def _check_open(self) -> None:
        if self._shutdown:
            raise Closed("cannot schedule new futures after shutdown", hint="make a new Executor")
        if self._exit["begun"]:
            raise Closed("cannot schedule new futures after interpreter shutdown")

    def _enlist(self) -> Crew:
        inputs: dict[int, list[Buffer]] = {}
        initializer, initargs = self._initializer, self._initargs
        self._known = _Known()
        crew = Crew(Work(
            name="Executor",
            call=lambda key: _run(inputs.pop(key)),
            plan=Schedule.one_each,
            per_item=True,
            ranks=self._max_workers or self._hello.default_n or os.cpu_count() or 1,
            all_ranks=self._max_workers is not None,
            streams=region_streams(self._seed, self._hello.seed),
            collector=collector_for(self._patterns, self._hello, "task"),
            prepare=None if initializer is None else (lambda: initializer(*initargs)),
            inputs_come=True,
            inputs=inputs,
        ), replaces=True, idle_s=self._idle_timeout)
        crew.enlist()
        self._crew = crew
        self._crews.add(crew)
        # An executor that its program forgets finishes what it was given.
        weakref.finalize(self, crew.finish).atexit = False
        return crew

    @classmethod
    def _register(cls) -> None:
        """Have the interpreter wait at its exit, before it stops threads from working."""
        if not cls._exit["registered"]:
            # What concurrent.futures itself does; atexit handlers come too late, when threads are joined already.
            threading._register_atexit(cls._finish_all)  # type: ignore[attr-defined]
            HERE.forgetful.append(cls._crews.clear)
            cls._exit["registered"] = True

    @classmethod
    def _finish_all(cls) -> None:
        cls._exit["begun"] = True
        crews = [crew for crew in cls._crews if crew.is_ours]  # not those of the process that this one was forked from
        for crew in crews:
            crew.finish()
        for crew in crews:
            crew.wait()


class _Window(Generic[T]):
    """Futures of a map that were submitted and whose results have not been taken."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._futures: deque[Future[T]] = deque()
        self._done: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()

    def add(self, future: Future[T]) -> None:
        self._futures.append(future)
        if not self._ordered:
            future.add_done_callback(self._done.put)

    def __bool__(self) -> bool:
        return bool(self._futures)

    def take(self, timeout_s: float | None) -> T:
        """The next result.

        Raises:
            TimeoutError: it is not there in time.
        """
        if self._ordered:
            try:
                return self._futures[0].result(timeout_s)
            finally:
                self._futures.popleft()
        try:
            future = self._done.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        self._futures.remove(future)
        try:
            return future.result()
        finally:
            del future  # the traceback of its exception would refer to it

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()


def _results(futures: _Window[list[T]], chunks: Iterator[list[Any]], refill: Callable[[list[Any]], Future[list[T]]] | None,
             deadline: float | None) -> Iterator[T]:
    try:
        while futures:
            results = futures.take(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if refill is not None and (chunk := next(chunks, None)) is not None:
                futures.add(refill(chunk))
            # Nothing here refers to a result any more when it is handed out.
            results.reverse()
            while results:
                yield results.pop()
    finally:
        futures.cancel()


def _run(frames: list[Buffer]) -> Any:
    """In a clone: do one task."""
    fn, args, kwargs = loads(frames, what="a task")
    return fn(*args, **kwargs)


def _run_chunk(fn: Callable[..., T], items: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*item) for item in items]


def register_joblib() -> None:
    """Register the joblib backend "sf": with `joblib.parallel_config("sf")`, `joblib.Parallel` runs in clones.

    Raises:
        UsageError: joblib is not installed here.
    """
    try:
        import joblib
    except ImportError as error:
        raise UsageError("joblib is not installed here",
                         hint="build a guest image with it: sf image build NAME --pip joblib; then sfrun --image NAME") from error
    from sfparallel.runtime.joblib_backend import CloneBackend
    joblib.register_parallel_backend("sf", CloneBackend)
