"""The host's time zone, for guests: the variable TZ if it is set, and the files that it and /etc/localtime stand for.

A guest gets the rules themselves (tzfile(5)), because its image may have another version of the database, or none.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LOCALTIME = Path("/etc/localtime")
DATABASE = Path("/usr/share/zoneinfo")
MAGIC = b"TZif"


@dataclass(frozen=True)
class Zone:
    """A time zone of this host.

    Attributes:
        variable: what TZ says; None: it is not set.
        rules: content of /etc/localtime; empty: there is none, which means UTC.
        name: of the zone that /etc/localtime is, if that is known.
    """

    variable: str | None
    rules: bytes
    name: str

    @property
    def variables(self) -> dict[str, str]:
        """For the program's environment."""
        return {} if self.variable is None else {"TZ": self.variable}

    def files(self, variable: str | None) -> dict[str, bytes]:
        """What a guest needs, by path; what is empty shall not be there.

        Args:
            variable: TZ, as the program will see it.
        """
        files = {}
        if self.rules:
            files[str(LOCALTIME)] = self.rules
            files["/etc/timezone"] = f"{self.name}\n".encode() if self.name else b""
        # Also a name of a zone that the guest's database lacks; anything else is a rule (tzset(3)), or means UTC there as here.
        name = (variable or "").removeprefix(":")
        if name and (rules := _read(DATABASE / name)):
            files[str(DATABASE / name)] = rules
        return files


def of_host() -> Zone:
    """The zone in which this process's user lives."""
    rules = _read(LOCALTIME)
    return Zone(os.environ.get("TZ"), rules, _name(rules))


def _name(rules: bytes) -> str:
    with contextlib.suppress(OSError):
        # Not the real path: names of the database may themselves be links to others.
        _, found, name = os.readlink(LOCALTIME).partition("/zoneinfo/")
        if found:
            return name
    with contextlib.suppress(OSError):
        name = Path("/etc/timezone").read_text().strip()
        if rules and _read(DATABASE / name) == rules:
            return name
    return ""


def _read(path: Path) -> bytes:
    """The rules of a zone; empty if there are none, or the name leads out of the database."""
    if ".." in PurePosixPath(path).parts or not (path == LOCALTIME or DATABASE in path.parents):
        return b""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if content.startswith(MAGIC) else b""
