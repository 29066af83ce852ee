"""The data file: what was measured, sample by sample. Pictures and tables are drawn from it and from nothing else.

    {"format": 1, "machine": {…}, "parts": {NAME: {"scale", "measured", "runs": […], "points": [{"point": {…}, "samples": […]}]}}}

Times are milliseconds (…_ms), memory MiB (…_mib).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

FORMAT = 1
MB = 1e6
PAGE_BYTES = 4096

Point = Mapping[str, Any]
Sample = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Samples of one quantity at one point."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(min(values), statistics.median(values), max(values), len(values))


def pauses(samples: Sequence[Sample]) -> Spread:
    """Pauses of the parent, ms."""
    return Spread.of([sample["pause_ms"] for sample in samples])


def megabytes(samples: Sequence[Sample], pages: str = "dirty_pages") -> float:
    """What the forks found to be dirty, or stored (median, MB): what was written on purpose, and what Python and the kernel write
    anyway."""
    return Spread.of([sample["commit"][pages] * PAGE_BYTES / MB for sample in samples]).median


class Results:
    """All that was measured.

    Args:
        data: the content of a data file.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @classmethod
    def empty(cls, machine: Mapping[str, Any]) -> Self:
        return cls({"format": FORMAT, "machine": dict(machine), "parts": {}})

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Replace the file as a whole: an interrupted benchmark leaves the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(_readable(self.data), encoding="utf-8")
        os.replace(temporary, path)

    @property
    def machine(self) -> Mapping[str, Any]:
        machine: Mapping[str, Any] = self.data["machine"]
        return machine

    @property
    def parts(self) -> Mapping[str, Any]:
        parts: Mapping[str, Any] = self.data["parts"]
        return parts

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, part: str, scale: str, run: Mapping[str, Any], *, resume: bool) -> None:
        """Samples of a part follow. What there is of it is kept only if it was the same program, and is to be gone on with."""
        there = self.data["parts"].get(part)
        if not (resume and there and there["measured"] == run["measured"] and there["scale"] == scale):
            self.data["parts"][part] = there = {"scale": scale, "measured": run["measured"], "runs": [], "points": []}
        there["runs"].append(dict(run))

    def add(self, part: str, point: Point, sample: Sample) -> None:
        self._entry(part, point)["samples"].append(sample)

    def leave_out(self, part: str, point: Point, reason: str) -> None:
        """Say why a point has no samples, or no more of them."""
        self._entry(part, point)["left_out"] = reason

    def clear(self, part: str) -> None:
        """Forget a part's samples, not that it was begun."""
        self.data["parts"][part]["points"] = []

    def _entry(self, part: str, point: Point) -> dict[str, Any]:
        points: list[dict[str, Any]] = self.data["parts"][part]["points"]
        for entry in points:
            if entry["point"] == point:
                return entry
        points.append({"point": dict(point), "samples": []})
        return points[-1]

    # -- reading ---------------------------------------------------------------------------------------------------

    def count(self, part: str, point: Point) -> int:
        """Samples of a point; any number is enough where it was left out."""
        for entry in self.parts.get(part, {"points": []})["points"]:
            if entry["point"] == point:
                return 1 << 30 if "left_out" in entry else len(entry["samples"])
        return 0

    def points(self, part: str, **wanted: object) -> Iterator[tuple[Point, list[Sample]]]:
        """Measured points of a part in which these fields have these values, with their samples."""
        for entry in self.parts.get(part, {"points": []})["points"]:
            if entry["samples"] and all(entry["point"].get(key) == value for key, value in wanted.items()):
                yield entry["point"], entry["samples"]

    def left_out(self, part: str) -> Iterator[tuple[Point, str]]:
        for entry in self.parts.get(part, {"points": []})["points"]:
            if "left_out" in entry:
                yield entry["point"], entry["left_out"]

    def spreads(self, part: str, axis: str, *path: str, **wanted: object) -> list[tuple[float, Spread]]:
        """One quantity over one axis, in order: (value of the axis, spread of the samples).

        Args:
            path: keys that lead to the quantity in a sample; a list counts as many samples.
        """
        found = []
        for point, samples in self.points(part, **wanted):
            values: list[float] = []
            for sample in samples:
                value: Any = sample
                for key in path:
                    value = value[key]
                values += value if isinstance(value, list) else [value]
            found.append((float(point[axis]), Spread.of(values)))
        return sorted(found, key=lambda pair: pair[0])


def _readable(data: dict[str, Any]) -> str:
    """JSON with a line for each sample: small, and a change of one figure is a change of one line."""
    parts = []
    for name, part in data["parts"].items():
        points = []
        for entry in part["points"]:
            rest = {key: value for key, value in entry.items() if key != "samples"}
            samples = ",\n    ".join(json.dumps(sample, allow_nan=False) for sample in entry["samples"])
            points.append(f'   {json.dumps(rest)[:-1]}, "samples": [\n    {samples}\n   ]}}')
        head = json.dumps({key: value for key, value in part.items() if key != "points"}, ensure_ascii=False)
        body = ",\n".join(points)
        parts.append(f'  {json.dumps(name)}: {head[:-1]}, "points": [\n{body}\n  ]}}')
    head = json.dumps({key: value for key, value in data.items() if key != "parts"}, indent=1, ensure_ascii=False)
    body = ",\n".join(parts)
    return f'{head[:-2]},\n "parts": {{\n{body}\n }}\n}}\n'
