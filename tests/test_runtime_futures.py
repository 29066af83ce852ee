"""Futures of the parent in its clones: an error at once, where nobody would ever settle them."""

from __future__ import annotations

from typing import Any

import pytest

import sfparallel as sf
from sfparallel.runtime.futures import OwnFuture
from tests.conftest import Sfrun
from tests.fork_double import Doubles, double_fixture  # noqa: F401


@pytest.mark.parametrize("limit", [None, 0.01])
def test_a_clone_does_not_wait_for_its_parents_futures(double: Doubles, limit: float | None) -> None:
    never: OwnFuture[int] = OwnFuture()
    done: OwnFuture[int] = OwnFuture()
    done.set_result(3)

    def wait() -> list[Any]:
        found: list[Any] = [done.result(limit), done.exception(limit)]
        for call in (never.result, never.exception):
            with pytest.raises(sf.StateError, match="belongs to the parent"):
                call(limit)
            found.append("told")
        return found

    assert sf.parallel(n=1, timeout=60)(wait)() == [[3, None, "told", "told"]]


def test_every_future_of_ours_is_one(double: Doubles) -> None:
    with sf.Executor(1) as executor:
        task = executor.submit(abs, -1)
        region = sf.parallel(n=1)(lambda: 2).submit()
        assert isinstance(task, OwnFuture) and isinstance(region, OwnFuture)
        assert task.result(60) == 1 and region.result(60) == [2] and region.exception() is None
        with pytest.raises(TimeoutError):
            OwnFuture[int]().result(0)


@pytest.mark.needs("qemu", "image", "root")
def test_a_thread_of_the_parent_does_not_time_out_in_a_clone(sfrun: Sfrun) -> None:
    """It goes on in the parent; in the clone it would do the rest of its work a second time."""
    ended = sfrun("""
        import threading, time
        import sfparallel as sf

        future = sf.parallel(n=1)(time.sleep).submit(600)
        waits = threading.Event()

        def wait():
            waits.set()
            try:
                future.result(8)
            except TimeoutError:
                print("timed out in", "a clone" if sf.in_clone() else "the parent", flush=True)

        thread = threading.Thread(target=wait)
        thread.start()
        waits.wait()
        time.sleep(1)
        sf.parallel(n=1)(time.sleep)(12)
        thread.join()
        future.cancel()
    """).ok()
    assert ended.out == "timed out in the parent\n"
