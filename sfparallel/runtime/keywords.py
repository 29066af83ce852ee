"""Keywords of public calls that there are not: named alone, with what was probably meant, by one type of error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from numbers import Real
from typing import Any, ParamSpec, TypeVar, cast

from sfparallel.errors import UsageError
from sfparallel.text import nearest

LONGEST_S = 1e9
"""Some 30 years: the functions of the kernel and of Python that wait do not take much larger numbers."""

LONGEST_WAIT_S = 1e6
"""Of one call: poll(2) and epoll_wait(2) take milliseconds as an int. Whoever waits longer calls again."""

P = ParamSpec("P")
R = TypeVar("R")


def check_keywords(call: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises UsageError if a keyword is given that `call` does not know."""
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    meant = {name: nearest(name, known) for name in unknown}
    words = [f"{name}=" + (f" (did you mean {near}=?)" if near else "") for name, near in meant.items()]
    raise UsageError(f"{call} has no option {', '.join(words)}", hint=f"options: {', '.join(f'{name}=' for name in known)}")


def keywords_checked(call: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator by which unknown keywords of a function are an error as in `check_keywords`.

    Args:
        call: the function's name for users.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        code = function.__code__
        names = code.co_varnames[code.co_posonlyargcount:code.co_argcount + code.co_kwonlyargcount]
        known = [name for name in names if name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            check_keywords(call, kwargs, known)
            return function(*args, **kwargs)

        return checked

    return decorate


def is_time(value: object) -> bool:
    """Whether it is a number of seconds greater than 0."""
    return not isinstance(value, bool) and isinstance(value, Real) and bool(cast(Any, value) > 0)


def bounded(seconds: float) -> float:
    """A time limit that clocks can count with. One that is longer than any program runs, an infinite one too, is `LONGEST_S`."""
    return seconds if seconds <= LONGEST_S else LONGEST_S
