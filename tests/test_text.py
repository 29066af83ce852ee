"""Parts of messages."""

from __future__ import annotations

import pytest

from sfparallel.text import no_answer


@pytest.mark.parametrize(("ranks", "words"), [
    ([], ""), ([3], "; no answer from rank 3"), ([1, 3], "; no answer from ranks 1 and 3"),
    ([0, 1], "; no answer from ranks 0 and 1"), ([7, 0, 1, 2, 3], "; no answer from ranks 0 to 3 and 7"),
    ([0, 2, 4, 5, 6], "; no answer from ranks 0, 2 and 4 to 6"), (list(range(64)), "; no answer from ranks 0 to 63"),
])  # fmt: skip
def test_ranks_without_an_answer_are_named_briefly(ranks: list[int], words: str) -> None:
    assert no_answer(ranks) == words
