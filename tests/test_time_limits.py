"""Time limits of any size, infinite ones too, are time limits: no clock and no wait goes over because of them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import sfparallel as sf
from sfparallel import MPI
from tests.fork_double import Doubles, double_fixture  # noqa: F401

# 30 days are more milliseconds than an int has.
LIMITS = [math.inf, 1e300, 10**400, 30 * 86400, Fraction(10**12, 3), np.float32(1e30)]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{type(limit).__name__}-{str(limit)[:6]}")
def test_calls_with_long_time_limits(double: Doubles, limit: float) -> None:
    assert sf.parallel(n=1, timeout=limit)(lambda: 3)() == [3]
    assert sf.parallel_map(abs, [-1, -2], n=1, timeout=limit) == [1, 2]
    assert list(sf.parallel_imap(abs, [-1, -2], n=1, timeout=limit)) == [1, 2]
    with sf.Executor(1, idle_timeout=limit) as executor:
        assert list(executor.map(abs, [-1, -2], timeout=limit)) == [1, 2]


@pytest.mark.parametrize("limit", [math.inf, 1e300, 30 * 86400], ids=str)
def test_messages_with_long_time_limits(double: Doubles, limit: float) -> None:
    def exchange() -> int:
        comm = MPI.COMM_WORLD
        if comm.rank == 0:
            # So long that the other one has asked the parent who has returned, and waits without an end to that.
            assert comm.recv(source=1, timeout=limit) == "begin"
            with pytest.raises(sf.RegionTimeout):
                comm.recv(source=1, tag=9, timeout=1.5)
            comm.send(5, dest=1, timeout=limit)
            return 5
        comm.send("begin", dest=0)
        return int(comm.recv(source=0, timeout=limit))

    assert sf.parallel(n=2)(exchange)() == [5, 5]


@pytest.mark.parametrize("bad", [0, -1, math.nan, True, "3", 1j])
def test_what_is_no_time_is_refused(bad: object) -> None:
    with pytest.raises(sf.UsageError, match="timeout="):
        sf.parallel(timeout=bad)  # type: ignore[call-overload]
