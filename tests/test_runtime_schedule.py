"""Who works on what: every key is handed out, in hand with one living rank only, and answered once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfparallel.runtime.schedule import Schedule


@given(st.integers(1, 300), st.integers(1, 40), st.none() | st.integers(1, 50))
def test_every_rank_has_something_to_begin_with(items: int, ranks: int, chunk: int | None) -> None:
    ranks = min(items, ranks)
    schedule = Schedule.dynamic(items, ranks, chunk)
    first = [schedule.in_hand(rank) for rank in range(ranks)]
    assert all(first)
    assert [key for share in first for key in share] == list(range(sum(map(len, first))))


def test_rank_k_works_on_key_k() -> None:
    schedule = Schedule.one_each(3)
    assert [schedule.in_hand(rank) for rank in range(3)] == [[0], [1], [2]]
    assert schedule.answered(1, 1)
    assert not schedule.answered(1, 1)
    assert not schedule.answered(0, 2)
    assert schedule.refill(1) == []
    assert schedule.busy() == [0, 2]
    assert schedule.lose(2) == 2
    assert schedule.lose(1) is None


def test_single_items_are_not_queued_behind_long_ones() -> None:
    schedule = Schedule.dynamic(8, 4)
    assert [schedule.in_hand(rank) for rank in range(4)] == [[0], [1], [2], [3]]
    schedule.answered(2, 2)
    assert schedule.refill(2) == [4]
    assert schedule.refill(2) == []


def test_keys_and_ranks_that_come_later() -> None:
    schedule = Schedule.stream(2)
    first = schedule.join()
    for key in range(9):
        schedule.add(key)
    assert schedule.refill(first) == [0, 1]
    second = schedule.join()
    assert (schedule.refill(second), schedule.waiting) == ([2, 3], 5)
    assert schedule.take_back(first, 1) and not schedule.take_back(first, 1)
    assert schedule.lose(first) == 0
    schedule.put_back(0)
    schedule.set_chunk(100)
    assert schedule.answered(second, 2) and schedule.answered(second, 3)
    assert schedule.refill(second) == [0, 1, 4], "half of what is there"
    assert schedule.clear() == [8, 7, 6, 5]


class Playing(RuleBasedStateMachine):
    """Ranks answer, ask for more and die in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.ranks = 50, 5
        self.schedule = Schedule.dynamic(self.items, self.ranks)
        self.answered: list[int] = []
        self.failed: list[int] = []

    @rule(rank=st.integers(0, 4))
    def answer(self, rank: int) -> None:
        hand = self.schedule.in_hand(rank)
        if hand:
            assert self.schedule.answered(rank, hand[0])
            self.answered.append(hand[0])
            more = self.schedule.refill(rank)
            assert self.schedule.in_hand(rank) == hand[1:] + more

    @precondition(lambda self: len([r for r in range(5) if self.schedule.is_alive(r)]) > 1)
    @rule(rank=st.integers(0, 4))
    def die(self, rank: int) -> None:
        if not self.schedule.is_alive(rank):
            return
        key = self.schedule.lose(rank)
        if key is not None:
            self.failed.append(key)
        for idle in self.schedule.idle():
            self.schedule.refill(idle)

    @invariant()
    def every_key_is_in_one_place(self) -> None:
        hands = [key for rank in range(self.ranks) for key in self.schedule.in_hand(rank)]
        assert len(set(hands)) == len(hands)
        assert not set(hands) & set(self.answered + self.failed)

    def teardown(self) -> None:
        while busy := self.schedule.busy():
            self.answer(busy[0])
        assert sorted(self.answered + self.failed) == list(range(self.items))
        assert self.schedule.abandon() == []


TestPlaying = Playing.TestCase


def test_when_all_are_dead_what_is_left_is_known() -> None:
    schedule = Schedule.dynamic(20, 2)
    gone = [key for rank in (0, 1) if (key := schedule.lose(rank)) is not None]
    assert sorted([*gone, *schedule.abandon()]) == list(range(20))
