"""How all pictures look, and how they are saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "sfparallel",
    "figure.dpi": 100, "savefig.dpi": 150, "axes.axisbelow": True,
}  # fmt: skip


def save(figure: Figure, folder: Path, name: str, description: str) -> list[Path]:
    """Save a picture as SVG and PNG, the same bytes each time; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    figure.savefig(png, metadata={"Software": None})
    _describe(svg, figure, description)
    return [svg, png]


def source(figure: Figure, machine: Mapping[str, Any], runs: Iterable[Mapping[str, str]], marks: str) -> None:
    """Below a picture: the machine, and what was measured when.

    Args:
        machine: of `host.describe`.
        runs: of `host.revision`, for each part of the data.
        marks: what the marks are.
    """
    runs = list(runs)
    revisions, days = (", ".join(sorted({run[key] for run in runs})) for key in ("revision", "day"))
    figure.supxlabel(
        f"{machine['cores']} cores, {machine['memory_gib']:.0f} GiB, QEMU {machine['qemu'].split(' ')[0]} with "
        f"{machine['accelerator'].upper()}, Linux {machine['kernel']}; sfparallel {revisions}; {days}\n{marks}",
        fontsize=7.5, color="#555555",
    )  # fmt: skip


def _describe(svg: Path, figure: Figure, description: str) -> None:
    """A title and a description, which screen readers read out (SVG 1.1, 5.4)."""
    title = "; ".join(axes.get_title() for axes in figure.axes)
    words = f"\n <title>{escape(title)}</title>\n <desc>{escape(description)}</desc>"
    text = svg.read_text(encoding="utf-8")
    svg.write_text(re.sub(r"(<svg [^>]*>)", lambda match: match[1] + words, text, count=1), encoding="utf-8")
