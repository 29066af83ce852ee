"""Text of others in messages of ours: what guests, files and arguments say may be shown to a terminal, but must not drive it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

# What a terminal obeys instead of showing it: C0 but for line break and tab, DEL, C1 (ECMA-48); marks, embeddings, overrides and
# isolates that change the direction of what follows (UAX #9, CVE-2021-42574); line and paragraph separators; lone surrogates.
_OBEYED = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_IN_A_LINE = re.compile(f"[\t\n]|{_OBEYED.pattern}")
_UNDECODED = range(0xDC80, 0xDD00)
"""What bytes that are no text become under "surrogateescape" (PEP 383)."""


def printable(text: str) -> str:
    """`text` with everything that a terminal would obey written as Python's escapes; line breaks and tabs stay."""
    return _OBEYED.sub(_escaped, text)


def in_one_line(text: str) -> str:
    """The same without line breaks and tabs: a name or a command as one cell of a table."""
    return _IN_A_LINE.sub(_escaped, text)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Which of the known words was probably meant."""
    # Late: most programs misspell nothing.
    from difflib import get_close_matches

    names = sorted(known)
    begun = [name for name in names if name.startswith(word)]
    return next(iter(begun or get_close_matches(word, names, 1)), None)


def shown(value: Any) -> str:
    """A value that others sent, for people: neither long nor deep."""
    if isinstance(value, bool | int | float | None):
        return repr(value)
    if isinstance(value, str):
        return repr(value[:40])
    return f"a {type(value).__name__}"


def no_answer(ranks: Sequence[int]) -> str:
    """The end of a message about a time limit: "; no answer from rank 3", "... from ranks 0 to 5 and 7"; empty without ranks."""
    if not ranks:
        return ""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], rank
        else:
            runs.append((rank, rank))
    names = [name for first, last in runs for name in ([f"{first} to {last}"] if last > first + 1 else sorted({first, last}))]
    listed = " and ".join(filter(None, (", ".join(map(str, names[:-1])), str(names[-1]))))
    return f"; no answer from rank{'s' * (len(ranks) > 1)} {listed}"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code in _UNDECODED:
        return f"\\x{code & 0xFF:02x}"
    return match[0].encode("unicode_escape").decode()
