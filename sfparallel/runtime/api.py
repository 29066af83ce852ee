"""The framework: `sf.parallel` and `sf.parallel_map`."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

from sfparallel.errors import UsageError
from sfparallel.runtime.collect import Collector, check_patterns
from sfparallel.runtime.futures import OwnFuture
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Hello
from sfparallel.runtime.keywords import bounded, check_keywords, is_time, keywords_checked
from sfparallel.runtime.lowlevel import check_count
from sfparallel.runtime.rng import region_streams
from sfparallel.runtime.schedule import Schedule

if TYPE_CHECKING:
    from sfparallel.runtime.region import Region

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S")
ErrorMode = Literal["raise", "return", "gather"]
"""What `on_error=` takes; see `parallel`."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a parallel function; see `parallel`."""

    n: int | None = None
    timeout: float | None = None
    on_error: ErrorMode = "raise"
    merge: Callable[[list[Any]], Any] | None = None
    collect: str | Iterable[str] | None = None
    seed: int | None = None
    progress: bool | None = None
    patterns: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.n is not None:
            check_count("n", self.n)
        check_common(self.timeout, self.on_error, self.seed)
        if self.merge is not None and not callable(self.merge):
            raise UsageError(f"merge= takes a function of the list of results, not {self.merge!r}")
        object.__setattr__(self, "patterns", check_patterns(self.collect))


def check_common(timeout: float | None, on_error: str, seed: int | None) -> None:
    if timeout is not None and not is_time(timeout):
        raise UsageError(f"timeout= takes seconds greater than 0, or None, not {timeout!r}")
    if on_error not in ("raise", "return", "gather"):
        raise UsageError(f"on_error= takes 'raise', 'return' or 'gather', not {on_error!r}")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise UsageError(f"seed= takes a whole number of at least 0, or None, not {seed!r}")


