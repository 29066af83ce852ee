"""`sf.parallel_imap`: a map whose items are read, and whose results are handed out, while it goes on."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Literal, Self, TypeVar, overload

from sfparallel.errors import RankError, RegionTimeout, SfError, UsageError
from sfparallel.runtime.api import ErrorMode, check_common, collector_for, name_of
from sfparallel.runtime.collect import check_patterns
from sfparallel.runtime.crew import Crew
from sfparallel.runtime.here import HERE
from sfparallel.runtime.keywords import bounded, keywords_checked
from sfparallel.runtime.lowlevel import check_count
from sfparallel.runtime.payload import Buffer, dumps, loads, message_of, owned
from sfparallel.runtime.progress import Progress
from sfparallel.runtime.rng import region_streams
from sfparallel.runtime.schedule import Schedule
from sfparallel.runtime.work import OnError, Work

R = TypeVar("R")

LOOK_AHEAD = 8
"""Items that are read ahead for each clone, in chunks."""


class _Shelf:
    """Answers between the crew's steward, who puts them here, and the thread that takes results. (Tasks know it, and not the
    stream, so that a stream which its program forgets is collected, and closes.)

    Args:
        ordered: whether they are taken in the order of items.
    """

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._answers: dict[int, tuple[Any, BaseException | None]] = {}
        self._next = 0
        self._news = threading.Condition()

    def put(self, index: int, value: Any, error: BaseException | None) -> None:
        if error is not None:
            error.add_note(f"in item {index}")
        with self._news:
            self._answers[index] = value, error
            if not self._ordered or index == self._next:
                self._news.notify()

    def has_one(self) -> bool:
        """Whether `take` would not wait."""
        return self._next in self._answers if self._ordered else bool(self._answers)

    def take(self, timeout_s: float | None) -> tuple[int, Any, BaseException | None] | None:
        """The next answer, as index, value and error; None when time runs out."""
        with self._news:
            if not self._news.wait_for(self.has_one, timeout_s):
                return None
            index = self._next if self._ordered else next(iter(self._answers))
            self._next += 1
            return index, *self._answers.pop(index)


class _Item:
    """One item on its way; see `crew.Task`."""

    retries = 0

    def __init__(self, shelf: _Shelf, index: int, frames: list[Buffer]) -> None:
        self.frames = frames
        self.label = f"item {index}, "
        self.index: int | None = index
        self._place = index
        self._shelf = shelf

    def begin(self, rank: int) -> bool:
        return True

    def give_back(self) -> None:
        """Nobody counts how often an item is begun."""

    def cancel(self) -> bool:
        return False  # whoever takes the results waits for it

    def succeed(self, value: Any) -> None:
        self._shelf.put(self._place, value, None)

    def fail(self, error: BaseException) -> None:
        self._shelf.put(self._place, None, error)


class ResultStream(Iterator[R], Generic[R]):
    """The results of `parallel_imap`, one after the other; an iterator and a context manager.

    `close` ends it early and discards the clones.
    """

    def __init__(self, crew: Crew, items: Iterator[list[Buffer] | Exception], *, ordered: bool, buffersize: int,
                 timeout_s: float | None, on_error: OnError, progress: Progress) -> None:
        self._crew = crew
        self._items = items
        self._shelf = _Shelf(ordered=ordered)
        self._buffersize = buffersize
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else crew.began + timeout_s
        self._on_error = on_error
        self._progress = progress
        self._more = True
        self._given = 0
        self._taken = 0
        self._errors: dict[int, BaseException] = {}
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        if self._closed:
            raise StopIteration
        self._crew.require_ours("these results belong", hint="start another map in the clone")
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Discard the clones, even while they work, and wait until they are gone."""
        if self._closed:
            return
        self._closed = True
        if self._crew.is_ours:
            self._progress.close()
            self._crew.finish(kill=True)
            self._crew.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _next(self) -> R:
        while True:
            self._read_ahead()
            answer = self._await_answer()
            if answer is None:
                self._conclude()
                raise StopIteration
            index, value, error = answer
            self._taken += 1
            self._progress.advance()
            if error is None:
                return value  # type: ignore[no-any-return]
            match self._on_error:
                case OnError.RETURN:
                    return error  # type: ignore[return-value]
                case OnError.RAISE:
                    raise error
                case OnError.GATHER:
                    self._errors[index] = error

    def _read_ahead(self) -> None:
        """Give the clones work: at first until results come or the buffer is full, then an item for each result."""
        while self._more and self._given - self._taken < self._buffersize:
            item = next(self._items, None)
            if item is None:
                self._more = False
                return
            index, self._given = self._given, self._given + 1
            if isinstance(item, Exception):
                self._shelf.put(index, None, item)
            else:
                self._submit(_Item(self._shelf, index, item))
            if self._shelf.has_one():
                return

    def _submit(self, item: _Item) -> None:
        try:
            self._crew.submit(item)
        except SfError as error:
            item.fail(error)  # nobody is left to do it; what was computed before can still be had

    def _await_answer(self) -> tuple[int, Any, BaseException | None] | None:
        """The next result, or None when there are no more."""
        if self._taken == self._given:
            return None
        answer = self._shelf.take(None if self._deadline is None else self._deadline - time.monotonic())
        if answer is None:
            self._crew.require_ours("these results belong", hint="start another map in the clone")
            late = self._given - self._taken
            raise _timed_out(self._timeout_s, f"{late} items have no result yet; results already taken remain valid")
        return answer

    def _conclude(self) -> None:
        """All has been handed out: see the clones off, so that all they printed has been shown."""
        self._closed = True
        self._progress.close()
        self._crew.finish()
        self._crew.wait()
        if self._errors:
            first = min(self._errors)
            raise RankError(f"{len(self._errors)} of {self._given} items failed; the first is item {first}: "
                            f"{type(self._errors[first]).__qualname__}: {message_of(self._errors[first])}",
                            errors=self._errors) from self._errors[first]


