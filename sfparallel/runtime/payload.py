"""How results and exceptions travel: pickle protocol 5, large buffers as frames of their own (PEP 574).

A payload is a list of frames: the pickle, then its out-of-band buffers in order. Large arrays are neither copied into the pickle
nor out of it. Pure functions, no sockets.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import pickle
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from sfparallel.errors import RankExit, RemoteError, ResultNotPicklable
from sfparallel.text import printable

Buffer = bytes | bytearray | memoryview

IN_BAND_BYTES = 64 << 10
"""Smaller buffers stay inside the pickle. ZeroMQ would copy them anyway, and hands out small messages at odd addresses inside its
receive buffer, where an array would not be aligned; large ones have memory of their own, aligned to 8 bytes (measured with
libzmq 4.3.4 and 4.3.5)."""

TEXT_CHARS = 1 << 20
"""Of an error's message and traceback, so much goes to the parent."""


def dumps(value: Any, origin: str = "this rank", *, what: str | None = None, to: str = "the parent",
          by_value: bool = False) -> list[Buffer]:
    """Pickle `value` into frames; buffers are referred to, not copied. Functions of the main module go `by_value`, or by name.

    Args:
        origin: whose result it is, for the error.
        what: what it is, if it is no result.
        to: where it goes.
        by_value: see above.

    Raises:
        ResultNotPicklable: neither pickle nor cloudpickle can.
    """
    if not by_value:
        try:
            return _dumps(functools.partial(pickle.dumps, protocol=5), value)
        except Exception:  # a class's own __reduce__ may raise anything
            pass
    try:
        from sfparallel.runtime.by_value import dumps as dumps_by_value
        return _dumps(dumps_by_value, value)
    except Exception as error:
        noun = what or f"the result of {origin}"
        raise ResultNotPicklable(f"{noun}, a {type(value).__qualname__}, cannot be sent to {to}: {message_of(error)}",
                                 hint="return plain data (numbers, arrays, containers, contents of files), "
                                      "or write a file and use collect=") from error


def _dumps(dump: Callable[..., bytes], value: Any) -> list[Buffer]:
    buffers: list[Buffer] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:
            return True  # not contiguous: pickle itself says what is wrong with it
        if view.nbytes < IN_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    data = dump(value, buffer_callback=keep)
    return [data, *buffers]


def owned(frames: list[Buffer]) -> list[Buffer]:
    """The same payload in memory of its own: for one that is sent after its sender goes on, and may change what it refers to."""
    return [frames[0], *map(bytes, frames[1:])]


def loads(frames: Sequence[Buffer], origin: str = "a rank", *, what: str | None = None) -> Any:
    """Rebuild what `dumps` was given. Arrays lie in the memory of `frames` and are writable.

    Args:
        origin: whose result it is, for the error.
        what: what it is, if it is no result.

    Raises:
        ResultNotPicklable: the pickle cannot be read here.
    """
    try:
        return pickle.loads(frames[0], buffers=[_writable(frame) for frame in frames[1:]])
    except KeyboardInterrupt:
        raise  # Ctrl-C
    except BaseException as error:  # a class's own __setstate__ may raise anything, SystemExit included
        noun = what or f"the result of {origin}"
        hint = "its class must be importable where it arrives, and must unpickle there"
        raise ResultNotPicklable(f"{noun} arrived but cannot be unpickled: {type(error).__qualname__}: {message_of(error)}",
                                 hint=hint) from error


def _writable(frame: Buffer) -> Buffer:
    view = memoryview(frame)
    return bytearray(view) if view.readonly else view


def _clean(text: str) -> str:
    """Text that msgpack takes: Python strings may hold lone surrogates (undecodable file names), UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class UsersCode:
    """Around a call into an exception's own class, whose methods may raise anything, SystemExit included. All of that is dropped,
    but for Ctrl-C."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        return kind is not None and not issubclass(kind, KeyboardInterrupt)


def message_of(error: BaseException) -> str:
    """The text of an exception of any class."""
    with UsersCode():
        return _clean(str(error))
    return f"<{type(error).__qualname__} without a readable message>"


def _traceback_of(error: BaseException) -> str:
    """The formatted traceback; without what belongs to the exception itself where that cannot be formatted: `__notes__` may be a
    property that raises, and the fields of a SyntaxError are whatever it was given."""
    frames = _users_frames(error.__traceback__)
    with UsersCode():
        return "".join(traceback.format_exception(type(error), error, frames))
    return "".join(["Traceback (most recent call last):\n", *traceback.format_tb(frames),
                    f"{type(error).__qualname__}: {message_of(error)}\n"])


