"""In the guest's parent, after the program has ended: send what it changed in the host's folders back to the host.

A host folder is shown as an overlay (overlayfs) of the host's files, read-only, below, and a folder in RAM, above. Whatever a
program changed is in the upper one, in the form described in the kernel's Documentation/filesystems/overlayfs.rst:

* a new or changed file, link or folder stands there as it is (a folder also when only something in it changed),
* a deleted name is a character device 0/0 (a whiteout),
* a folder that replaced another one has the attribute `trusted.overlay.opaque` = "y".

The overlays must be mounted with `redirect_dir=off,metacopy=off`; with these on, an entry would stand for data elsewhere.

Each change is a request on the agent's socket, answered in order by `sfparallel.vmm.copy_back`:
`{"op": "file", "id", "tag", "path": bin, "kind", ...}` with, by kind, `begin`: nothing; `data`: "offset", "data"; `commit`:
"size", "mode", "mtime_ns"; `symlink`: "data" (its target), "mtime_ns"; `mkdir`: "mode" and, when its content is complete,
"mtime_ns"; `delete`: nothing.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfparallel import wire
from sfparallel.errors import GuestError

MOUNTS = Path("/run/sfparallel/mnt")
"""Where the agent keeps the layers of every export: `<tag>/up` and `<tag>/low`."""

DATA_BYTES = 64 << 10
SHOWN = 20
"""Problems that are told one by one; of more, only the number."""
WINDOW = 16
"""Requests under way at a time: enough to hide the way to the host and back, and 1 MiB at most in the agent."""


class Kind(enum.Enum):
    """What happened to a path."""

    FILE = "file"
    SYMLINK = "symlink"
    FOLDER = "folder"
    FOLDER_DONE = "folder done"
    DELETED = "deleted"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Change:
    """One change; `path` is relative to the export."""

    kind: Kind
    path: bytes
    mode: int = 0
    mtime_ns: int = 0
    reason: str = ""


_REMEDIES = {
    errno.EROFS: "make the folder writable, or work in another one",
    errno.EACCES: "make the folder writable, or work in another one",
    errno.EPERM: "make the folder writable, or work in another one",
    errno.ENOSPC: "free space on the host's disk",
    errno.EDQUOT: "free space on the host's disk",
}
_IN_THE_WAY = "remove or rename that file"


@dataclass(slots=True)
class Report:
    """What was brought back.

    Attributes:
        problems: what was not, one line each.
    """

    files: int = 0
    folders: int = 0
    deleted: int = 0
    data_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    codes: set[int] = field(default_factory=set)
    """Kernel's error numbers among them."""

    def error(self) -> GuestError:
        """What was not brought back, as one error that says what to do."""
        shown = [*self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            shown.append(f"and {len(self.problems) - SHOWN} more")
        what = "1 change" if len(self.problems) == 1 else f"{len(self.problems)} changes"
        remedies = dict.fromkeys(_REMEDIES.get(code, _IN_THE_WAY) for code in sorted(self.codes)) or [_IN_THE_WAY]
        return GuestError("\n  ".join([f"{what} of the program could not be written to the host:", *shown]),
                          hint=f"{' and '.join(remedies)}, then run again; all other changes are on the host")


def copy_back(mounts: Path = MOUNTS, agent_socket: str = wire.AGENT_SOCKET) -> Report:
    """Send every change of every export to the host.

    Raises:
        GuestError: the agent is gone or does not speak the protocol; or some changes could not be brought back, which the message
            lists (all others were).
    """
    folders = list(mounts.iterdir()) if mounts.is_dir() else []
    layers = sorted((int(folder.name), folder) for folder in folders if folder.name.isdecimal())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(agent_socket)
        sender = Sender(connection)
        for tag, folder in layers:
            sender.send_changes(tag, folder / "up", changes(folder / "up", folder / "low"))
        report = sender.finish()
    if report.problems:
        raise report.error()
    return report


def changes(upper: Path, lower: Path) -> Iterator[Change]:
    """Walk an overlay's upper layer; a folder comes before its content, and again (FOLDER_DONE) after it.

    Only names that stood in the lower layer as the guest saw it are deleted: what somebody else puts into a folder of the
    host meanwhile, another job for one, stays.

    Args:
        upper: the upper layer's folder.
        lower: the lower layer, to see what a new entry replaces.
    """
    up, low = os.fsencode(upper), os.fsencode(lower)
    root = _Folder(b"", 0, 0, in_lower=True, replaced=False)
    # A stack of folders under way, not recursion: trees may be 2,000 deep.
    stack = [(root, _inside(up, low, root))]
    while stack:
        folder, steps = stack[-1]
        match next(steps, None):
            case None:
                stack.pop()
                if folder is not root:
                    yield Change(Kind.FOLDER_DONE, folder.path, folder.mode, folder.mtime_ns)
            case _Folder() as below:
                # Writable for its owner until its content is complete.
                yield Change(Kind.FOLDER, below.path, below.mode | 0o700)
                stack.append((below, _inside(up, low, below)))
            case Change() as change:
                yield change


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of the upper layer.

    Attributes:
        in_lower: the lower layer has a folder of that name.
        replaced: but its content is not visible in the overlay.
    """

    path: bytes
    mode: int
    mtime_ns: int
    in_lower: bool
    replaced: bool


def _inside(up: bytes, low: bytes, folder: _Folder) -> Iterator[Change | _Folder]:
    """The changes of one folder, and the folders in it."""
    try:
        names = sorted(os.listdir(os.path.join(up, folder.path)))
        if folder.in_lower and folder.replaced:
            for name in sorted(set(os.listdir(os.path.join(low, folder.path))) - set(names)):
                yield Change(Kind.DELETED, os.path.join(folder.path, name))
        for name in names:
            yield from _one(up, low, folder, name)
    except OSError as error:
        yield Change(Kind.UNSUPPORTED, folder.path, reason=f"the rest of this folder cannot be read: {error.strerror}")


def _one(up: bytes, low: bytes, folder: _Folder, name: bytes) -> Iterator[Change | _Folder]:
    """The changes of one name."""
    path = os.path.join(folder.path, name)
    above = os.path.join(up, path)
    status = os.lstat(above)
    mode, mtime_ns = stat.S_IMODE(status.st_mode), status.st_mtime_ns
    is_folder = stat.S_ISDIR(status.st_mode)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        yield Change(Kind.DELETED, path)
        return
    # Byte code of the guest's Python is of no use on the host, and not what anybody calls a result.
    if is_folder and name == b"__pycache__":
        return
    # Where the folder is not in the lower layer, its names need not be asked for: each question is a way to the host and back.
    below = _type(os.path.join(low, path)) if folder.in_lower else 0
    if below and (below == stat.S_IFDIR) != is_folder:
        yield Change(Kind.DELETED, path)
    if is_folder:
        if _attribute(above, "redirect") is not None:
            yield Change(Kind.UNSUPPORTED, path, reason="the overlay was mounted with redirect_dir")
            return
        replaced = folder.replaced or _attribute(above, "opaque") == b"y"
        yield _Folder(path, mode, mtime_ns, in_lower=below == stat.S_IFDIR, replaced=replaced)
    elif stat.S_ISLNK(status.st_mode):
        yield Change(Kind.SYMLINK, path, mode, mtime_ns)
    elif stat.S_ISREG(status.st_mode):
        if _attribute(above, "metacopy") is not None:
            yield Change(Kind.UNSUPPORTED, path, reason="the overlay was mounted with metacopy")
            return
        yield Change(Kind.FILE, path, mode, mtime_ns)
    # Fifos, sockets and devices mean nothing outside the guest.


def _type(path: bytes) -> int:
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _attribute(path: bytes, name: str) -> bytes | None:
    try:
        return os.getxattr(path, f"trusted.overlay.{name}", follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


class Sender:
    """Sends changes as requests, WINDOW of them ahead of their answers.

    Args:
        connection: a SEQPACKET socket that leads to the host's `CopyBack`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._last_id = 0
        self._waiting: dict[int, tuple[int, bytes]] = {}
        self._failed: set[tuple[int, bytes]] = set()
        self._report = Report()

    def send_changes(self, tag: int, upper: Path, changes: Iterator[Change]) -> None:
        """Send the changes of one export; `upper` is where the files' content is."""
        up = os.fsencode(upper)
        for change in changes:
            try:
                self._send_change(tag, up, change)
            except OSError as error:
                self._problem(tag, change.path, f"{os.fsdecode(change.path)!r} cannot be read in the guest: {error.strerror}")

    def _send_change(self, tag: int, up: bytes, change: Change) -> None:
        path = change.path
        match change.kind:
            case Kind.FILE:
                self._send_file(tag, up, change)
                self._report.files += 1
            case Kind.SYMLINK:
                self._send(tag, path, "symlink", data=os.readlink(os.path.join(up, path)), mtime_ns=change.mtime_ns)
                self._report.files += 1
            case Kind.FOLDER:
                self._send(tag, path, "mkdir", mode=change.mode)
                self._report.folders += 1
            case Kind.FOLDER_DONE:
                self._send(tag, path, "mkdir", mode=change.mode, mtime_ns=change.mtime_ns)
            case Kind.DELETED:
                self._send(tag, path, "delete")
                self._report.deleted += 1
            case Kind.UNSUPPORTED:
                self._problem(tag, path, f"{os.fsdecode(path)!r}: {change.reason}")

    def finish(self) -> Report:
        """Wait for the remaining answers."""
        while self._waiting:
            self._receive()
        return self._report

    def _send_file(self, tag: int, up: bytes, change: Change) -> None:
        key = (tag, change.path)
        descriptor = os.open(os.path.join(up, change.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._send(*key, "begin")
            size = os.fstat(descriptor).st_size
            offset = 0
            while offset < size and key not in self._failed:
                # Holes are not sent: a sparse file stays one.
                try:
                    offset = os.lseek(descriptor, offset, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:  # only a hole is left
                        break
                    raise
                end = min(os.lseek(descriptor, offset, os.SEEK_HOLE), size)
                while offset < end and key not in self._failed:
                    data = os.pread(descriptor, min(DATA_BYTES, end - offset), offset)
                    if not data:  # became shorter: some process of the program still lives
                        end = size = offset
                        break
                    self._send(*key, "data", offset=offset, data=data)
                    self._report.data_bytes += len(data)
                    offset += len(data)
            if key not in self._failed:
                self._send(*key, "commit", size=size, mode=change.mode, mtime_ns=change.mtime_ns)
        finally:
            os.close(descriptor)

    def _send(self, tag: int, path: bytes, kind: str, **fields: Any) -> None:
        while len(self._waiting) >= WINDOW:
            self._receive()
        self._last_id += 1
        self._waiting[self._last_id] = (tag, path)
        request = {"op": "file", "id": self._last_id, "tag": tag, "path": path, "kind": kind, **fields}
        try:
            self._connection.sendall(wire.pack(request))
        except OSError as error:
            raise GuestError(f"the guest agent ended while files were copied back: {error.strerror}") from error

    def _receive(self) -> None:
        try:
            packet = self._connection.recv(wire.MAX_MESSAGE_BYTES)
        except OSError as error:
            raise GuestError(f"the guest agent ended while files were copied back: {error.strerror}") from error
        if not packet:
            raise GuestError("the guest agent ended while files were copied back")
        answer = wire.unpack(packet)
        if "id" not in answer:
            return  # an event for the program that has ended
        key = self._waiting.pop(answer["id"], None)
        if key is None:
            raise GuestError(f"the host answered a request that was never made: {answer['id']!r}")
        if "error" in answer:
            code = answer.get("errno")
            self._problem(*key, str(answer.get("message", answer["error"])), code if isinstance(code, int) else 0)

    def _problem(self, tag: int, path: bytes, message: str, code: int = 0) -> None:
        # One line per path: what was already on its way when a file failed fails too. So does what is in a folder that failed,
        # and a folder's time when nothing in it could be written.
        if (tag, path) in self._failed:
            return
        follows = code == errno.ENOENT and any((tag, folder) in self._failed for folder in _folders_of(path))
        follows |= code > 0 and any(other == tag and name.startswith(path + b"/") for other, name in self._failed)
        self._failed.add((tag, path))
        if follows:
            return
        self._report.problems.append(message)
        if code:
            self._report.codes.add(code)


def _folders_of(path: bytes) -> Iterator[bytes]:
    """The folders above a path, innermost first."""
    while path := os.path.dirname(path):
        yield path
