"""What a probe of the machine says."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass


class Status(enum.Enum):
    """OK, or why not: the remedies differ."""

    OK = "ok"
    ABSENT = "absent"
    FORBIDDEN = "forbidden"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One probe's result.

    Attributes:
        name: what was probed.
        detail: what was found, in a line.
        remedy: what to do about it; empty when there is nothing to do.
        needed: whether no job can run without it.
        packages: Debian packages that the remedy is to install, if it is that.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    needed: bool = True
    packages: str = ""

    @property
    def lacks(self) -> bool:
        """Whether it keeps jobs from running."""
        return self.needed and self.status is not Status.OK


def not_installed(name: str, detail: str, packages: str, *, needed: bool = True) -> Finding:
    """The finding for what Debian packages would bring."""
    return Finding(name, Status.ABSENT, detail, f"apt install {packages}", needed, packages)


# ENOENT is also what nf_tables answers for an expression, and EPROTONOSUPPORT a socket for a protocol, that the kernel lacks.
_ABSENT = {errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOSYS, errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT,
           errno.EINVAL}  # fmt: skip
_FORBIDDEN = {errno.EPERM, errno.EACCES, errno.EROFS}


def verdict_of(error: OSError, name: str, what: str, remedy: str, *, forbidden: str = "", needed: bool = True) -> Finding:
    """The finding for a failed system call.

    Args:
        what: what it means to the user.
        remedy: for what is absent or broken.
        forbidden: the remedy for what is not permitted; `remedy` when empty.
    """
    reason = error.strerror or str(error)
    detail = what if reason in what else f"{what}: {reason}"
    if error.errno in _FORBIDDEN:
        return Finding(name, Status.FORBIDDEN, detail, forbidden or remedy, needed)
    status = Status.ABSENT if error.errno in _ABSENT else Status.BROKEN
    return Finding(name, status, detail, remedy, needed)