class RegionFuture(OwnFuture[T]):
    """The result of a region that runs while the program continues. `cancel` kills its clones."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self._region = region

    def cancel(self) -> bool:
        """Kill the clones; False if the region had ended already."""
        # Future refuses to cancel what is "running"; this one stays pending until it is done, because a region can be cancelled
        # at any time.
        cancelled = super().cancel()
        if cancelled:
            self._region.cancel()
        return cancelled

    def running(self) -> bool:
        """Whether the clones are at work."""
        return not self.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; Ctrl-C during the wait kills the clones."""
        try:
            return super().result(timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def settle(self, outcome: Callable[[], T]) -> None:
        """Take over what `outcome` returns or raises."""
        from sfparallel.runtime.payload import for_future
        from sfparallel.runtime.region import Cancelled
        try:
            value = outcome()
        except Cancelled:
            self.set_running_or_notify_cancel()
        except BaseException as error:  # a thread's exception has nowhere else to go
            if self.set_running_or_notify_cancel():
                self.set_exception(for_future(error, "merge="))
        else:
            if self.set_running_or_notify_cancel():
                self.set_result(value)


class ParallelFunction(Generic[P, T]):
    """A function whose calls run in clones, one call per rank; made by `parallel`.

    A call returns the list of results in rank order, or the value of `merge`.
    """

    __name__: str
    __wrapped__: Callable[P, Any]

    def __init__(self, function: Callable[P, Any], options: Options) -> None:
        # First, because it also copies the attributes of `function`, which may be a ParallelFunction itself.
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        region = self._region(args, kwargs)
        region.fork()
        return self._merge(region.gather())

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> RegionFuture[T]:
        """Fork now and gather in the background.

        If the program does not wait for the future, its clones end with the program.

        Returns:
            a future; `result()` is what the call would return.
        """
        region = self._region(args, kwargs)
        region.fork()
        future: RegionFuture[T] = RegionFuture(region)
        # A daemon, so that the program can end (after Ctrl-C, say) while clones are at work.
        threading.Thread(target=future.settle, args=(lambda: self._merge(region.gather()),), name=f"sf-gather-{self._name}",
                         daemon=True).start()
        return future

    def options(self, **changes: Any) -> ParallelFunction[P, Any]:
        """The same function with other options; options not given stay the same. See `parallel` for their names."""
        return ParallelFunction(self._function, _replace(self._options, changes))

    def __get__(self, instance: object, owner: type | None = None) -> ParallelFunction[Any, T]:
        """Methods can be parallel too."""
        if instance is None:
            return self
        return ParallelFunction(functools.partial(self._function, instance), self._options)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<parallel {self._name}>"

    @property
    def _name(self) -> str:
        return str(getattr(self, "__qualname__", None) or name_of(self._function))

    def _merge(self, results: list[Any]) -> T:
        merged: T = results if self._options.merge is None else self._options.merge(results)  # type: ignore[assignment]
        return merged

    def _region(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Region:
        from sfparallel.runtime.region import Region
        from sfparallel.runtime.work import OnError, Work
        options = self._options
        hello = HERE.require_vm()
        n = options.n or hello.default_n or os.cpu_count() or 1
        return Region(Work(
            name=self._name,
            call=lambda key: self._function(*args, **kwargs),
            plan=Schedule.one_each,
            per_item=False,
            ranks=n,
            all_ranks=True,
            streams=region_streams(options.seed, hello.seed),
            on_error=OnError(options.on_error),
            timeout_s=None if options.timeout is None else bounded(options.timeout),
            progress=options.progress,
            collector=collector_for(options.patterns, hello, "rank"),
        ))


def collector_for(patterns: tuple[str, ...], hello: Hello, noun: str) -> Collector | None:
    """What takes the files of clones back; None if none are asked for, or (`--local`) they are the parent's at once."""
    return Collector(patterns, Path.cwd(), noun) if patterns and not hello.shares_files else None


def name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _replace(options: Options, changes: dict[str, Any]) -> Options:
    check_keywords("sf.parallel", changes, [option.name for option in fields(Options) if option.init])
    return replace(options, **changes)


@overload
def parallel(fn: Callable[P, R], /) -> ParallelFunction[P, list[R]]: ...


@overload
def parallel(fn: None = None, /, *, merge: Callable[[list[Any]], S], n: int | None = None, timeout: float | None = None,
             on_error: ErrorMode = "raise", collect: str | Iterable[str] | None = None, seed: int | None = None,
             progress: bool | None = None) -> Callable[[Callable[P, R]], ParallelFunction[P, S]]: ...


@overload
def parallel(fn: None = None, /, *, on_error: Literal["return"], n: int | None = None, timeout: float | None = None,
             merge: None = None, collect: str | Iterable[str] | None = None, seed: int | None = None,
             progress: bool | None = None) -> Callable[[Callable[P, R]], ParallelFunction[P, list[R | Exception]]]: ...


@overload
def parallel(fn: None = None, /, *, n: int | None = None, timeout: float | None = None,
             on_error: Literal["raise", "gather"] = "raise", merge: None = None,
             collect: str | Iterable[str] | None = None, seed: int | None = None,
             progress: bool | None = None) -> Callable[[Callable[P, R]], ParallelFunction[P, list[R]]]: ...


@overload
def parallel(fn: Callable[P, R], /, *, n: int | None = None, timeout: float | None = None, on_error: ErrorMode = "raise",
             merge: Callable[[list[Any]], Any] | None = None, collect: str | Iterable[str] | None = None, seed: int | None = None,
             progress: bool | None = None) -> ParallelFunction[P, Any]: ...


def parallel(fn: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make each call of a function run in n clones of this VM, each with its own rank; a decorator, with or without options.

    Each clone continues from the program's current state, with its globals, arguments and open files; nothing is pickled on the
    way in. Results are returned in rank order. The changes of a clone are private to it.

    Args:
        n: number of clones; default: `sfrun -n`, else the number of CPUs.
        timeout: seconds for the whole call.
        on_error: "raise": the exception of the first rank that fails is raised, with rank and remote traceback in a note and the
            other ranks' results in `.sf_results`. "return": the list has exceptions in place of results. "gather": all ranks
            finish, then RankError is raised if any failed.
        merge: function of the list of results; the call returns its value.
        collect: glob or globs, relative to the current folder, of files written by clones to bring back to the parent.
        seed: seed of `sf.rng()`; with it, every rank has the same numbers in every run.
        progress: True reports answers on stderr as they arrive.

    Returns:
        a ParallelFunction, with `.options(...)`, `.submit(...)` and `.__wrapped__`.

    Raises:
        UsageError: an option is invalid. The call itself raises CapacityError, CloneLost, RegionTimeout, RankError,
        CollectConflict, OutsideVMError, and any exception that the function raises.
    """
    checked = _replace(Options(), options)
    if fn is None:
        return lambda function: ParallelFunction(function, checked)
    if not callable(fn):
        raise UsageError(f"sf.parallel takes a function, not {fn!r}", hint="options are keywords: @sf.parallel(n=8)")
    return ParallelFunction(fn, checked)


@overload
def parallel_map(fn: Callable[..., R], /, *iterables: Iterable[Any], on_error: Literal["return"], n: int | None = None,
                 chunksize: int | None = None, timeout: float | None = None, collect: str | Iterable[str] | None = None,
                 seed: int | None = None, progress: bool | None = None) -> list[R | Exception]: ...


@overload
def parallel_map(fn: Callable[..., R], /, *iterables: Iterable[Any], on_error: Literal["raise", "gather"] = "raise",
                 n: int | None = None, chunksize: int | None = None, timeout: float | None = None,
                 collect: str | Iterable[str] | None = None, seed: int | None = None,
                 progress: bool | None = None) -> list[R]: ...


@keywords_checked("sf.parallel_map")
def parallel_map(fn: Callable[..., R], /, *iterables: Iterable[Any], n: int | None = None, chunksize: int | None = None,
                 timeout: float | None = None, on_error: ErrorMode = "raise", collect: str | Iterable[str] | None = None,
                 seed: int | None = None, progress: bool | None = None) -> list[R] | list[R | Exception]:
    """`list(map(fn, *iterables))` in clones. The fork puts all items into every clone's memory; only item numbers are sent, on
    demand.

    Args:
        fn: called once per item, in one of the clones.
        iterables: as for `map`; they are read to the end of the shortest one before the fork.
        n: number of clones; default: `sfrun -n`, else the number of CPUs, or as many as fit; at most one per item.
        chunksize: items that a clone takes at a time; default: large chunks first, single items near the end.
        timeout: seconds for the whole call.
        on_error: as for `parallel`, for items instead of ranks. When a clone is lost, "raise" raises CloneLost; otherwise
            the item that it was working on fails with CloneLost, and its other items are given to other clones.
        collect: as for `parallel`; files belong to the item in whose time they were written. They are written at the end.
        seed: seed of `sf.rng()`; each item has its own stream, so the result does not depend on n.
        progress: True reports finished items on stderr.

    Returns:
        results in the order of items.

    Raises:
        as calls of a parallel function.
    """
    from sfparallel.runtime.region import Region
    from sfparallel.runtime.work import OnError, Work
    if not iterables:
        raise UsageError("sf.parallel_map needs at least one iterable")
    for name, value in (("n", n), ("chunksize", chunksize)):
        if value is not None:
            check_count(name, value)
    check_common(timeout, on_error, seed)
    patterns = check_patterns(collect)
    hello = HERE.require_vm()
    items = list(zip(*iterables, strict=False))
    if not items:
        return []
    ranks = min(n or hello.default_n or os.cpu_count() or 1, len(items))
    region = Region(Work(
        name=name_of(fn),
        call=lambda key: fn(*items[key]),
        plan=lambda granted: Schedule.dynamic(len(items), granted, chunksize),
        per_item=True,
        ranks=ranks,
        all_ranks=n is not None,
        streams=region_streams(seed, hello.seed),
        on_error=OnError(on_error),
        timeout_s=None if timeout is None else bounded(timeout),
        progress=progress,
        collector=collector_for(patterns, hello, "item"),
    ))
    region.fork()
    return region.gather()
