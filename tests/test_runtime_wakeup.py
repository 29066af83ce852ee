"""Signals that do not interrupt the system call in which a region waits end the wait all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

import sfparallel as sf
from sfparallel import wire
from sfparallel.runtime.connection import Connection
from sfparallel.runtime.link import Kind, ParentLink
from sfparallel.runtime.lowlevel import Ticket
from sfparallel.runtime.spmd import World
from sfparallel.runtime.wakeup import SignalAlarm
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture

PATIENCE_S = 60


@contextmanager
def delivered_elsewhere(number: int, wait: Callable[[], object]) -> Iterator[None]:
    """Once `wait` returns, have a signal delivered to another thread: like one that comes just before the system call, it runs
    the C part of signal handling and does not interrupt the main thread's call."""
    done = threading.Event()

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        wait()
        os.kill(os.getpid(), number)
        done.wait()

    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


@contextmanager
def own_wakeup() -> Iterator[socket.socket]:
    """A program's own wakeup descriptor, as an event loop has one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        ours.settimeout(PATIENCE_S)
        before = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield ours
            assert signal.set_wakeup_fd(before) == theirs.fileno()
        finally:
            signal.set_wakeup_fd(before)


def test_ctrl_c_ends_a_gather(double: Doubles) -> None:
    here, there = os.pipe()

    @sf.parallel(n=1, timeout=PATIENCE_S)
    def work() -> None:
        os.write(there, b"at work")
        signal.pause()

    with own_wakeup() as wakeup, delivered_elsewhere(signal.SIGINT, lambda: os.read(here, 10)):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert wakeup.recv(10) == bytes([signal.SIGINT])
    os.close(here)
    os.close(there)


def test_ctrl_c_ends_a_join() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (ours, theirs, delivered_elsewhere(signal.SIGINT, lambda: theirs.recv(wire.MAX_MESSAGE_BYTES)),
          pytest.raises(KeyboardInterrupt)):
        Connection(ours).join(1, PATIENCE_S)


def test_an_alarm_gives_the_program_its_descriptor_back() -> None:
    with own_wakeup() as wakeup:
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        with SignalAlarm() as outer, SignalAlarm() as inner:
            signal.raise_signal(signal.SIGUSR1)
            for alarm in (inner, outer):
                alarm.reset()
            assert wakeup.recv(10) == bytes([signal.SIGUSR1])
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_leaves_the_descriptor_alone() -> None:
    def enter() -> None:
        with SignalAlarm() as alarm:
            alarm.reset()

    with own_wakeup():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()


class InterruptedSocket(zmq.Socket[bytes]):
    """Ctrl-C comes after the first frame of a message."""

    is_due = True

    def recv(self, *arguments: Any, **options: Any) -> Any:
        frame = super().recv(*arguments, **options)
        if self.is_due:
            self.is_due = False
            os.kill(os.getpid(), signal.SIGINT)
        return frame


def test_ctrl_c_between_two_frames_loses_no_message() -> None:
    """The rest of the message is no message of its own, and the rank that said it is done does not wait for ever."""
    here, there = socket.socketpair()
    link = ParentLink("127.0.0.1")
    link.expect(["127.0.0.1"])
    link.listen()
    link.dealer.connect(link.endpoint)
    link.dealer.send(wire.pack({"kind": Kind.DONE.value, "rank": 0, "status": 0}))
    world = World(1)
    hypervisor: Any = SimpleNamespace(events=list, fileno=here.fileno)
    world._ticket, world._link = Ticket(hypervisor, 1, 1), link
    with here, there, contextlib.closing(link), SignalAlarm() as signals, pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "router", InterruptedSocket.shadow(link.router.underlying))
        poller = zmq.Poller()
        poller.register(link.router, zmq.POLLIN)
        with pytest.raises(KeyboardInterrupt):
            world._step(signals, poller)
        assert world._done == {0: 0}
