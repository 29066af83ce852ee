"""Futures of one VM: its clones have copies of them, which nobody there will ever settle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TypeVar

from sfparallel.runtime.here import HERE

T = TypeVar("T")


class OwnFuture(Future[T]):
    """A future that knows to which VM it belongs. In a clone, the thread that was cloned gets an error instead of waiting for
    ever; the parent's other threads wait for ever, whatever time limit they had, because they go on in the parent."""

    def __init__(self) -> None:
        super().__init__()
        self._generation = HERE.generation

    def result(self, timeout: float | None = None) -> T:
        with self._for_its_owner():
            return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        with self._for_its_owner():
            return super().exception(timeout)

    @contextlib.contextmanager
    def _for_its_owner(self) -> Iterator[None]:
        self._require_own()
        try:
            yield
        except TimeoutError:  # this may have become a clone while it waited
            self._require_own()
            raise

    def _require_own(self) -> None:
        if not self.done():
            HERE.require_own(self._generation, "this future belongs", hint="a clone waits for futures of its own")
