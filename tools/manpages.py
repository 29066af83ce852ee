#!/usr/bin/env python3
"""Writes the manual pages of sfrun and sf from their parsers: tools/manpages.py FOLDER."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import sfparallel
from sfparallel import cli
from sfparallel.config import SETTINGS

ABOUT = {"sfrun": "run a Python program in a VM whose clones are its workers",
         "sf": "guest images, diagnosis and jobs of sfparallel"}  # fmt: skip
ESCAPES = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti", "…": "\\[u2026]"})
"""Characters that groff would print as others (groff_char(7))."""


def roff(text: str) -> str:
    """Text as troff takes it. A full stop at the beginning of a line would make it a request."""
    return ("\\&" if text.startswith(".") else "") + text.translate(ESCAPES)


def told(text: str | None, what: str) -> str:
    if not text:
        raise SystemExit(f"manpages: {what} has no help=")
    return roff(text)


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        repeated = " " in parser.prog and "-h" in action.option_strings  # every command has it
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS or repeated:
            continue
        value = str(action.metavar or action.dest.upper()) if action.nargs != 0 else ""
        name = " ".join(filter(None, (", ".join(action.option_strings), value)))
        expanded = action.help and parser._get_formatter()._expand_help(action)
        yield from (".TP", f".B {roff(name)}", told(expanded, f"{parser.prog} {name}"))


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help for choice in action._choices_actions}
            for name, child in action.choices.items():
                yield from (f".SS {roff(child.prog)}", told(about.get(name), child.prog))
                yield from options(child)
                yield from commands(child)


def page(parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ").strip()
    lines = [f".TH {parser.prog.upper()} 1 \"\" \"sfparallel {sfparallel.__version__}\"", ".SH NAME",
             f"{parser.prog} \\- {ABOUT[parser.prog]}", ".SH SYNOPSIS"]  # fmt: skip
    for number, form in enumerate(usage.split("  |  ")):
        lines += [*([".br"] if number else []), roff(form)]
    lines += [".SH OPTIONS", *options(parser)]
    if below := list(commands(parser)):
        lines += [".SH COMMANDS", *below]
    lines.append(".SH ENVIRONMENT")
    for setting in SETTINGS:
        lines += [".TP", f".B {setting.variable}", told(setting.help, setting.variable)]
    other = "sf" if parser.prog == "sfrun" else "sfrun"
    return "\n".join([*lines, ".SH SEE ALSO", f".BR {other} (1)", ""])


def main(folder: Path) -> None:
    for parser in (cli._sfrun_parser(), cli._sf_parser()):
        (folder / f"{parser.prog}.1").write_text(page(parser), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
