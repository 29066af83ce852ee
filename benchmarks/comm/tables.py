"""The tables of docs/performance-messages.md, from the data file, between two marks in the document: none is typed by hand."""

from __future__ import annotations

from typing import Any

from benchmarks import documents

Row = dict[str, Any]
Pair = tuple[Row, Row | None]


def pairs(result: dict[str, Any]) -> list[Pair]:
    """Rows of both libraries, for one number of clones; None for each row of MPICH if it did not finish."""
    theirs = result["mpich"] or [None] * len(result["sfparallel"])
    return list(zip(result["sfparallel"], theirs, strict=True))


def text(data: dict[str, Any]) -> str:
    """All tables, as Markdown. Medians, in microseconds."""
    library = next(result["library"] for result in data["results"] if result["library"]).splitlines()[0].strip()
    rows = [pair for result in data["results"] for pair in pairs(result)]
    days, revisions = (", ".join(sorted({result[key] for result in data["results"]})) for key in ("day", "revision"))
    lines = [f"{documents.machine(data['machine'])}; {days}, revision `{revisions}`. The other library: mpi4py on {library}.", ""]
    lines += ["![Time and bandwidth of messages between two clones, by their size](performance/messages.svg)", "",
              "![Collective calls, by the number of clones](performance/collectives.svg)", "",
              "Between two clones, one way, in microseconds:", ""]  # fmt: skip
    lines += _table([pair for pair in rows if pair[0]["call"].lower().startswith("send")], "bytes", "bytes")
    lines += ["Collective calls, until the last rank is done, in microseconds:", ""]
    lines += _table([pair for pair in rows if not pair[0]["call"].lower().startswith("send")], "n", "clones")
    for result in data["results"]:
        if not result["mpich"]:
            lines += [f"With {result['n']} clones, MPICH did not finish within {result['mpich_limit_s']} s.", ""]
    return "\n".join(lines)


def _table(pairs: list[Pair], column: str, name: str) -> list[str]:
    columns = sorted({ours[column] for ours, _ in pairs})
    rows: dict[str, dict[int, Pair]] = {}
    for ours, theirs in pairs:
        call = str(ours["call"])
        if column == "n" and ours["bytes"] > 8:
            call += f", {ours['bytes']} bytes"
        rows.setdefault(call, {})[ours[column]] = (ours, theirs)
    lines = [[call if library == "sfparallel" else "", library,
              *(_cell(cells[each][place]) if each in cells else "-" for each in columns)]
             for call, cells in rows.items() for place, library in enumerate(("sfparallel", "MPICH"))]  # fmt: skip
    return documents.table(["call", "", *(f"{each} {name}" for each in columns)], lines, left=2)


def _cell(row: Row | None) -> str:
    return "not finished" if row is None else documents.whole(row["median_us"])
