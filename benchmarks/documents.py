"""Documents that hold what benchmarks write, between two marks: no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def whole(value: float) -> str:
    """A number without decimals, its thousands apart."""
    return f"{value:,.0f}".replace(",", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table; all columns but the first `left` are aligned to the right."""
    lines = [list(head), [*["---"] * left, *("---:" for _ in head[left:])], *map(list, rows)]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def machine(described: Mapping[str, object]) -> str:
    """What `host.describe` has found, in a line without its end."""
    return (f"Machine: {described['cores']} cores ({described['processor']}), {described['memory_gib']} GiB, "
            f"Linux {described['kernel']}, QEMU {described['qemu']} with {str(described['accelerator']).upper()}, "
            f"Python {described['python']}")  # fmt: skip
