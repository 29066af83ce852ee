"""Documents and pictures of the benchmarks are those of the committed data."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import documents, host
from benchmarks.comm import __main__ as comm
from benchmarks.comm import plots as comm_plots
from benchmarks.comm import tables as comm_tables
from benchmarks.fork import __main__ as fork
from benchmarks.fork import plots as fork_plots
from benchmarks.fork import tables as fork_tables
from benchmarks.fork.results import Results
from benchmarks.map import __main__ as maps
from benchmarks.map import plots as map_plots
from benchmarks.map import tables as map_tables
from benchmarks.start import __main__ as start
from benchmarks.start import plots as start_plots
from benchmarks.start import tables as start_tables

BENCHMARKS: list[tuple[Any, Any, Any, Any]] = [
    (fork, Results.read, fork_tables.text, fork_plots.draw),
    (comm, lambda path: json.loads(path.read_text()), comm_tables.text, comm_plots.draw),
    (maps, lambda path: json.loads(path.read_text()), map_tables.text, map_plots.draw),
    (start, lambda path: json.loads(path.read_text()), start_tables.text, start_plots.draw),
]
"""Its program, and how its data are read, told and drawn."""


@pytest.mark.parametrize(("program", "read", "text", "_"), BENCHMARKS)
def test_committed_documents_are_of_the_committed_data(program: Any, read: Any, text: Any, _: Any, tmp_path: Path) -> None:
    committed = program.DOCUMENT.read_text(encoding="utf-8")
    document = tmp_path / "document.md"
    document.write_text(committed, encoding="utf-8")
    documents.fill(document, program.__name__.removesuffix(".__main__"), text(read(program.DATA)))
    assert document.read_text(encoding="utf-8") == committed


def test_committed_pictures_are_of_the_committed_data(tmp_path: Path) -> None:
    for program, read, _, draw in BENCHMARKS:
        draw(read(program.DATA), tmp_path)
    pictures = host.ROOT / "docs" / "performance"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in pictures.iterdir()}
    # Coordinates depend on matplotlib's version; what is written in the pictures does not.
    for path in pictures.glob("*.svg"):
        assert _comments(path) == _comments(tmp_path / path.name)


def _comments(svg: Path) -> list[str]:
    """Texts of a picture: matplotlib draws them as shapes, and notes each in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))


@pytest.mark.parametrize("data", sorted((host.ROOT / "benchmarks" / "data").iterdir()), ids=lambda path: path.name)
def test_the_data_do_not_name_the_machine(data: Path) -> None:
    text = data.read_text(encoding="utf-8")
    assert os.uname().nodename not in re.findall(r"[\w.-]+", text)
    assert not re.search(r'"/|\\/|/(?:root|home|tmp|work)\b', text)
