"""The low-level calls on the double. Their clones go on with the caller's program, so each test's clones end with sf.exit."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

import sfparallel as sf
from sfparallel.runtime.connection import Connection
from sfparallel.runtime.here import HERE
from sfparallel.runtime.hypervisor import Fork
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def test_ticket_clone_exit_join(double: Doubles) -> None:
    double.capacity = 3
    ticket = sf.request_ticket(5)
    assert ticket.granted == 3
    me = sf.clone(ticket)
    if me:
        sf.exit(10 + me)
    assert sf.join(ticket) == {1: 11, 2: 12, 3: 13}
    with pytest.raises(sf.Closed):
        sf.join(ticket)
    with pytest.raises(sf.Closed):
        sf.clone(ticket)


def test_kill(double: Doubles) -> None:
    ticket = sf.request_ticket(2)
    if sf.clone(ticket):
        signal.pause()
        sf.exit(1)
    assert double.alive == 2
    sf.kill(ticket)
    assert double.alive == 0
    unused = sf.request_ticket(1)
    sf.kill(unused)
    assert len(double.lines) == 1


def test_states(double: Doubles) -> None:
    with pytest.raises(sf.StateError, match="this is the parent"):
        sf.exit()
    for bad in (0, -1, 1.5, None):
        with pytest.raises(sf.UsageError):
            sf.request_ticket(bad)  # type: ignore[arg-type]
    ticket = sf.request_ticket(1)
    with pytest.raises(sf.StateError, match="needs one that is cloned"):
        sf.join(ticket)
    sf.kill(ticket)
    double.capacity = 0
    HERE._idle.clear()
    with pytest.raises(sf.CapacityError):
        sf.request_ticket(1)


def test_what_a_clone_may_not_do(double: Doubles) -> None:
    ticket = sf.request_ticket(1)
    if sf.clone(ticket):
        # Assertions of a clone are seen by its status only.
        right = 0
        for call in (lambda: sf.join(ticket), lambda: sf.kill(ticket), sf.comm):
            try:
                call()
            except sf.StateError:
                right += 1
        sf.exit(right + 10 * sf.in_clone())
    assert sf.join(ticket) == {1: 13}


def test_clones_have_numbers_of_their_own(double: Doubles) -> None:
    reader, writer = os.pipe()
    sf.rng()
    ticket = sf.request_ticket(2)
    if sf.clone(ticket):
        os.write(writer, f"{sf.rng().random()}\n".encode())
        sf.exit()
    sf.join(ticket)
    os.close(writer)
    with open(reader) as file:
        assert len({*file.read().split(), str(sf.rng().random())}) == 3


def test_unflushed_output_is_printed_once(double: Doubles, capfd: pytest.CaptureFixture[str]) -> None:
    print("before", end=" ")
    ticket = sf.request_ticket(2)
    me = sf.clone(ticket)
    if me:
        print(f"clone{me} ", end="")  # one piece: pytest does not buffer what is printed
        sf.exit()
    sf.join(ticket)
    assert sorted(capfd.readouterr().out.split()) == ["before", "clone1", "clone2"]


def test_clones_of_clones(double: Doubles) -> None:
    ticket = sf.request_ticket(1)
    if sf.clone(ticket):
        inner = sf.request_ticket(2)
        me = sf.clone(inner)
        if me:
            sf.exit(me)
        sf.exit(sum(sf.join(inner).values()))
    assert sf.join(ticket) == {1: 3}


def test_threads_that_began_while_the_fork_was_under_way_came_along(double: Doubles) -> None:
    """In a clone they must not go on to fork it. (A fork waits for QEMU, while the program begins others in the parent.)"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    go_on, found = threading.Event(), []

    def look() -> None:
        go_on.wait()
        found.append(HERE.came_along)

    number = HERE.about_to_fork()
    threads = [threading.Thread(target=look)]
    threads[0].start()
    HERE.became_clone(Fork(1, "", "", ()), Connection(ours), number)
    threads.append(threading.Thread(target=look))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True] and not HERE.came_along
    ours.close()
    theirs.close()
