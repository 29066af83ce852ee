"""How a start waits: for threads that nobody waits for when the job ends, and for nothing without a limit."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from sfparallel.config import START_LIMIT
from sfparallel.errors import SfError, UsageError, VMError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

FILES_LIMIT_S = 300.0
"""Files of a start that take longer are on a file system that does not answer."""


def step_limit_s() -> float:
    """A step of a start that takes longer is taken for hung. (On a busy machine the longest take a second or two.)

    Raises:
        UsageError: the setting is no number of seconds.
    """
    try:
        limit_s = float(START_LIMIT.get())
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < math.inf:
        raise UsageError(f"{START_LIMIT.variable}={START_LIMIT.get()!r} is not a number of seconds greater than 0")
    return limit_s


async def in_thread(
    function: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """Call a function in a daemon thread.

    asyncio.to_thread would keep the job from ending: asyncio.run joins the threads of the loop's executor, and a thread in
    libvirt, in flock(2) or in a folder whose server is gone cannot be interrupted. Here it is left behind, and goes with its
    process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def call() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = future.set_result, function(*args, **kwargs)
        except BaseException as error:
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=call, name=getattr(function, "__name__", "worker"), daemon=True).start()
    return await future


@contextlib.asynccontextmanager
async def within(
    limit_s: float,
    what: str,
    *,
    error: type[SfError] = VMError,
    hint: str | None = None,
    detail: Callable[[], str] = lambda: "",
) -> AsyncIterator[None]:
    """Give the block a time limit.

    Args:
        what: what is waited for, as the message says it: "the parent to wake up".
        detail: what else is to be seen of it when the time is up, the end of a console say.

    Raises:
        SfError: of class `error`: time is up.
    """
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            yield
    except TimeoutError as timeout:
        if not limit.expired():
            raise
        message = "\n".join(filter(None, (f"waited {limit_s:g} s for {what}, and gave up", detail())))
        raise error(message, hint=hint) from timeout


async def while_it_moves(
    work: Coroutine[Any, Any, _Result],
    moved: Callable[[], object],
    limit_s: float,
    what: str,
    *,
    error: type[SfError] = VMError,
    hint: str | None = None,
) -> _Result:
    """Wait for work that may rightly take any time, until nothing of it has moved for too long.

    Args:
        moved: how far it is; asked ten times in the limit.
        what: as for `within`.

    Raises:
        SfError: of class `error`: nothing has moved in the limit.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    seen, since = moved(), loop.time()
    try:
        while not task.done():
            await asyncio.wait([task], timeout=limit_s / 10)
            now = moved()
            if now != seen:
                seen, since = now, loop.time()
            elif loop.time() - since >= limit_s and not task.done():
                raise error(f"gave up waiting for {what}: nothing has moved for {limit_s:g} s", hint=hint)
        return task.result()
    finally:
        task.cancel()
