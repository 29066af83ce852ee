"""`mpi4py.util.pool`: the interface of `multiprocessing.Pool` on clones (of the rank that makes the pool)."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from typing import Any, Generic, Self, TypeVar

from mpi4py import futures

__all__ = ["ApplyResult", "AsyncResult", "MapResult", "Pool", "ThreadPool"]

T = TypeVar("T")
Then = Callable[[Any], object]

CHUNKS = 4
"""A map without `chunksize=` gives each worker so many chunks."""


class AsyncResult(Generic[T]):
    """What `apply_async` and `map_async` return. It is ready when `callback` or `error_callback` has been called."""

    def __init__(self, future: Future[T], callback: Then | None = None, error_callback: Then | None = None) -> None:
        self.future = future
        self._callback, self._error_callback = callback, error_callback
        self._ready = threading.Event()
        future.add_done_callback(self._tell)

    def _tell(self, future: Future[T]) -> None:
        try:
            try:
                error = future.exception()
            except CancelledError:
                error = TimeoutError()
            if error is None and self._callback is not None:
                self._callback(future.result())
            elif error is not None and self._error_callback is not None:
                self._error_callback(error)
        finally:
            self._ready.set()

    def get(self, timeout: float | None = None) -> T:
        """The result.

        Raises:
            TimeoutError: it is not there in time, or the pool was terminated.
        """
        if not self._ready.wait(timeout):
            raise TimeoutError
        try:
            return self.future.result()
        except CancelledError:
            raise TimeoutError from None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is ready."""
        self._ready.wait(timeout)

    def ready(self) -> bool:
        return self._ready.is_set()

    def successful(self) -> bool:
        """Whether the call has not raised.

        Raises:
            ValueError: it is not ready.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return not self.future.cancelled() and self.future.exception() is None


class ApplyResult(AsyncResult[T]):
    """Of `apply_async`."""


class MapResult(AsyncResult[list[T]]):
    """Of `map_async` and `starmap_async`."""


class Pool:
    """Workers that are clones.

    Args:
        processes: how many; the default is that of `MPIPoolExecutor`.
        initializer, initargs: as for `MPIPoolExecutor`.
        options: others of it. Those of `multiprocessing.Pool` that mean nothing here warn.
    """

    Executor: type[Any] = futures.MPIPoolExecutor

    def __init__(self, processes: int | None = None, initializer: Callable[..., object] | None = None,
                 initargs: Iterable[Any] = (), **options: Any) -> None:
        if processes is not None and processes < 1:
            raise ValueError("number of processes must be at least 1")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        for name in ("maxtasksperchild", "context"):
            if options.pop(name, None) is not None:
                warnings.warn(f"argument {name!r} is not supported", UserWarning, stacklevel=2)
        self.executor: Executor = self.Executor(processes, initializer=initializer, initargs=tuple(initargs), **options)

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] | None = None) -> T:
        """`func(*args, **kwds)`, in a worker."""
        return self.executor.submit(func, *args, **(kwds or {})).result()

    def apply_async(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] | None = None,
                    callback: Then | None = None, error_callback: Then | None = None) -> ApplyResult[T]:
        return ApplyResult(self.executor.submit(func, *args, **(kwds or {})), callback, error_callback)

    def map(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None) -> list[T]:
        """`list(map(func, iterable))`, in workers."""
        return list(self._in_order(self._chunks(_Each(func), iterable, chunksize)))

    def map_async(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None,
                  callback: Then | None = None, error_callback: Then | None = None) -> MapResult[T]:
        return MapResult(_joined(self._chunks(_Each(func), iterable, chunksize)), callback, error_callback)

    def imap(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1) -> Iterator[T]:
        """The same as an iterator."""
        return self._in_order(self._chunks(_Each(func), iterable, chunksize))

    def imap_unordered(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1) -> Iterator[T]:
        """The same, in the order in which results come."""
        return self._as_they_come(self._chunks(_Each(func), iterable, chunksize))

    def starmap(self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int | None = None) -> list[T]:
        """`list(itertools.starmap(func, iterable))`, in workers."""
        return list(self._in_order(self._chunks(_Star(func), iterable, chunksize)))

    def starmap_async(self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int | None = None,
                      callback: Then | None = None, error_callback: Then | None = None) -> MapResult[T]:
        return MapResult(_joined(self._chunks(_Star(func), iterable, chunksize)), callback, error_callback)

    def istarmap(self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int = 1) -> Iterator[T]:
        return self._in_order(self._chunks(_Star(func), iterable, chunksize))

    def istarmap_unordered(self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int = 1) -> Iterator[T]:
        return self._as_they_come(self._chunks(_Star(func), iterable, chunksize))

    def close(self) -> None:
        """Take no more work."""
        self.executor.shutdown(wait=False)

    def terminate(self) -> None:
        """The same, and drop what has not begun."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait until all is done."""
        self.executor.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _chunks(self, call: Callable[[list[Any]], list[T]], iterable: Iterable[Any],
                chunksize: int | None) -> list[Future[list[T]]]:
        """A task for each chunk of the items."""
        if chunksize is None:
            iterable = list(iterable)
            workers = getattr(self.executor, "num_workers", None) or getattr(self.executor, "_max_workers", None) or 1
            chunksize = max(1, -(-len(iterable) // (workers * CHUNKS)))
        if chunksize < 1:
            raise ValueError("chunksize must be at least 1")
        items = iter(iterable)
        return [self.executor.submit(call, chunk) for chunk in iter(lambda: list(itertools.islice(items, chunksize)), [])]

    @staticmethod
    def _in_order(chunks: list[Future[list[T]]]) -> Iterator[T]:
        return itertools.chain.from_iterable(chunk.result() for chunk in chunks)

    @staticmethod
    def _as_they_come(chunks: list[Future[list[T]]]) -> Iterator[T]:
        return itertools.chain.from_iterable(chunk.result() for chunk in as_completed(chunks))


class ThreadPool(Pool):
    """Workers that are threads of this process."""

    Executor = ThreadPoolExecutor


class _Each:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, items: list[Any]) -> list[Any]:
        return [self._function(item) for item in items]


class _Star(_Each):
    def __call__(self, items: list[Any]) -> list[Any]:
        return [self._function(*item) for item in items]


def _joined(chunks: list[Future[list[T]]]) -> Future[list[T]]:
    """A future of all results, in order; or of the first error."""
    whole: Future[list[T]] = Future()
    whole.set_running_or_notify_cancel()
    lock, missing = threading.Lock(), len(chunks)

    def done(chunk: Future[list[T]]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if whole.done():
                return
            error = TimeoutError() if chunk.cancelled() else chunk.exception()
            if error is not None:
                whole.set_exception(error)
            elif not missing:
                whole.set_result([result for each in chunks for result in each.result()])

    for chunk in chunks:
        chunk.add_done_callback(done)
    if not chunks:
        whole.set_result([])
    return whole