@overload
def parallel_imap(fn: Callable[..., R], /, *iterables: Iterable[Any], on_error: Literal["return"], n: int | None = None,
                  chunksize: int | None = None, ordered: bool = True, buffersize: int | None = None, timeout: float | None = None,
                  collect: str | Iterable[str] | None = None, seed: int | None = None,
                  progress: bool | None = None) -> ResultStream[R | Exception]: ...


@overload
def parallel_imap(fn: Callable[..., R], /, *iterables: Iterable[Any], on_error: Literal["raise", "gather"] = "raise",
                  n: int | None = None, chunksize: int | None = None, ordered: bool = True, buffersize: int | None = None,
                  timeout: float | None = None, collect: str | Iterable[str] | None = None, seed: int | None = None,
                  progress: bool | None = None) -> ResultStream[R]: ...


@keywords_checked("sf.parallel_imap")
def parallel_imap(fn: Callable[..., R], /, *iterables: Iterable[Any], n: int | None = None, chunksize: int | None = None,
                  ordered: bool = True, buffersize: int | None = None, timeout: float | None = None,
                  on_error: ErrorMode = "raise", collect: str | Iterable[str] | None = None, seed: int | None = None,
                  progress: bool | None = None) -> ResultStream[Any]:
    """A lazy `map(fn, *iterables)` in clones: items are read while results are taken, so iterables may be endless.

    This call creates the clones, with the program's memory; only the items are sent to them (pickle protocol 5, with large
    buffers beside it). A clone gets its next item as soon as it has answered.

    Args:
        fn: called once per item, in one of the clones.
        iterables: as for `map`. They are read in the thread that takes the results.
        n: number of clones; default: `sfrun -n`, else the number of CPUs, or as many as fit; at most one per item.
        chunksize: items that are sent to a clone at a time; default: as many as take a few milliseconds. Items queued behind a
            slow one are given to other clones.
        ordered: results in the order of items; False: in the order in which they are computed.
        buffersize: maximum number of items that have been read but whose results have not been taken; default: 8 for each
            clone, times `chunksize`.
        timeout: seconds for the whole map.
        on_error: "raise": the exception of an item is raised at its place, and the clones are discarded. "return": it is
            returned in place of the result. "gather": it is kept, and RankError is raised at the end. When a clone is lost, the
            item that it was working on fails with CloneLost, and its other items are given to other clones.
        collect: as for `parallel`; files belong to the item in whose time they were written, and are written before its result is
            taken.
        seed: seed of `sf.rng()`; each item has its own stream, so the result does not depend on n.
        progress: True reports finished items on stderr.

    Returns:
        an iterator over the results. Its `close`, or the end of a `with` block, discards the clones early.

    Raises:
        as `parallel_map`, here or when results are taken.
    """
    if not iterables:
        raise UsageError("sf.parallel_imap needs at least one iterable")
    for name, value in (("n", n), ("chunksize", chunksize), ("buffersize", buffersize)):
        if value is not None:
            check_count(name, value)
    check_common(timeout, on_error, seed)
    patterns = check_patterns(collect)
    timeout = None if timeout is None else bounded(timeout)
    hello = HERE.require_vm()
    total = _length(iterables)
    items = map(_packed, zip(*iterables, strict=False))
    # No more clones than items; which can be known only by reading so many.
    first = list(itertools.islice(items, n or hello.default_n or os.cpu_count() or 1))
    inputs: dict[int, list[Buffer]] = {}
    crew = Crew(Work(
        name=name_of(fn),
        call=lambda key: fn(*loads(inputs.pop(key), what="an item")),
        plan=Schedule.one_each,
        per_item=True,
        ranks=len(first),
        all_ranks=n is not None,
        streams=region_streams(seed, hello.seed),
        collector=collector_for(patterns, hello, "item"),
        inputs_come=True,
        inputs=inputs,
    ), chunk=chunksize)
    try:
        clones = crew.enlist(timeout) if first else 0
    except RegionTimeout as error:
        raise _timed_out(timeout, "no clone was made") from error
    buffersize = buffersize or LOOK_AHEAD * clones * (chunksize or 1)
    return ResultStream(crew, itertools.chain(first, items), ordered=ordered, buffersize=buffersize, timeout_s=timeout,
                        on_error=OnError(on_error), progress=Progress(name_of(fn), total, progress))


def _timed_out(timeout_s: float | None, found: str) -> RegionTimeout:
    return RegionTimeout(f"parallel_imap took longer than {timeout_s} s; {found}", missing=[], hint="use a longer timeout=")


def _packed(item: tuple[Any, ...]) -> list[Buffer] | Exception:
    """An item as it is when it is read: the iterable may use the same memory for the next one."""
    try:
        return owned(dumps(item, what="an item", to="a clone"))
    except Exception as error:  # of this item
        return error


def _length(iterables: tuple[Iterable[Any], ...]) -> int | None:
    """Number of items, if they say so."""
    with contextlib.suppress(TypeError):
        return min(len(each) for each in iterables)  # type: ignore[arg-type]
    return None
