"""The matching of messages and receives, without any socket: against a model, and by rule (`sfparallel.runtime.mpi.matching`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.runtime.mpi import matching
from sfparallel.runtime.mpi.constants import ANY_SOURCE, ANY_TAG
from sfparallel.runtime.mpi.errors import CODES, MPIException
from sfparallel.runtime.mpi.matching import DATA, HEADER, RTS, SYNC, Buffer, Engine, RecvOp, SendOp

CONTEXT = 8
LOST = MPIException(CODES["ERR_PROC_FAILED"])


class Net:
    """Engines, and what is under way between them: a queue for each direction of each pair."""

    def __init__(self, size: int) -> None:
        self.queues: dict[tuple[int, int], deque[tuple[bytes, bytes, SendOp | None]]] = {}
        self.engines = [Engine(rank, _Wire(self, rank)) for rank in range(size)]

    def deliver(self, source: int, dest: int) -> bool:
        """Let one message arrive; False if there is none."""
        queue = self.queues.get((source, dest))
        if not queue:
            return False
        header, payload, op = queue.popleft()
        if op is not None:
            op.on_the_way()
        kind, flags, _, tag, ctx, number, credit, nbytes = HEADER.unpack(header)
        engine = self.engines[dest]
        if kind == DATA:
            engine.landing(source, number, nbytes)[:] = payload
            engine.on_data(source, number)
        elif kind == RTS:
            engine.on_rts(source, flags, tag, ctx, number, credit, nbytes)
        else:
            engine.on_header(source, kind, flags, tag, ctx, number, credit, memoryview(payload))
        return True

    def settle(self) -> None:
        """Let everything arrive."""
        while any(self.deliver(*pair) for pair in list(self.queues)):
            pass


class _Wire:
    def __init__(self, net: Net, source: int) -> None:
        self.net, self.source = net, source

    def push(self, peer: int, header: bytes, frames: Sequence[Buffer], op: SendOp | None) -> None:
        self.net.queues.setdefault((self.source, peer), deque()).append((header, b"".join(frames), op))


def held_bytes(engine: Engine) -> int:
    """Payload that an engine holds for receives that are not there yet."""
    return sum(len(each.payload) for queue in engine._unexpected.values() for each in queue if each.payload is not None)


# Against a model


@dataclass
class Model:
    """What MPI says, in a few lines: one receiver, and messages in the order in which they become known to it."""

    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    messages: list[tuple[int, int, int]] = field(default_factory=list)
    result: dict[int, int] = field(default_factory=dict)

    def receive(self, index: int, source: int, tag: int) -> None:
        for place, (number, from_, its_tag) in enumerate(self.messages):
            if source in (from_, ANY_SOURCE) and tag in (its_tag, ANY_TAG):
                del self.messages[place]
                self.result[index] = number
                return
        self.waiting.append((index, source, tag))

    def arrive(self, number: int, from_: int, its_tag: int) -> None:
        for place, (index, source, tag) in enumerate(self.waiting):
            if source in (from_, ANY_SOURCE) and tag in (its_tag, ANY_TAG):
                del self.waiting[place]
                self.result[index] = number
                return
        self.messages.append((number, from_, its_tag))


_TAGS = st.integers(0, 2)
_SIZES = st.sampled_from([0, 10, 3000, matching.EAGER_BYTES + 1])
_SEND = st.tuples(st.just("send"), st.integers(1, 3), _TAGS, _SIZES, st.booleans())
_RECEIVE = st.tuples(st.just("receive"), st.sampled_from([ANY_SOURCE, 1, 2, 3]), st.sampled_from([ANY_TAG, 0, 1, 2]))
_DELIVER = st.tuples(st.just("deliver"), st.integers(1, 3))
_ANSWER = st.tuples(st.just("answer"), st.integers(1, 3))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(_SEND, _RECEIVE, _DELIVER, _DELIVER, _ANSWER), max_size=60))
def test_every_receive_gets_the_message_that_the_standard_says(steps: list[tuple[object, ...]]) -> None:
    net, model = Net(4), Model()
    receives: list[RecvOp] = []
    sent: list[tuple[SendOp, bytes]] = []
    for step in steps:
        match step:
            case ("send", int(source), int(tag), int(size), bool(sync)):
                payload = len(sent).to_bytes(4, "little") + bytes(size)
                flags = SYNC if sync else 0
                sent.append((net.engines[source].send(0, CONTEXT, tag, [payload], len(payload), flags), payload))
            case ("receive", int(source), int(tag)):
                model.receive(len(receives), source, tag)
                receives.append(net.engines[0].recv(CONTEXT, source, tag))
            case ("deliver", int(source)):
                _arrive(net, model, source)
            case ("answer", int(source)):
                net.deliver(0, source)
    while any(_arrive(net, model, source) or net.deliver(0, source) for source in (1, 2, 3)):
        pass
    for index, receive in enumerate(receives):
        assert receive.done == (index in model.result)
        if receive.done:
            number = model.result[index]
            assert bytes(receive.payload) == sent[number][1]
            assert sent[number][0].done
    # What is not received is complete only if it was small and nobody asked for more.
    for number, (send, payload) in enumerate(sent):
        if number not in model.result.values() and (send.flags & SYNC or len(payload) > matching.EAGER_BYTES):
            assert not send.done


def _arrive(net: Net, model: Model, source: int) -> bool:
    queue = net.queues.get((source, 0))
    if not queue:
        return False
    header, payload, _ = queue[0]
    kind, _, _, tag, _, _, _, _ = HEADER.unpack(header)
    if kind == matching.EAGER:
        model.arrive(int.from_bytes(payload[:4], "little"), source, tag)
    elif kind == RTS:
        send = net.engines[source]._announced[HEADER.unpack(header)[5]]
        model.arrive(int.from_bytes(bytes(send.frames[0])[:4], "little"), source, tag)
    return net.deliver(source, 0)


# By rule


def test_a_flood_is_held_where_it_comes_from() -> None:
    net = Net(2)
    sends = [net.engines[0].send(1, CONTEXT, 0, [bytes(10_000)], 10_000) for _ in range(1000)]
    net.settle()
    assert held_bytes(net.engines[1]) <= matching.WINDOW_BYTES
    assert sum(send.done for send in sends) < 200
    for _ in sends:
        receive = net.engines[1].recv(CONTEXT, 0, 0)
        net.settle()
        assert receive.done
        assert held_bytes(net.engines[1]) <= matching.WINDOW_BYTES
    assert all(send.done for send in sends)


def test_empty_messages_count_too() -> None:
    net = Net(2)
    sends = [net.engines[0].send(1, CONTEXT, 0, [], 0) for _ in range(100_000)]
    net.settle()
    assert sum(send.done for send in sends) <= matching.WINDOW_BYTES // matching.OVERHEAD_BYTES


def test_what_was_received_opens_the_window_again() -> None:
    net = Net(2)
    for _ in range(2000):
        send = net.engines[0].send(1, CONTEXT, 0, [bytes(1000)], 1000)
        net.settle()
        assert send.done
        assert net.engines[1].recv(CONTEXT, 0, 0).done
        net.settle()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_may_send_before_they_receive(size: int) -> None:
    net = Net(size)
    nbytes = 10 * matching.EAGER_BYTES
    sends = []
    for rank, engine in enumerate(net.engines):
        sends.append(engine.send((rank + 1) % size, CONTEXT, 0, [bytes([rank]) * nbytes], nbytes))
        engine.blocked_in_send += 1
        engine.pull()
    net.settle()
    assert all(send.done for send in sends)
    for rank, engine in enumerate(net.engines):
        engine.blocked_in_send -= 1
        receive = engine.recv(CONTEXT, ANY_SOURCE, ANY_TAG)
        assert receive.done and bytes(receive.payload[:1]) == bytes([(rank - 1) % size])


def test_taking_in_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "PULL_BYTES", 5 * matching.EAGER_BYTES)
    net = Net(2)
    nbytes = 2 * matching.EAGER_BYTES
    sends = [net.engines[0].send(1, CONTEXT, 0, [bytes(nbytes)], nbytes) for _ in range(10)]
    net.engines[1].blocked_in_send += 1
    net.settle()
    assert sum(send.done for send in sends) == 2
    for _ in range(10):
        receive = net.engines[1].recv(CONTEXT, 0, 0)
        net.settle()
        assert receive.done


def test_a_synchronous_send_waits_for_its_receive_even_if_it_was_taken_in() -> None:
    net = Net(2)
    nbytes = 2 * matching.EAGER_BYTES
    send = net.engines[0].send(1, CONTEXT, 0, [bytes(nbytes)], nbytes, SYNC)
    net.engines[1].blocked_in_send += 1
    net.settle()
    assert not send.done
    net.engines[1].recv(CONTEXT, 0, 0)
    net.settle()
    assert send.done


@pytest.mark.parametrize("nbytes", [100, 3 * matching.EAGER_BYTES])
def test_a_buffer_that_is_too_small(nbytes: int) -> None:
    net = Net(2)
    receive = net.engines[1].recv(CONTEXT, 0, 0, memoryview(bytearray(50)))
    net.engines[0].send(1, CONTEXT, 0, [bytes(nbytes)], nbytes)
    net.settle()
    assert receive.done and isinstance(receive.error, MPIException)
    assert receive.error.Get_error_class() == CODES["ERR_TRUNCATE"]


def test_a_message_goes_straight_into_its_buffer() -> None:
    net = Net(2)
    nbytes = 3 * matching.EAGER_BYTES
    memory = bytearray(nbytes + 10)
    receive = net.engines[1].recv(CONTEXT, 0, 0, memoryview(memory))
    net.engines[0].send(1, CONTEXT, 0, [b"x" * nbytes], nbytes)
    net.settle()
    assert receive.done and memory == b"x" * nbytes + bytes(10)


def test_a_receive_can_be_withdrawn_until_it_is_matched() -> None:
    net = Net(2)
    first, second = (net.engines[1].recv(CONTEXT, 0, 0) for _ in range(2))
    assert net.engines[1].cancel(first)
    net.engines[0].send(1, CONTEXT, 0, [b"x"], 1)
    net.settle()
    assert first.cancelled and second.done and second.payload == b"x"
    assert not net.engines[1].cancel(second)


def test_a_probed_message_that_was_taken_out_is_nobody_elses() -> None:
    net = Net(2)
    for payload in (b"a", b"b"):
        net.engines[0].send(1, CONTEXT, 0, [payload], 1)
    net.settle()
    engine = net.engines[1]
    arrival = engine.probe(CONTEXT, ANY_SOURCE, ANY_TAG)
    assert arrival is not None
    engine.extract(CONTEXT, arrival)
    assert engine.recv(CONTEXT, 0, 0).payload == b"b"
    assert engine.recv_extracted(CONTEXT, arrival).payload == b"a"


def test_a_loss_fails_what_depends_on_it_and_nothing_else() -> None:
    net = Net(3)
    engine, large = net.engines[0], 2 * matching.EAGER_BYTES
    everybody = frozenset({0, 1, 2})
    failing = [
        engine.recv(CONTEXT, 1, 0), engine.recv(CONTEXT, ANY_SOURCE, 5, members=everybody),
        engine.recv(CONTEXT + 1, 2, 0, members=everybody, collective=True), engine.send(1, CONTEXT, 0, [bytes(large)], large),
        engine.send(1, CONTEXT, 0, [b"x"], 1, SYNC),
    ]  # fmt: skip
    living = [engine.recv(CONTEXT, 2, 0), engine.recv(CONTEXT, ANY_SOURCE, 6, members=frozenset({0, 2})),
              engine.send(2, CONTEXT, 0, [bytes(large)], large)]  # fmt: skip
    net.engines[1].send(0, CONTEXT, 7, [b"last words"], 10)
    net.engines[1].send(0, CONTEXT, 8, [bytes(large)], large)
    net.settle()
    engine.on_lost(1, LOST)
    assert [op.error for op in failing] == [LOST] * len(failing)
    assert not any(op.done for op in living)
    assert engine.recv(CONTEXT, 1, 7).payload == b"last words"
    assert engine.recv(CONTEXT, 1, 8).error is LOST
    assert engine.send(1, CONTEXT, 0, [b"x"], 1).error is LOST


def test_who_left_in_peace_fails_only_those_who_wait_for_it_directly() -> None:
    net = Net(3)
    engine, everybody = net.engines[0], frozenset({0, 1, 2})
    direct = engine.recv(CONTEXT, 1, 0)
    others = [engine.recv(CONTEXT, ANY_SOURCE, 5, members=everybody),
              engine.recv(CONTEXT + 1, 2, 0, members=everybody, collective=True)]  # fmt: skip
    engine.on_left(1, LOST)
    assert direct.error is LOST
    assert not any(op.done for op in others)


def test_when_all_others_have_left_nothing_comes_from_any_source() -> None:
    net = Net(3)
    engine, everybody = net.engines[0], frozenset({0, 1, 2})
    net.engines[2].send(0, CONTEXT, 6, [b"last words"], 10)
    net.settle()
    waiting = engine.recv(CONTEXT, ANY_SOURCE, 5, members=everybody)
    engine.on_left(1, LOST)
    assert not waiting.done and engine.why_blocked(CONTEXT, ANY_SOURCE, everybody) is None
    engine.on_left(2, LOST)
    assert waiting.error is LOST
    assert engine.recv(CONTEXT, ANY_SOURCE, 6, members=everybody).payload == b"last words"
    assert engine.recv(CONTEXT, ANY_SOURCE, 6, members=everybody).error is LOST
    assert engine.why_blocked(CONTEXT, ANY_SOURCE, everybody) is LOST
    assert not engine.recv(CONTEXT + 2, ANY_SOURCE, 0, members=frozenset({0})).done, "other threads of this process may send"


def test_a_revoked_context_is_closed() -> None:
    net = Net(2)
    revoked = MPIException(CODES["ERR_REVOKED"])
    receive = net.engines[0].recv(CONTEXT, 1, 0)
    other = net.engines[0].recv(CONTEXT + 2, 1, 0)
    net.engines[0].revoke(CONTEXT, revoked)
    assert receive.error is revoked and not other.done
    assert net.engines[0].send(1, CONTEXT, 0, [b"x"], 1).error is not None
    net.engines[1].send(0, CONTEXT, 0, [b"x"], 1)
    net.settle()
    assert held_bytes(net.engines[0]) == 0


@given(st.lists(st.tuples(_TAGS, st.sampled_from([0, 5, matching.EAGER_BYTES + 1]), st.booleans()), max_size=20))
def test_messages_to_oneself(messages: list[tuple[int, int, bool]]) -> None:
    engine = Net(1).engines[0]
    for tag, size, first in messages:
        receive = engine.recv(CONTEXT, 0, tag) if first else None
        send = engine.send(0, CONTEXT, tag, [b"ab", bytes(size)], size + 2, SYNC)
        assert send.done == first
        receive = receive or engine.recv(CONTEXT, ANY_SOURCE, tag)
        assert send.done and receive.done and bytes(receive.payload) == b"ab" + bytes(size)


@pytest.mark.parametrize("taken_in", [False, True])
def test_revoking_ends_a_transfer_that_the_sender_has_given_up(taken_in: bool) -> None:
    net = Net(2)
    sender, receiver = net.engines
    send = sender.send(1, CONTEXT, 0, [bytes(200_000)], 200_000)
    receiver.blocked_in_send = int(taken_in)
    if taken_in:
        net.deliver(0, 1)
    receive = receiver.recv(CONTEXT, 0, 0)
    if not taken_in:
        net.deliver(0, 1)
    sender.revoke(CONTEXT, LOST)
    net.settle()
    assert send.error is LOST and not receive.done
    receiver.revoke(CONTEXT, LOST)
    assert receive.error is LOST


def test_an_urgent_message_does_not_wait_for_the_window() -> None:
    net = Net(2)
    sender = net.engines[0]
    while sender.send(1, CONTEXT, 0, [bytes(60_000)], 60_000).dest in sender._window and sender._window[1] > 60_000:
        net.settle()
    waiting, urgent = (sender.send(1, CONTEXT, 1, [bytes(60_000)], 60_000, urgent=each) for each in (False, True))
    net.settle()
    assert urgent.done and not waiting.done


def test_what_is_dropped_gives_its_window_back() -> None:
    net = Net(2)
    sender, receiver = net.engines
    for _ in range(100):
        sends = [sender.send(1, CONTEXT, 0, [bytes(50_000)], 50_000) for _ in range(9)]
        net.settle()
        assert all(send.done for send in sends), "not announced: there was room"
        receiver.retire(CONTEXT)
        net.settle()
    receiver.revoke(CONTEXT, LOST)
    for _ in range(100):
        assert sender.send(1, CONTEXT, 0, [bytes(50_000)], 50_000)
        net.settle()
    assert not sender._announced and held_bytes(receiver) == 0


def test_a_rank_that_is_behind_does_not_work_off_what_is_there_when_another_is_lost() -> None:
    net = Net(3)
    for _ in range(10):
        net.engines[1].send(0, CONTEXT, 0, [b"x"], 1, members=range(3), collective=True)
    net.settle()
    engine = net.engines[0]
    assert engine.recv(CONTEXT, 1, 0, members=range(3), collective=True).error is None
    engine.on_lost(2, LOST)
    assert engine.recv(CONTEXT, 1, 0, members=range(3), collective=True).error is LOST
    assert engine.recv(CONTEXT, 1, 0).error is None, "point to point, what has arrived is received"
