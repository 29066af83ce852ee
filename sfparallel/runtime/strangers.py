"""What comes to a port of ours from nobody who belongs there: dropped, with a few warnings, and never an error of the program."""

from __future__ import annotations

import contextlib
import warnings

MOST_WARNINGS = 3


class Strangers:
    """Tells of the first few.

    Args:
        what: is dropped, at which port.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self.count = 0

    def note(self, why: str) -> None:
        """One more was dropped."""
        self.count += 1
        if self.count > MOST_WARNINGS:
            return
        last = "; further ones are dropped silently" if self.count == MOST_WARNINGS else ""
        # Where warnings are errors (-W error), a stranger must not be able to raise one in the middle of the program's work.
        with contextlib.suppress(RuntimeWarning):
            warnings.warn(f"{self._what} dropped: {why}{last}", RuntimeWarning, stacklevel=3)
