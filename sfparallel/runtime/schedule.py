"""Who works on what: hands out keys (ranks of a region, item indexes of a map) to ranks. A state machine without any I/O.

The first share of every rank is known before the fork, so each clone finds its own in memory and begins without a message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Schedule:
    """Keys that are waiting, and keys that each rank has in hand, oldest first.

    Args:
        first: first share of each rank.
        waiting: keys that are handed out later, in this order.
        chunk: keys per later share; None for shares that shrink as work runs out (guided self-scheduling: C. D. Polychronopoulos,
            D. J. Kuck, IEEE Trans. Computers C-36, 1987).
    """

    def __init__(self, first: list[list[int]], waiting: Iterable[int] = (), chunk: int | None = None) -> None:
        self._hands = [deque(share) for share in first]
        self._waiting = deque(waiting)
        self._chunk = chunk
        self._alive = set(range(len(first)))
        self._total = len(self._waiting) + sum(map(len, first))

    def __len__(self) -> int:
        """Number of keys, answered ones included."""
        return self._total

    @classmethod
    def one_each(cls, ranks: int) -> Schedule:
        """Rank k works on key k and on nothing else."""
        return cls([[rank] for rank in range(ranks)])

    @classmethod
    def dynamic(cls, items: int, ranks: int, chunk: int | None = None) -> Schedule:
        """Keys 0..items-1 on demand; ranks <= items, so that every rank has something to begin with."""
        schedule = cls([[] for _ in range(ranks)], range(items), chunk)
        for rank in range(ranks):
            # Not more than leaves one key for each rank still to come.
            schedule._deal(rank, min(schedule._share(), len(schedule._waiting) - (ranks - rank - 1)))
        return schedule

    @classmethod
    def stream(cls, chunk: int) -> Schedule:
        """Keys and ranks that come while the work goes on."""
        return cls([], (), chunk)

    def set_chunk(self, chunk: int) -> None:
        """From now on, ranks get so many keys at a time, but leave some for the others."""
        self._chunk = max(1, min(chunk, len(self._waiting) // (2 * max(1, len(self._alive)))))

    def take_back(self, rank: int, key: int) -> bool:
        """A key that `rank` returns undone is to be handed out again before all others; False if it did not have it."""
        if not self.answered(rank, key):
            return False
        self.put_back(key)
        return True

    def add(self, key: int) -> None:
        """One more key."""
        self._waiting.append(key)
        self._total += 1

    def put_back(self, key: int) -> None:
        """A key that was handed out, and is to be handed out again before all others."""
        self._waiting.appendleft(key)

    def join(self) -> int:
        """One more rank, with nothing in hand."""
        rank = len(self._hands)
        self._hands.append(deque())
        self._alive.add(rank)
        return rank

    def clear(self) -> list[int]:
        """Take away all that is waiting; returns it, the last first."""
        keys = list(reversed(self._waiting))
        self._waiting.clear()
        return keys

    @property
    def waiting(self) -> int:
        """Number of keys that nobody has in hand."""
        return len(self._waiting)

    def in_hand(self, rank: int) -> list[int]:
        """What `rank` was given and has not answered yet."""
        return list(self._hands[rank])

    def is_alive(self, rank: int) -> bool:
        return rank in self._alive

    def busy(self) -> list[int]:
        """Ranks that still owe an answer."""
        return [rank for rank, hand in enumerate(self._hands) if hand and rank in self._alive]

    def answered(self, rank: int, key: int) -> bool:
        """Take note of an answer; False for one that `rank` was not asked for (then it must be ignored)."""
        if rank not in self._alive or key not in self._hands[rank]:
            return False
        self._hands[rank].remove(key)
        return True

    def refill(self, rank: int) -> list[int]:
        """The next share for a rank that has just answered; empty while it has enough, or when nothing is left."""
        if rank not in self._alive or not self._waiting:
            return []
        hand, share = self._hands[rank], self._share()
        # One key ahead hides the round trip to the parent, but near the end it could wait behind a long one while others idle.
        if hand and (len(hand) > 1 or share == 1 or len(self._waiting) < 2 * len(self._alive)):
            return []
        return self._deal(rank, share)

    def lose(self, rank: int) -> int | None:
        """A rank died: the key it was working on is returned (None if it had none); the rest of its hand goes to others."""
        self._alive.discard(rank)
        hand = self._hands[rank]
        current = hand.popleft() if hand else None
        self._waiting.extendleft(reversed(hand))
        hand.clear()
        return current

    def abandon(self) -> list[int]:
        """Keys that nobody is left to work on."""
        if self._alive:
            return []
        keys = list(self._waiting)
        self._waiting.clear()
        return keys

    def idle(self) -> list[int]:
        """Living ranks with empty hands."""
        return [rank for rank in sorted(self._alive) if not self._hands[rank]]

    def _share(self) -> int:
        if self._chunk is not None:
            return self._chunk
        return max(1, len(self._waiting) // (4 * len(self._hands)))

    def _deal(self, rank: int, count: int) -> list[int]:
        share = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self._hands[rank].extend(share)
        return share
