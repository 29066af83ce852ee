"""Exceptions that steer whoever raises them come back from clones as errors, in every call: on real VMs, and with --local."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle

import pytest

import sfparallel as sf
from sfparallel.runtime.payload import dump_error, dumps, load_error, loads
from tests.conftest import Sfrun
from tests.fork_double import Doubles, double_fixture  # noqa: F401

vms = pytest.mark.needs("qemu", "image", "root")
BOTH = [pytest.param((), id="vms", marks=vms), pytest.param(("--local",), id="local")]

PROGRAM = """
    import asyncio, concurrent.futures, contextlib
    import sfparallel as sf

    STEERING = [StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt, asyncio.CancelledError,
                concurrent.futures.CancelledError]

    def item(i):
        if i >= 3:
            raise STEERING[i - 3](f"of item {i}")
        return i

    def first_match(i):
        return i if i != 3 else next(x for x in range(i) if x > 100)

    def told(error, *words):
        assert isinstance(error, sf.RemoteError) and isinstance(error, RuntimeError), repr(error)
        assert all(word in str(error) for word in words), str(error)
        return type(error.__cause__)

    def caught(call, *words):
        try:
            value = call()
        except Exception as error:
            return told(error, *words)
        raise AssertionError(f"no error, but {value!r}")

    def results(of):
        return [value if isinstance(value, int) else told(value) for value in of]

    # All four calls of the case: an item whose function has no match.
    assert caught(lambda: list(sf.parallel_imap(first_match, range(10), n=2)), "item 3", "rank") is StopIteration
    unordered = lambda: list(sf.parallel_imap(first_match, range(10), n=2, ordered=False, chunksize=1))
    assert caught(unordered, "item 3", "rank") is StopIteration
    assert caught(lambda: sf.parallel_map(first_match, range(10), n=2), "item 3", "rank") is StopIteration
    expected = [0, 1, 2, *STEERING]
    everything = range(len(expected))
    assert results(sf.parallel_map(item, everything, n=2, on_error="return")) == expected
    assert results(sf.parallel_imap(item, everything, n=2, on_error="return")) == expected
    try:
        sf.parallel_map(item, everything, n=2, on_error="gather")
    except sf.RankError as error:
        assert sorted(error.errors) == [3, 4, 5, 6, 7, 8] and results(error.errors.values()) == STEERING

    # A region, inside what would take the exception for its own: a generator, a context manager, map.
    def region():
        return sf.parallel(lambda: item(3 + sf.comm().rank), n=1)()

    def generator():
        yield region()

    @contextlib.contextmanager
    def manager():
        yield

    def managed():
        with manager():
            region()

    assert caught(region, "rank 0") is StopIteration
    assert caught(lambda: list(generator()), "rank 0") is StopIteration
    assert caught(lambda: list(map(lambda _: region(), range(3))), "rank 0") is StopIteration
    assert caught(managed, "rank 0") is StopIteration
    assert caught(sf.parallel(lambda: item(3), n=1).submit().result, "rank 0") is StopIteration

    with sf.Executor(2) as executor:
        assert caught(lambda: list(executor.map(first_match, range(10))), "rank") is StopIteration
        assert [caught(executor.submit(item, i).result, "rank") for i in range(3, 9)] == STEERING

        async def main():
            loop = asyncio.get_running_loop()
            tasks = [loop.run_in_executor(executor, item, i) for i in everything]
            # A StopIteration in its future would never wake the loop.
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 120)

        assert results(asyncio.run(main())) == expected
    print("told")
