"""How a start waits: for threads that nobody waits for when the job ends, and for nothing without a limit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, ParamSpec, TypeVar

from sfparallel.errors import SfError, VMError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

STEP_LIMIT_S = 60.0
"""A step of a start that takes longer is taken for hung (on a busy machine the longest take a second or two)."""


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
async def within(limit_s: float, what: str, *, error: type[SfError] = VMError, hint: str | None = None) -> AsyncIterator[None]:
    """Give the block a time limit.

    Args:
        what: what is waited for, as the message says it: "the parent to wake up".

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
        raise error(f"waited {limit_s:g} s in vain for {what}", hint=hint) from timeout
