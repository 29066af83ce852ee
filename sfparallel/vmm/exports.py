"""Which folders of the host a job shows to its guests, and how to stay below them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sfparallel.errors import UsageError

BENEATH = os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_PATH | os.O_DIRECTORY | BENEATH
"""Flags to open a directory by one name below its parent's descriptor; a symbolic link of that name fails with ENOTDIR."""

# A guest has its own of these: laying the host's over them would take its system away. Exceptions hold no system files.
_SYSTEM_FOLDERS = frozenset(map(Path, ("/", "/home", "/var", "/var/lib", "/var/cache", "/var/log", "/var/run", "/var/lock")))
_SYSTEM_TREES = tuple(map(Path, ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sys", "/dev",
                                 "/run", "/boot")))
SHARED_DATA = (Path("/usr/share"), Path("/usr/local/share"))
"""A single folder in one of these may be shown read-only: programs find their own data there, not the system's."""
_NOT_SYSTEM = tuple(map(Path, ("/usr/src", "/usr/local/src", "/dev/shm", "/run/user", "/run/media")))


def is_system_folder(folder: Path) -> bool:
    """Whether `folder` (absolute, resolved) is one that a guest must keep its own of."""
    if folder in _SYSTEM_FOLDERS:
        return True
    if any(tree in folder.parents for tree in _NOT_SYSTEM):
        return False
    return any(folder == tree or tree in folder.parents for tree in _SYSTEM_TREES)


_LOCAL_KINDS = frozenset((
    "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "jfs", "ntfs3", "overlay", "ramfs",
    "reiserfs", "rootfs", "squashfs", "tmpfs", "udf", "vfat", "xfs", "zfs",
))  # fmt: skip
"""File systems that need no server."""


def may_hang(folder: Path, mounts: bytes | None = None) -> bool:
    """Whether there is, in or below a folder, a file system that asks a server, which may never answer: of a network, or FUSE, or
    one that mounts others when they are used.

    A job has a mount namespace of its own, into which nothing is mounted from outside: the answer stays true.

    Args:
        folder: absolute, resolved.
        mounts: as /proc/self/mountinfo has them (proc(5)), which is read if it is not given.
    """
    if mounts is None:
        mounts = Path("/proc/self/mountinfo").read_bytes()
    here, around = os.fsencode(folder), (b"", False)
    for line in mounts.splitlines():
        place, _, rest = line.partition(b" - ")
        where = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), place.split(b" ")[4])
        is_local = rest.split(b" ")[0].decode("ascii", "replace") in _LOCAL_KINDS
        if _is_in(where, here) and where != here and not is_local:
            return True
        if _is_in(here, where) and len(where) >= len(around[0]):  # a later mount of the same place hides the earlier one
            around = where, is_local
    return not around[1]


def _is_in(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def exports_for(cwd: Path, script_folder: Path | None) -> list[tuple[int, Path]]:
    """The folders that a job shows to its guests, each with its tag.

    Folders are resolved (no symbolic links), and one that lies in another is exported once, as part of it. A script that
    belongs to the system (`/usr/bin/...`, `-m module`) has no folder of its own to show.

    Args:
        cwd: the current folder.
        script_folder: the folder of the script, of its real file; None without a script.

    Raises:
        UsageError: the current folder belongs to the system, or does not exist.
    """
    try:
        folders = [cwd.resolve(strict=True)]
    except OSError as error:
        raise UsageError(f"the current folder {cwd} cannot be used: {error.strerror}",
                         hint="change to a folder that exists") from error
    if is_system_folder(folders[0]):
        raise UsageError(f"the current folder {folders[0]} is a system folder, and the guest has its own",
                         hint="change to your project's folder and run it from there")
    if script_folder is not None and not is_system_folder(script_folder.resolve()):
        folders.append(script_folder.resolve())
    outermost = [folder for folder in dict.fromkeys(folders) if not any(other in folder.parents for other in folders)]
    return list(enumerate(outermost, start=1))


def open_export(folder: Path) -> int:
    """A descriptor of an exported folder itself (the one place where links in a path are followed).

    Raises:
        UsageError: it is not there, no folder, or closed to us.
    """
    try:
        return os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be shown to the guest: {error.strerror}") from error