"""


@pytest.mark.parametrize("how", BOTH)
def test_every_call_tells_them_as_errors(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    assert sfrun(PROGRAM, *how).ok().out == "told\n"


class Stop(StopIteration):
    """A subclass, as libraries have them."""


@pytest.mark.parametrize("kind", [StopIteration, Stop, StopAsyncIteration, GeneratorExit, KeyboardInterrupt,
                                  asyncio.CancelledError, concurrent.futures.CancelledError])
def test_what_steers_is_the_cause_of_an_error(kind: type[BaseException]) -> None:
    error = load_error(*dump_error(kind("why"), 1), "item 3, rank 1")
    assert isinstance(error, sf.RemoteError) and isinstance(error, RuntimeError)
    assert str(error) == f"item 3, rank 1 raised {kind.__module__}.{kind.__qualname__}: why".replace("builtins.", "")
    assert type(error.__cause__) is kind and error.__cause__.args == ("why",)
    assert pickle.loads(pickle.dumps(error)).type_name == error.type_name


@pytest.mark.parametrize("kind", [ValueError, TimeoutError, LookupError, asyncio.InvalidStateError, sf.CapacityError])
def test_what_does_not_steer_keeps_its_type(kind: type[Exception]) -> None:
    fields = {"fits": 0} if kind is sf.CapacityError else {}
    assert type(load_error(*dump_error(kind("why", **fields), 1), "rank 1")) is kind


def test_a_merge_that_stops(double: Doubles) -> None:
    def merge(results: list[int]) -> int:
        return next(result for result in results if result > 1)

    future = sf.parallel(n=2, merge=merge)(lambda: 1).submit()
    with pytest.raises(sf.RemoteError, match="merge= raised StopIteration"):
        future.result()
    with pytest.raises(StopIteration):  # in the caller's own thread, as any function that it calls
        sf.parallel(n=2, merge=merge)(lambda: 1)()


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class MuteExit(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class MuteWhenPickled(Exception):
    def __reduce__(self) -> tuple[object, ...]:
        raise Mute


class ExitWhenPickled(Exception):
    def __reduce__(self) -> tuple[object, ...]:
        raise SystemExit(3)


class InterruptWhenPickled(Exception):
    def __reduce__(self) -> tuple[object, ...]:
        raise KeyboardInterrupt


class InterruptOnArrival(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.why = "it has a state"

    def __setstate__(self, state: object) -> None:
        raise KeyboardInterrupt


class MuteInterrupt(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class OddModule(Exception):
    pass


OddModule.__module__ = "\udc80"


class Notes(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise RuntimeError("no notes")


class NotesExit(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise SystemExit(3)


class Code:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def _raise_mute() -> None:
    raise Mute


class MuteOnArrival:
    def __reduce__(self) -> tuple[object, ...]:
        return _raise_mute, ()


UNTELLABLE = [Mute(), MuteExit(), MuteWhenPickled(), ExitWhenPickled(), InterruptWhenPickled(), InterruptOnArrival(),
              MuteInterrupt(), OddModule(), Notes(), NotesExit(), SystemExit(Code()), SystemExit(10**5000), ValueError(10**5000),
              SyntaxError("why", ("f.py", 1, "two", "text", 1, "three"))]


@pytest.mark.parametrize("error", UNTELLABLE, ids=lambda error: type(error).__name__)
def test_an_exception_that_cannot_be_told_still_arrives(error: BaseException) -> None:
    description, frames = dump_error(error, 1)
    assert description["type"].endswith(type(error).__qualname__)
    assert isinstance(load_error(description, frames, "rank 1"), Exception)


def test_a_pickle_that_raises_what_has_no_text_is_an_error_of_its_rank() -> None:
    with pytest.raises(sf.ResultNotPicklable, match="Mute without a readable message"):
        loads(dumps(MuteOnArrival()))
    description, _ = dump_error(ValueError("why"), 1)
    assert isinstance(load_error(description, dumps(MuteOnArrival()), "rank 1"), sf.RemoteError)


def test_such_a_rank_costs_the_others_nothing(double: Doubles) -> None:
    def work() -> int:
        if sf.comm().rank == 1:
            raise MuteWhenPickled
        return sf.comm().rank

    first, error, last = sf.parallel(n=3, on_error="return")(work)()
    assert (first, last) == (0, 2) and isinstance(error, sf.RemoteError) and "MuteWhenPickled" in str(error)

    def item(i: int) -> int:
        if i == 1:
            raise Mute
        return i

    with pytest.raises(sf.RankError, match="Mute"):
        list(sf.parallel_imap(item, range(3), n=1, on_error="gather"))


@pytest.mark.parametrize("kind", [ExitWhenPickled, InterruptWhenPickled, InterruptOnArrival, MuteInterrupt])
def test_exceptions_whose_methods_steer_cost_no_clone(double: Doubles, kind: type[Exception]) -> None:
    def item(i: int) -> int:
        if i < 4:
            raise kind
        return i

    # Two clones, neither of which would be replaced, and more such items than clones.
    values = list(sf.parallel_imap(item, range(6), n=2, on_error="return"))
    assert values[4:] == [4, 5]
    assert all(isinstance(error, sf.RemoteError | kind) for error in values[:4])


def test_an_exception_of_code_without_a_module_name() -> None:
    namespace: dict[str, object] = {"__name__": None}
    exec("def fail():\n    raise ValueError('why')", namespace)
    try:
        namespace["fail"]()  # type: ignore[operator]
    except ValueError as error:
        assert isinstance(load_error(*dump_error(error.with_traceback(error.__traceback__.tb_next), 1), "rank 1"), ValueError)  # type: ignore[union-attr]


def test_an_exit_without_a_code_has_none() -> None:
    error = load_error(*dump_error(SystemExit(), 1), "rank 1")
    assert isinstance(error, sf.RankExit) and error.code is None
