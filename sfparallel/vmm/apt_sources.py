"""The host's own apt sources, reduced to those of one release: guest images come from where this host gets its packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm.releases import Distribution, distribution_of, host_codename

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


def _reduce(source: Source, suite: str, distribution: Distribution) -> Source | None:
    """What of a source is the distribution's for this suite. Others may use its suites' names, but not its components' too."""
    suites = tuple(name for name in source.suites if name in {suite + pocket for pocket in _POCKETS})
    components = tuple(name for name in source.components if name in distribution.components)
    if not suites or not components or not source.uris:
        return None
    return Source(source.uris, suites, components, source.options)


def _host_sources(etc: Path) -> list[Source]:
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if not path.is_file():
            continue
        if path.suffix == ".sources":
            found += parse_deb822(path.read_text(errors="replace"))
        elif path.suffix == ".list":
            found += parse_one_line(path.read_text(errors="replace"))
    return found


def _of_another_release(found: list[Source], release: str, distribution: Distribution) -> list[Source]:
    """Sources of another release of the distribution, the host's own if there are some, with this one's name: an archive holds
    several releases."""
    for other in (host_codename(), *distribution.releases, *distribution.moving):
        reduced = [source for source in (_reduce(source, other, distribution) for source in found) if source]
        if other and any(other in source.suites for source in reduced):
            return [replace(source, suites=tuple(release + name.removeprefix(other) for name in source.suites))
                    for source in reduced]  # fmt: skip
    return []


def sources_for(release: str, etc: Path = Path("/etc/apt")) -> str:
    """The text of a deb822 file with this host's sources for a release of Debian or Ubuntu.

    Raises:
        UsageError: guest images cannot be made of it.
        EnvironmentProblem: there are no sources.
    """
    distribution = distribution_of(release)
    found = _host_sources(etc)
    reduced = [source for source in (_reduce(source, release, distribution) for source in found) if source]
    if not any(release in source.suites for source in reduced):
        reduced = _of_another_release(found, release, distribution)
    if not reduced:
        name = distribution.name.capitalize()
        raise EnvironmentProblem(
            f"this host has no apt source of {name} for a guest image of its release {release}",
            hint=f"add {name}'s sources in {etc}/sources.list.d, or choose another release with --release",
        )
    return "\n".join(source.deb822() for source in reduced)
