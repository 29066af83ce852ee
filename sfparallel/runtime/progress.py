"""Progress of a region, drawn on stderr: a bar where stderr is a terminal and rich is installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from sfparallel.config import PROGRESS
from sfparallel.runtime.here import in_clone

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_EVERY_S = 1.0


class Progress:
    """k of n.

    Args:
        label: what progresses.
        total: n; None if nobody knows.
        shown: None for what the environment says.
    """

    def __init__(self, label: str, total: int | None, shown: bool | None) -> None:
        self._label = label.rpartition(".")[2]  # of a function within another one, its own name
        self._total = total
        self._done = 0
        self._last = time.monotonic()
        self._shown = PROGRESS.get() == "1" if shown is None else shown
        self._bar = self._open_bar() if self._shown else None

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
            self._bar.refresh()
        elif self._done == self._total or time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            of = "" if self._total is None else f"/{self._total}"
            print(f"{self._label}: {self._done}{of}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _open_bar(self) -> RichProgress | None:
        # A clone's lines get its rank in front: nothing that is drawn over would do there.
        if not sys.stderr.isatty() or in_clone():
            return None
        try:
            # Not in the guest image unless the user puts it there.
            from rich.console import Console
            from rich.progress import MofNCompleteColumn
            from rich.progress import Progress as RichProgress
        except ImportError:
            return None
        columns = (*RichProgress.get_default_columns(), MofNCompleteColumn())
        # No thread that draws: it would go on in the clones of a fork that happens meanwhile. And what the program prints to
        # stdout must stay there.
        bar = RichProgress(*columns, console=Console(stderr=True, force_terminal=True), transient=True, auto_refresh=False,
                           redirect_stdout=False, redirect_stderr=False)
        bar.add_task(self._label, total=self._total)
        bar.start()
        return bar
