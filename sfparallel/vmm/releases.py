"""The release of Debian or Ubuntu that a guest image is made of: the host's own, unless the user chooses another.

Host and guest need not be of one release. What they share is the agent, which is static, and this package's Python files, which
run under each Python from OLDEST_PYTHON on. All else about the guest is asked of the root that was built (`GuestPython`).
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from sfparallel.errors import EnvironmentProblem, ImageBuildError, UsageError
from sfparallel.vmm import subprocesses

OLDEST_PYTHON = (3, 11)
"""`python_requires` in setup.cfg; it holds for the guest as well."""


@dataclass(frozen=True)
class Distribution:
    """What differs between Debian and Ubuntu for us.

    Attributes:
        name: as in os-release(5).
        releases: those that images can be made of, by the names that apt sources have for them.
        moving: other names by which apt sources may call one of them.
        kernel: package of the kernel that is meant for VMs.
        components: parts of its archive; sources with others are of somebody else.
    """

    name: str
    releases: tuple[str, ...]
    moving: tuple[str, ...]
    kernel: str
    components: frozenset[str]


DISTRIBUTIONS = (
    Distribution("debian", ("bookworm", "trixie"), ("oldstable", "stable", "testing", "unstable", "sid"),
                 "linux-image-cloud-amd64", frozenset({"main", "contrib", "non-free", "non-free-firmware"})),
    Distribution("ubuntu", ("noble",), (), "linux-image-virtual",
                 frozenset({"main", "restricted", "universe", "multiverse"})),
)  # fmt: skip
RELEASES = tuple(release for distribution in DISTRIBUTIONS for release in distribution.releases)


def distribution_of(release: str) -> Distribution:
    """The distribution that a release is of.

    Raises:
        UsageError: guest images cannot be made of it.
    """
    for distribution in DISTRIBUTIONS:
        if release in distribution.releases:
            return distribution
    raise UsageError(f"there are no guest images of a release {release!r}", hint=f"choose one of {', '.join(RELEASES)}")


def _os_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def host_codename() -> str:
    """What this host's release is called; empty where it does not say."""
    return _os_release().get("VERSION_CODENAME", "")


def host_release() -> str:
    """The release of this host.

    Raises:
        EnvironmentProblem: guest images cannot be made of it.
    """
    found = _os_release()
    if host_codename() in RELEASES:
        return host_codename()
    name = found.get("PRETTY_NAME") or found.get("NAME") or "of an unknown kind"
    raise EnvironmentProblem(f"this host is {name}, and guest images can be of {', '.join(RELEASES)}",
                             hint="choose one with --release; its packages come from the apt sources of this host")  # fmt: skip


@dataclass(frozen=True)
class GuestPython:
    """The Python of a guest's root, and its C library.

    Attributes:
        full_version: such as "3.13.5".
        magic: magic number of its bytecode, hexadecimal.
        glibc_minor: 41 of glibc 2.41.
    """

    full_version: str
    magic: str
    glibc_minor: int

    @property
    def version(self) -> str:
        """Such as "3.13"."""
        return ".".join(self.full_version.split(".")[:2])

    @property
    def packages(self) -> str:
        """Where pip's packages go, relative to the root: before Debian's own on Python's path."""
        return f"usr/local/lib/python{self.version}/dist-packages"

    @property
    def is_hosts(self) -> bool:
        """Whether this process runs the same version."""
        return self.version == ".".join(map(str, sys.version_info[:2]))

    @property
    def runs_what_is_built_here(self) -> bool:
        """Whether extension modules that are built with this host's Python and C library run in the guest."""
        return self.is_hosts and _glibc_minor(os.confstr("CS_GNU_LIBC_VERSION") or "") <= self.glibc_minor

    def markers(self) -> dict[str, str]:
        """Environment markers (PEP 508) in which it differs from other Pythons on Linux."""
        full = self.full_version
        return {"python_version": self.version, "python_full_version": full, "implementation_version": full}


def _glibc_minor(text: str) -> int:
    """41 of "glibc 2.41"."""
    return int(text.rpartition(".")[2] or 0)


# Run by the guest's Python, in its root.
_ASK = """
import importlib.util, json, os, sys
print(json.dumps(["%d.%d.%d" % sys.version_info[:3], importlib.util.MAGIC_NUMBER.hex(), os.confstr("CS_GNU_LIBC_VERSION")]))
"""


def guest_python(root: Path) -> GuestPython:
    """What Python a root has.

    Raises:
        ImageBuildError: it does not run, or is too old.
    """
    answer = subprocesses.run(["chroot", root, "python3", "-I", "-c", _ASK], what="run the guest's Python", error=ImageBuildError)
    full_version, magic, libc = json.loads(answer)
    found = GuestPython(full_version, magic, _glibc_minor(libc))
    if tuple(map(int, found.version.split("."))) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise ImageBuildError(f"the guest would have Python {full_version}, and sfparallel needs {oldest} or later",
                              hint=f"choose a later release with --release, one of {', '.join(RELEASES)}")  # fmt: skip
    return found
