"""Documents that hold what benchmarks write, between two marks: no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end of figures -->"


def begin(module: str) -> str:
    """The first mark, for the benchmark that is run as `python -m MODULE`."""
    return f"<!-- figures: `python -m {module} --draw` writes what follows -->"


def fill(document: Path, module: str, text: str) -> None:
    """Put `text` (Markdown) between the marks of a document."""
    mark = begin(module)
    before, _, rest = document.read_text(encoding="utf-8").partition(mark)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{mark}\n\n{text}\n{END}{after}", encoding="utf-8")