def _cut(text: str) -> str:
    """As much of a text as goes with a message; the end of a traceback is what matters most."""
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS // 2]}\n...\n{text[-TEXT_CHARS // 2:]}"


def _users_frames(frames: TracebackType | None) -> TracebackType | None:
    """A traceback without the runtime's own frames at its start; whole if it has no others."""
    start = frames
    while start is not None and str(start.tb_frame.f_globals.get("__name__")).startswith("sfparallel.runtime."):
        start = start.tb_next
    return start or frames


def _describe(error: BaseException) -> dict[str, str]:
    kind = type(error)
    return {
        "type": _cut(_clean(f"{kind.__module__}.{kind.__qualname__}")),
        "message": _cut(message_of(error)),
        "traceback": _cut(_clean(_traceback_of(error))),
    }


def dump_error(error: BaseException, rank: int) -> tuple[dict[str, str], list[Buffer]]:
    """In a clone: prepare an exception for the journey: a description as text, and the pickle (no frames when it cannot be
    pickled). Whatever the methods of its class raise, KeyboardInterrupt included: nobody is at a clone's keyboard."""
    try:
        description = _describe(error)
    except BaseException:
        description = {"type": f"{type(error).__module__!a}.{type(error).__qualname__!a}".replace("'", ""), "traceback": "",
                       "message": "(its methods raise KeyboardInterrupt)"}
    try:
        if isinstance(error, SystemExit):
            code = error.code if error.code is None or isinstance(error.code, int) else message_of(error)
            error = RankExit(f"rank {rank} called sys.exit({_repr(code)}) instead of returning", rank=rank, code=code)
        frames = dumps(error)
        # Many exceptions pickle but do not unpickle: __init__ wants arguments that `args` does not hold.
        loads([bytes(frame) for frame in frames])
    except BaseException:
        return description, []
    return description, frames


def _repr(value: Any) -> str:
    """As Python writes it, which it does not for whole numbers of more than 4300 digits."""
    with UsersCode():
        return _clean(repr(value))
    return f"<{type(value).__qualname__}>"


def load_error(description: dict[str, str], frames: Sequence[Buffer], where: str) -> BaseException:
    """The exception of a rank as the parent raises it: the original type, with the remote traceback as a note (PEP 678); a
    RemoteError in place of one that cannot travel, or that would steer whoever raises it.

    Args:
        description: from `dump_error`.
        frames: from `dump_error`.
        where: the rank, host and item.
    """
    loaded: BaseException | None = None
    if frames:
        with contextlib.suppress(ResultNotPicklable):
            unpickled = loads(frames)
            loaded = unpickled if isinstance(unpickled, BaseException) else None
    note = printable(f"raised in {where}:\n{description['traceback'].rstrip()}")
    if loaded is not None and not _steers(loaded):
        with UsersCode():
            loaded.add_note(note)
            return loaded
        loaded = None
    error = _stand_in(description, loaded, where)
    error.add_note(note)
    return error


def another(error: BaseException) -> BaseException:
    """The same error for one more who raises it: traceback and notes, which grow with that, are its own."""
    with UsersCode():
        copied = copy.copy(error)
        if type(copied) is type(error):
            copied.__cause__, copied.__suppress_context__ = error.__cause__, error.__suppress_context__
            if notes := getattr(error, "__notes__", None):
                copied.__notes__ = list(notes)
            return copied.with_traceback(None)
    return _stand_in(_describe(error), error, "the parent")


def for_future(error: BaseException, where: str) -> BaseException:
    """An exception as a future may hold it: see `load_error`."""
    return _stand_in(_describe(error), error, where) if _steers(error) else error


def _stand_in(description: dict[str, str], cause: BaseException | None, where: str) -> RemoteError:
    name = description["type"].removeprefix("builtins.")
    error = RemoteError(f"{where} raised {name}: {description['message']}".removesuffix(": "), type_name=description["type"],
                        traceback_text=description["traceback"])
    error.__cause__ = cause
    return error


def _steers(error: BaseException) -> bool:
    """Whether an exception means something to the code that it passes through, beyond that something failed.

    A StopIteration would end the loop that takes results as if there were no more (PEP 479 has the same case for generators, and
    asyncio refuses to put one into a future); asyncio takes a concurrent.futures.CancelledError for its own; what is no Exception
    (KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, SystemExit) would look as if the parent itself were to stop.
    """
    return not isinstance(error, Exception) or isinstance(error, _STEERS)


_STEERS = (StopIteration, StopAsyncIteration, concurrent.futures.CancelledError)
