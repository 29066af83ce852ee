"""`sfrun --trace`: every phase of every fork in Chrome's trace event format, which Perfetto and chrome://tracing open.

The format is the "JSON Array Format" of Google's document "Trace Event Format" (2016), in which the closing bracket may be
missing: what a killed job has written can be looked at too. Each VM is a process there, with one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm.record import PARENT, SUPERVISOR, ForkReport, Phase, Span

_THREAD = 1
_MIB = 1 << 20
_INSTANTS = frozenset({Phase.TAKEN, Phase.ANSWER, Phase.FIRST_ANSWER, Phase.LAST_ANSWER})


class Tracks:
    """Numbers for the processes of a trace: the supervisor, the parent, then VMs as they come.

    Args:
        origin: moment of the monotonic clock that is time 0 of the trace.
    """

    def __init__(self, origin: float) -> None:
        self._origin = origin
        self._numbers: dict[str, int] = {}

    def events(self, report: ForkReport) -> Iterator[dict[str, Any]]:
        """All events of one fork; tracks that are new are introduced first."""
        for name in (SUPERVISOR, PARENT, report.parent, *(span.vm for span in report.spans)):
            if name not in self._numbers:
                yield from self._introduce(name)
        yield from self._whole(report)
        for span in sorted(report.spans, key=lambda span: span.begin):
            yield self._event(report, span)
            yield from self._counters(span)

    def _introduce(self, name: str) -> Iterator[dict[str, Any]]:
        number = self._numbers[name] = len(self._numbers) + 1
        for kind, value in (("process_name", {"name": name}), ("process_sort_index", {"sort_index": number}),
                            ("thread_name", {"name": "phases"})):  # fmt: skip
            yield {"name": kind, "ph": "M", "pid": number, "tid": _THREAD, "args": value}

    def _time(self, seconds: float) -> float:
        return round((seconds - self._origin) * 1e6, 3)

    def _whole(self, report: ForkReport) -> Iterator[dict[str, Any]]:
        """The fork as a whole: asynchronous, since forks of several threads of a program overlap."""
        common = {"name": f"fork {report.number}, n={report.n}" if report.n else f"checkpoint {report.number}", "cat": "fork",
                  "id": report.number, "pid": self._numbers[report.parent], "tid": _THREAD}  # fmt: skip
        end = max((span.end for span in report.spans), default=report.started)
        yield {**common, "ph": "b", "ts": self._time(report.started)}
        yield {**common, "ph": "e", "ts": self._time(end)}

    def _event(self, report: ForkReport, span: Span) -> dict[str, Any]:
        event: dict[str, Any] = {
            "name": span.phase.value, "cat": "phase", "pid": self._numbers[span.vm], "tid": _THREAD,
            "ts": self._time(span.begin), "args": {"fork": report.number, **span.values},
        }  # fmt: skip
        if span.phase in _INSTANTS:
            return {**event, "ph": "i", "s": "t"}
        return {**event, "ph": "X", "dur": round(span.seconds * 1e6, 3)}

    def _counters(self, span: Span) -> Iterator[dict[str, Any]]:
        track = {"ph": "C", "pid": self._numbers[span.vm], "ts": self._time(span.end)}
        if span.phase is Phase.COMMIT and "stored_pages" in span.values:
            yield {**track, "name": "pages committed", "args": {"pages": span.values["stored_pages"]}}
        if "private_bytes" in span.values:
            yield {**track, "name": "private MiB", "args": {"MiB": round(span.values["private_bytes"] / _MIB, 2)}}


class TraceFile:
    """A trace that is written as forks end.

    Args:
        path: the file; an older one is replaced.
        origin: see `Tracks`.
        say: told once when the file cannot be written any more; the job goes on.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """

    def __init__(self, path: Path, origin: float, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._tracks = Tracks(origin)
        self._empty = True
        try:
            self._file: BinaryIO | None = open(path, "wb", buffering=0)  # noqa: SIM115 (close() closes it)
        except OSError as error:
            hint = "name a file in a writable folder"
            raise EnvironmentProblem(f"--trace {path}: {error.strerror}", hint=hint) from error

    def add(self, report: ForkReport) -> None:
        """Write the events of a fork that has ended."""
        lines = [json.dumps(event, allow_nan=False) for event in self._tracks.events(report)]
        self._write(("[\n" if self._empty else ",\n") + ",\n".join(lines))
        self._empty = False

    def close(self) -> None:
        """Write the end; the file is whole then."""
        self._write("[]\n" if self._empty else "\n]\n")
        if self._file:
            self._file.close()

    def _write(self, text: str) -> None:
        if not self._file:
            return
        data = memoryview(text.encode())
        try:
            while data:
                data = data[self._file.write(data):]
        except OSError as error:
            self._say(f"sfrun: --trace {self._path}: {error.strerror}; the trace ends here")
            self._file.close()
            self._file = None
