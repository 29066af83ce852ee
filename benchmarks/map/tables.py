"""The table of docs/performance-maps.md, from the data file."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import documents


def text(data: dict[str, Any]) -> str:
    """The table, as Markdown: medians, in microseconds per task."""
    specification, rows = data["specification"], data["results"]
    cases = list(dict.fromkeys((row["task"], row["chunksize"]) for row in rows))
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    found = {(row["pool"], row["task"], row["chunksize"]): documents.whole(statistics.median(row["us_per_task"])) for row in rows}
    lines = [[pool, *(found.get((pool, *case), "-") for case in cases)] for pool in pools]
    return "\n".join([
        f"{documents.machine(data['machine'])}; {data['day']}, revision `{data['revision']}`. "
        f"{specification['workers']} workers, {specification['items']} tasks, "
        f"median of {specification['repeat']} maps, in microseconds per task.", "",
        "![Microseconds per task, for each pool, kind of task and chunksize](performance/map.svg)", "",
        *documents.table(["pool", *(f"{task}, chunksize {chunksize}" for task, chunksize in cases)], lines),
    ])  # fmt: skip
