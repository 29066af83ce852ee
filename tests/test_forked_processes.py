"""A process that a rank's function makes with `os.fork` has no answer for the region, however it comes back."""

from __future__ import annotations

import sys

import pytest

import sfparallel as sf
from tests.conftest import Sfrun
from tests.fork_double import Doubles, double_fixture  # noqa: F401

vms = pytest.mark.needs("qemu", "image", "root")
BOTH = [pytest.param((), id="vms", marks=vms), pytest.param(("--local",), id="local")]

PROGRAM = """
    import os, sys
    import sfparallel as sf

    def child_that(how):
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if how == "returns":
            return "the child's"
        if how == "exits":
            sys.exit(3)
        if how == "says why":
            sys.exit("because")
        raise ValueError("of the child")

    HOWS = ["returns", "exits", "raises", "says why"]
    EXPECTED = [0, 3, 1, 1]
    assert [sf.parallel(child_that, n=1)(how) for how in HOWS] == [[status] for status in EXPECTED]
    assert sf.parallel_map(child_that, HOWS, n=2) == EXPECTED
    assert list(sf.parallel_imap(child_that, HOWS, n=2)) == EXPECTED
    with sf.Executor(1, initializer=child_that, initargs=("returns",)) as executor:
        assert executor.submit(child_that, "exits").result() == 3
    print("done")
"""


@pytest.mark.parametrize("how", BOTH)
def test_every_call_takes_the_answer_of_the_rank(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(PROGRAM, *how).ok()
    assert ended.out.splitlines()[-1:] == ["done"]
    assert "of the child" in ended.err and "because" in ended.err


def test_a_clone_that_a_rank_makes_by_itself_is_not_the_rank_either(double: Doubles) -> None:
    def work() -> object:
        ticket = sf.request_ticket(2)
        rank = sf.clone(ticket)
        if rank == 1:
            return "the clone's"
        if rank == 2:
            sys.exit(4)
        return sf.join(ticket)

    assert sf.parallel(n=2)(work)() == [{1: 0, 2: 4}] * 2
