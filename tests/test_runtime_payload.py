"""Results and exceptions on their way from a rank to the parent: what goes in comes out."""

from __future__ import annotations

import collections
import math
import os
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.errors import CloneLost, RankExit, RemoteError, ResultNotPicklable
from sfparallel.runtime.payload import IN_BAND_BYTES, dump_error, dumps, load_error, loads

Point = collections.namedtuple("Point", "x y")

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=200)
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
                      max_leaves=30)


class NeedsTwo(Exception):
    """Pickles, but does not unpickle: a classic."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text today")


class RefusesToLoad:
    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("not here")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


def travel(value: Any) -> Any:
    """As over the wire: each frame arrives in memory of its own."""
    return loads([bytearray(frame) for frame in dumps(value)])


@given(values)
def test_values_arrive(value: Any) -> None:
    assert travel(value) == value


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["f8", "f4", "i8", "u1", "c16", "?"]), st.integers(0, 40_000), st.booleans()),
                max_size=4))
def test_arrays_arrive_bit_exact_and_writable(shapes: list[tuple[str, int, bool]]) -> None:
    generator = np.random.default_rng(0)
    arrays = [np.asarray(generator.integers(0, 255, size * np.dtype(kind).itemsize, dtype=np.uint8).view(kind),
                         order="F" if fortran else "C") for kind, size, fortran in shapes]
    frames = dumps({"arrays": arrays, "again": arrays})
    assert len(frames) == 1 + sum(array.nbytes >= IN_BAND_BYTES for array in arrays)
    arrived = loads([bytearray(frame) for frame in frames])
    for sent, received, again in zip(arrays, arrived["arrays"], arrived["again"], strict=True):
        assert received.tobytes() == sent.tobytes()
        assert received.dtype == sent.dtype
        assert received.flags.writeable
        assert received is again


def test_large_buffers_are_not_copied() -> None:
    array = np.zeros(1_000_000)
    _, buffer = dumps([array])
    assert np.shares_memory(np.frombuffer(buffer), array)
    received = bytearray(buffer)
    assert np.shares_memory(loads([dumps([array])[0], received])[0], np.frombuffer(received))


def test_read_only_frames_are_copied_once() -> None:
    frames = [bytes(frame) for frame in dumps(np.arange(100_000.0))]
    array = loads(frames)
    array[0] = 5
    assert array[0] == 5


def test_shapes_orders_and_views() -> None:
    matrix = np.asfortranarray(np.arange(40_000.0).reshape(200, 200))
    for array in (matrix, matrix[::3, ::2], matrix.T, np.array(3.5), np.array([[1, "a"], [None, {}]], dtype=object)):
        received = travel(array)
        assert received.shape == array.shape
        assert (received == array).all()


def test_classes_of_the_program_keep_their_identity() -> None:
    assert travel(Point(1, 2)) == Point(1, 2)
    assert type(travel(Point(1, 2))) is Point


def test_cloudpickle_is_the_fallback() -> None:
    factor = 3
    assert travel(lambda x: x * factor)(14) == 42


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises(ResultNotPicklable, match=r"result of rank 7, a generator, cannot be sent.*\n.*hint"):
        dumps((x for x in range(3)), "rank 7")
    for mode in ("r", "rb", "w", "a+"):
        with open(os.devnull, mode) as file, pytest.raises(ResultNotPicklable, match=r"of rank 7, a list, cannot.*\n.*collect="):
            dumps([1, file], "rank 7")
    with pytest.raises(ResultNotPicklable, match="not here"):
        travel(RefusesToLoad())
    assert pickle.loads(pickle.dumps(ResultNotPicklable("x", hint="y"))).hint == "y"


def test_a_standard_stream_arrives_as_that_of_the_parent(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        assert travel([sys.stdout, lambda: 1])[0] is sys.stdout


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_exceptions_keep_type_and_carry_the_remote_traceback() -> None:
    error = load_error(*dump_error(raised(KeyError("a", 3)), 3), "rank 3")
    assert type(error) is KeyError
    assert error.args == ("a", 3)
    (note,) = error.__notes__
    assert note.startswith("raised in rank 3:\nTraceback")
    assert "in raised" in note


def test_notes_and_attributes_of_exceptions_survive() -> None:
    lost = CloneLost("gone", rank=2, cause="panic")
    lost.add_note("mine")
    error = load_error(*dump_error(raised(lost), 2), "rank 2")
    assert isinstance(error, CloneLost)
    assert (error.rank, error.cause, error.__notes__[0]) == (2, "panic", "mine")


@pytest.mark.parametrize("error", [
    pytest.param(NeedsTwo(1, 2), id="does-not-unpickle"),
    pytest.param(ValueError(_ for _ in range(3)), id="holds-a-generator"),
    pytest.param(KeyboardInterrupt(), id="not-an-exception"),
    pytest.param(Unprintable(), id="unprintable"),
    pytest.param(ValueError("\udcff"), id="surrogate"),
])
def test_other_exceptions_arrive_as_text(error: BaseException) -> None:
    description, frames = dump_error(raised(error), 1)
    arrived = load_error(description, frames, "rank 1")
    if isinstance(arrived, RemoteError):
        assert arrived.type_name.endswith(type(error).__qualname__)
        assert "Traceback" in arrived.traceback_text
    else:
        assert type(arrived) is type(error)
    assert isinstance(arrived, Exception)


def test_sys_exit_is_an_error_of_the_rank() -> None:
    error = load_error(*dump_error(raised(SystemExit(2)), 3), "rank 3")
    assert isinstance(error, RankExit)
    assert (error.rank, error.code) == (3, 2)
    assert str(error) == "rank 3 called sys.exit(2) instead of returning"


def test_nan_payloads_are_kept() -> None:
    assert math.isnan(travel(float("nan")))
