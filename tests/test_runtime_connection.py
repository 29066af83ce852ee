"""The client of the agent's socket, against a supervisor on a real SEQPACKET socket."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sfparallel as sf
from sfparallel import wire
from sfparallel.errors import GuestError, ProtocolError, VMError
from sfparallel.runtime.connection import Connection, connect
from sfparallel.runtime.hypervisor import Answer, Fork, Grant, Hello, Lost, Sibling

Reply = dict[str, Any]


class Supervisor:
    """Answers each request with what the test says; remembers the requests."""

    def __init__(self, path: Path) -> None:
        self.requests: list[Reply] = []
        self.answers: dict[str, Callable[[], list[Reply]]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            peer, _ = self._listener.accept()
            with peer:
                while data := peer.recv(wire.MAX_MESSAGE_BYTES):
                    request = wire.unpack(data)
                    self.requests.append(request)
                    for answer in self.answers[request["op"]]():
                        peer.send(wire.pack({"id": request.get("id"), **answer} if "event" not in answer else answer))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    path = tmp_path / "agent.sock"
    monkeypatch.setenv("SF_AGENT_SOCKET", str(path))
    supervisor = Supervisor(path)
    yield supervisor
    supervisor.close()


@pytest.fixture
def line(supervisor: Supervisor) -> Iterator[Connection]:
    connection = connect()
    yield connection
    connection.close()


def test_requests_and_replies(supervisor: Supervisor, line: Connection) -> None:
    supervisor.answers = {
        "hello": lambda: [{"role": "parent", "address": "10.83.0.1", "default_n": 8, "seed": None, "rank": 0, "labels": True}],
        "ticket": lambda: [{"ticket": 7, "granted": 2}],
        "clone": lambda: [{"rank": 0, "role": "parent",
                           "clones": [{"rank": k, "address": f"10.83.0.{k + 1}", "host": "a"} for k in (1, 2)]}],
        "join": lambda: [{"status": {1: 0, 2: 9}}],
        "kill": lambda: [{}],
        "stats": lambda: [],
    }
    assert line.hello() == Hello("parent", "10.83.0.1", default_n=8)
    assert line.request_ticket(4) == Grant(7, 2)
    assert line.clone(7, 2, b"f") == Fork(0, "", "", (Sibling(1, "10.83.0.2", "a"), Sibling(2, "10.83.0.3", "a")))
    assert line.join(7, None) == {1: 0, 2: 9}
    line.report(7, 0.5, 1.0)
    line.kill(7, [1])
    line.kill(7, None)
    assert [{k: v for k, v in request.items() if k != "id"} for request in supervisor.requests] == [
        {"op": "hello"}, {"op": "ticket", "n": 4}, {"op": "clone", "ticket": 7, "context": b"f"}, {"op": "join", "ticket": 7},
        {"op": "stats", "ticket": 7, "first_s": 0.5, "last_s": 1.0}, {"op": "kill", "ticket": 7, "ranks": [1]},
        {"op": "kill", "ticket": 7}]


def test_events_among_replies(supervisor: Supervisor, line: Connection) -> None:
    lost = {"event": "lost", "ticket": 1, "rank": 2, "cause": "panic", "host": "h", "console": "oops"}
    answer = {"event": "answer", "ticket": 1, "rank": 1, "data": b"x"}
    supervisor.answers = {"kill": lambda: [answer, lost, {"id": 10_000}, {"event": "from a later version"}, {}]}
    line.kill(1, None)
    assert line.events() == [Answer(1, 1, b"x"), Lost(1, 2, "panic", "h", "oops")]
    assert line.events() == []


def test_a_join_with_a_time_limit(supervisor: Supervisor, line: Connection) -> None:
    supervisor.answers = {"join": lambda: [], "kill": lambda: [{"id": 1, "status": {}}, {}]}
    assert line.join(1, 0.05) is None
    line.kill(1, None)  # the late reply to the join is passed over


@pytest.mark.parametrize(("kind", "error"), [("capacity", sf.CapacityError), ("state", sf.StateError), ("invalid", sf.UsageError),
                                             ("clone_failed", VMError), ("new", ProtocolError)])
def test_errors(supervisor: Supervisor, line: Connection, kind: str, error: type[Exception]) -> None:
    supervisor.answers = {"ticket": lambda: [{"error": kind, "message": "because", "hint": "do this", "fits": 3}]}
    with pytest.raises(error, match="because"):
        line.request_ticket(4)


def test_an_agent_that_hangs_up(supervisor: Supervisor, line: Connection) -> None:
    supervisor.answers = {}  # an unknown request: the thread ends with the KeyError and closes the socket

    def hang_up() -> list[Reply]:
        raise OSError("gone")

    supervisor.answers["hello"] = hang_up
    with pytest.raises(GuestError, match=r"closed the connection|broke"):
        line.hello()
