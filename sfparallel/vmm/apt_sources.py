"""The host's own apt sources, reduced to Debian's for one suite: guest images come from where this host gets its packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfparallel.errors import EnvironmentProblem

_COMPONENTS = frozenset({"main", "contrib", "non-free", "non-free-firmware"})
_OPTIONS = ("Signed-By", "Trusted", "Check-Valid-Until")
_POCKETS = ("", "-updates", "-security", "-backports", "/updates")


@dataclass(frozen=True)
class Source:
    """One source, as sources.list(5) describes them.

    Attributes:
        options: further fields, in deb822's spelling ("Signed-By").
    """

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def deb822(self) -> str:
        lines = ["Types: deb", f"URIs: {' '.join(self.uris)}", f"Suites: {' '.join(self.suites)}"]
        lines.append(f"Components: {' '.join(self.components)}")
        for key, value in self.options:
            lines.append(f"{key}: {value}")
        return "\n".join(lines) + "\n"


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Stanzas of a deb822 file: fields, continued by lines that begin with a blank; comments are whole lines."""
    fields: dict[str, str] = {}
    key = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, key = {}, ""
        elif line[0] in " \t":
            if key:
                fields[key] += "\n" + line
        else:
            name, _, value = line.partition(":")
            key = name.strip().lower()
            fields[key] = value.strip()


def parse_deb822(text: str) -> list[Source]:
    """Sources of a `.sources` file; disabled ones and those of source code are left out."""
    sources = []
    for fields in _stanzas(text):
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        options = tuple((name, fields[name.lower()]) for name in _OPTIONS if name.lower() in fields)
        sources.append(Source(tuple(fields.get("uris", "").split()), tuple(fields.get("suites", "").split()),
                              tuple(fields.get("components", "").split()), options))  # fmt: skip
    return sources


def parse_one_line(text: str) -> list[Source]:
    """Sources of a `.list` file: `deb [option=value ...] uri suite component ...`."""
    spelling = {name.lower(): name for name in _OPTIONS}
    sources = []
    for line in text.splitlines():
        found = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if not found:
            continue
        pairs = (word.partition("=") for word in (found[1] or "").split())
        options = tuple((spelling[key.lower()], value) for key, _, value in pairs if key.lower() in spelling)
        sources.append(Source((found[2],), (found[3],), tuple(found[4].split()), options))
    return sources


def _reduce(source: Source, suite: str) -> Source | None:
    """What of a source is Debian's for this suite. Others may use Debian's suite names, but not its components' names too."""
    suites = tuple(name for name in source.suites if name in {suite + pocket for pocket in _POCKETS})
    components = tuple(name for name in source.components if name in _COMPONENTS)
    if not suites or not components or not source.uris:
        return None
    return Source(source.uris, suites, components, source.options)


def debian_sources(suite: str, etc: Path = Path("/etc/apt")) -> str:
    """The text of a deb822 file with this host's Debian sources for a suite.

    Raises:
        EnvironmentProblem: there are none.
    """
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        if path.suffix == ".sources":
            found += parse_deb822(path.read_text(errors="replace"))
        elif path.suffix == ".list":
            found += parse_one_line(path.read_text(errors="replace"))
    reduced = [source for source in (_reduce(source, suite) for source in found) if source]
    if not any(suite in source.suites for source in reduced):
        raise EnvironmentProblem(
            f"this host has no apt source for Debian {suite}, of which guest images are made",
            hint=f"add Debian {suite}'s sources in {etc}/sources.list.d",
        )
    return "\n".join(source.deb822() for source in reduced)
