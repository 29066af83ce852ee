"""Progress of long host-side work on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class StageDisplay:
    """Shows the stages of a piece of work; call it with a stage's name and, where it is known, a percentage.

    Args:
        title: the piece of work.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""
        self._started = time.monotonic()
        self._live: Progress | None = None
        if sys.stderr.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._live = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(title, total=None)

    def __call__(self, stage: str, percent: float | None = None) -> None:
        if self._live:
            total = None if percent is None else 100.0
            self._live.update(self._task, description=f"{self._title}: {stage}", total=total, completed=percent or 0.0)
        elif stage != self._stage:
            print(f"{self._title}: {stage} ({time.monotonic() - self._started:.0f} s)", file=sys.stderr, flush=True)
        self._stage = stage

    def __enter__(self) -> StageDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
