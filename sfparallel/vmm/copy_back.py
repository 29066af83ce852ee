"""Brings the files that a program changed in its guest back into the host's folders.

Like the file server, this works below the exported folders only, and for the same reason: directories are opened one name at a
time without following links. The guest may be hostile; what it may change is what the user's program may change anyway.
"""

from __future__ import annotations

import enum
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sfparallel.errors import ProtocolError
from sfparallel.vmm.exports import BENEATH, DIRECTORY, open_export

_PATH_BYTES = 64 << 10
_SHOWN_CHARS = 1000
"""Of a path, in a message: names of thousands of folders come from a guest, and messages are kept."""


class ChangeKind(enum.Enum):
    """What happened to a file, or the next step of it."""

    BEGIN = "begin"
    DATA = "data"
    COMMIT = "commit"
    SYMLINK = "symlink"
    MKDIR = "mkdir"
    DELETE = "delete"


_FIELDS = {
    ChangeKind.BEGIN: (), ChangeKind.DATA: ("data", "offset"), ChangeKind.COMMIT: ("size", "mode", "mtime_ns"),
    ChangeKind.SYMLINK: ("data", "mtime_ns"), ChangeKind.MKDIR: ("mode",), ChangeKind.DELETE: (),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileChange:
    """A request of `sfparallel.runtime.copyback` as it was read: the path is relative and without dots, numbers are in range.

    Which of the last five fields count depends on the kind.
    """

    tag: int
    path: bytes
    kind: ChangeKind
    data: bytes = b""
    offset: int = 0
    size: int = 0
    mode: int = 0
    mtime_ns: int | None = None

    @property
    def key(self) -> tuple[int, bytes]:
        """What names the file in its job."""
        return self.tag, self.path

    @classmethod
    def decode(cls, request: Mapping[Any, Any]) -> Self:
        """Read a request; it comes from a guest and may be anything.

        Raises:
            ProtocolError: no guest of ours sends this.
        """
        tag, path = _target(request)
        try:
            kind = ChangeKind(request.get("kind"))
        except ValueError:
            raise ProtocolError(f"unknown kind of change: {request.get('kind')!r:.40}") from None
        values: dict[str, Any] = {name: _bytes(request, name) if name == "data" else _number(request, name)
                                  for name in _FIELDS[kind]}  # fmt: skip
        if kind is ChangeKind.MKDIR and request.get("mtime_ns") is not None:
            values["mtime_ns"] = _number(request, "mtime_ns")
        return cls(tag, path, kind, **values)


def request_id(request: Mapping[Any, Any]) -> int | None:
    """The number under which an answer is awaited."""
    number = request.get("id")
    return number if isinstance(number, int) else None


def _target(request: Mapping[Any, Any]) -> tuple[int, bytes]:
    tag, path = request.get("tag"), request.get("path")
    if not isinstance(tag, int):
        raise ProtocolError(f"no export {tag!r:.40}")
    try:
        raw = os.fsencode(path) if isinstance(path, str) else path
    except UnicodeEncodeError:
        raw = None
    if not isinstance(raw, bytes) or b"\0" in raw or any(part in (b"", b".", b"..") for part in raw.split(b"/")):
        raise ProtocolError("the path of a file must be relative and without dots")
    if len(raw) > _PATH_BYTES:
        raise ProtocolError(f"a path of {len(raw)} bytes; {_PATH_BYTES} are allowed")
    return tag, raw


def _bytes(request: Mapping[Any, Any], key: str) -> bytes:
    value = request.get(key)
    if not isinstance(value, bytes):
        raise ProtocolError(f"{key} must be bytes, not {type(value).__name__}")
    return value


def _number(request: Mapping[Any, Any], key: str) -> int:
    value = request.get(key)
    # Anything below 2**63 is a valid off_t, and a valid time in nanoseconds.
    if not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63 or (value < 0 and key != "mtime_ns"):
        raise ProtocolError(f"{key} must be a number of at most 63 bits, not {value!r:.40}")
    return value


def shown(folder: Path, path: bytes) -> str:
    """A file in a message: UTF-8, which names need not be, and not too long."""
    text = os.path.join(os.fsencode(folder), path).decode("utf-8", "backslashreplace")
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


@dataclass(slots=True)
class _Transfer:
    """A file on its way from the guest: written under a temporary name beside the one it gets when it is whole."""

    directory: int
    name: bytes
    temporary: bytes
    descriptor: int

    def finish(self) -> None:
        """Give the file its name. It is closed first: a network file system may say only then that its disk is full."""
        self._close_file()
        os.rename(self.temporary, self.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
        os.close(self.directory)

    def discard(self) -> None:
        # Nothing more can be done about a failure here, and the one that led here is what the user has to know.
        with suppress(OSError):
            self._close_file()
        with suppress(OSError):
            os.unlink(self.temporary, dir_fd=self.directory)
        os.close(self.directory)

    def _close_file(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class CopyBack:
    """Applies the changes that the parent VM's copy-back reports (`sfparallel.runtime.copyback`) to the exported folders.

    A file appears under its name when it is whole, with its mode and time, and belongs to the user who started the job;
    set-user-id and set-group-id bits do not leave a guest. Only requests of a VM that runs the
    program may be handed to it, and only after that has ended.

    Args:
        exports: host folders by tag, as given to the file server.

    Attributes:
        problems: what could not be written, one line each. The guest tells its user; this is for where it cannot any more.
        used: whether a guest has begun to bring changes back.
    """

    TRANSFERS = 16
    """Files in transfer at most; a correct guest has one."""
    PROBLEMS = 1000
    """Problems remembered at most."""

    def __init__(self, exports: Mapping[int, Path]) -> None:
        self.problems: list[str] = []
        self.used = False
        self._folders = dict(exports)
        self._roots: dict[int, int] = {}
        self._transfers: dict[tuple[int, bytes], _Transfer] = {}
        self._busy = threading.RLock()
        """Held by the thread that applies a change, as long as the host's file system makes it wait."""
        with ExitStack() as undo:
            for tag, folder in exports.items():
                self._roots[tag] = open_export(folder)
                undo.callback(os.close, self._roots[tag])
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def abort(self) -> None:
        """Remove what is not whole: the guest is gone, or another program takes over."""
        with self._busy:
            while self._transfers:
                self._transfers.popitem()[1].discard()

    def close(self) -> None:
        """`abort`, and close every descriptor; neither while another thread applies a change: at a job's end that hangs."""
        if self._busy.acquire(blocking=False):
            try:
                self.abort()
                while self._roots:
                    os.close(self._roots.popitem()[1])
            finally:
                self._busy.release()

    def handle(self, request: Mapping[Any, Any]) -> dict[str, Any]:
        """Read and apply one request.

        Args:
            request: `{"op": "file", "id", "tag", "path", "kind", ...}`; see `sfparallel.runtime.copyback`.

        Returns:
            `{"id", "ok": True}`, or `{"id", "error": "invalid" | "io", "message"}`, with "errno" where the kernel refused; then
            nothing of the file is left.
        """
        answer = {"id": request_id(request)}
        try:
            return answer | self.apply(FileChange.decode(request))
        except ProtocolError as error:
            self.used = True
            with suppress(ProtocolError):
                self.discard(_target(request))
            return answer | {"error": "invalid", "message": str(error)}

    def apply(self, change: FileChange) -> dict[str, Any]:
        """Apply one change; returns what `handle` does, without the "id"."""
        self.used = True
        with self._busy:
            return self._apply_locked(change)

    def _apply_locked(self, change: FileChange) -> dict[str, Any]:
        if change.tag not in self._roots:
            return {"error": "invalid", "message": f"no export {change.tag}"}
        where = shown(self._folders[change.tag], change.path)
        try:
            self._apply(change)
        except ProtocolError as error:
            self.discard(change.key)
            return {"error": "invalid", "message": f"{where}: {error}"}
        except (OSError, RecursionError) as error:  # RecursionError: a tree too deep for shutil.rmtree
            self.discard(change.key)
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else "too many levels of folders"
            message = f"{where}: {reason}"
            if len(self.problems) < self.PROBLEMS:
                self.problems.append(message)
            code = error.errno if isinstance(error, OSError) else None
            return {"error": "io", "message": message} | ({"errno": code} if code else {})
        return {"ok": True}

    def _apply(self, change: FileChange) -> None:
        root = self._roots[change.tag]
        match change.kind:
            case ChangeKind.BEGIN:
                self._begin(change)
            case ChangeKind.DATA:
                _write(self._transfer(change), change.data, change.offset)
            case ChangeKind.COMMIT:
                _finish(self._transfer(change), change)
                del self._transfers[change.key]
            case ChangeKind.SYMLINK:
                with _Parent(root, change.path) as (directory, name):
                    _replace_link(directory, name, change)
            case ChangeKind.MKDIR:
                with _Parent(root, change.path) as (directory, name):
                    _make_directory(directory, name, mode=change.mode, mtime_ns=change.mtime_ns)
            case ChangeKind.DELETE:
                # Deleted by somebody else meanwhile: then all is as the guest wants it.
                with suppress(FileNotFoundError), _Parent(root, change.path) as (directory, name):
                    _delete(directory, name)

    def _transfer(self, change: FileChange) -> _Transfer:
        transfer = self._transfers.get(change.key)
        if transfer is None:
            raise ProtocolError("no transfer of this file was started, or it failed")
        return transfer

    def discard(self, key: tuple[int, bytes]) -> None:
        """Give up the transfer of a file (`FileChange.key`), if there is one."""
        transfer = self._transfers.pop(key, None)
        if transfer is not None:
            transfer.discard()

    def is_under_way(self, key: tuple[int, bytes]) -> bool:
        """Whether a transfer of this file was begun, and neither ended nor failed."""
        return key in self._transfers

    def _begin(self, change: FileChange) -> None:
        self.discard(change.key)
        if len(self._transfers) >= self.TRANSFERS:
            raise ProtocolError(f"more than {self.TRANSFERS} files at a time")
        with _Parent(self._roots[change.tag], change.path) as (parent, name), ExitStack() as undo:
            directory = os.dup(parent)
            undo.callback(os.close, directory)
            temporary = _temporary_name()
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BENEATH, 0o600, dir_fd=directory)
            self._transfers[change.key] = _Transfer(directory, name, temporary, descriptor)
            undo.pop_all()


def _write(transfer: _Transfer, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(transfer.descriptor, data, offset)
        data, offset = data[written:], offset + written


def _finish(transfer: _Transfer, change: FileChange) -> None:
    assert change.mtime_ns is not None
    os.ftruncate(transfer.descriptor, change.size)
    os.fchmod(transfer.descriptor, change.mode & 0o777)
    os.utime(transfer.descriptor, ns=(change.mtime_ns, change.mtime_ns))
    transfer.finish()


class _Parent:
    """Context: a descriptor of the directory that a path's last name is in, and that name."""

    def __init__(self, root: int, path: bytes) -> None:
        *self._folders, self._name = path.split(b"/")
        self._descriptor = os.dup(root)

    def __enter__(self) -> tuple[int, bytes]:
        try:
            for folder in self._folders:
                below = os.open(folder, DIRECTORY, dir_fd=self._descriptor)
                os.close(self._descriptor)
                self._descriptor = below
        except OSError:
            os.close(self._descriptor)
            raise
        return self._descriptor, self._name

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _temporary_name() -> bytes:
    return f".{secrets.token_hex(8)}.sf-part".encode()


def _replace_link(directory: int, name: bytes, change: FileChange) -> None:
    assert change.mtime_ns is not None
    if b"\0" in change.data:
        raise ProtocolError("a link's target cannot hold a zero byte")
    temporary = _temporary_name()
    os.symlink(change.data, temporary, dir_fd=directory)
    try:
        os.utime(temporary, ns=(change.mtime_ns, change.mtime_ns), dir_fd=directory, follow_symlinks=False)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(temporary, dir_fd=directory)
        raise


def _make_directory(directory: int, name: bytes, *, mode: int, mtime_ns: int | None) -> None:
    """Make a directory, or give the one that is there its mode and time."""
    try:
        os.mkdir(name, 0o700, dir_fd=directory)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise
    descriptor = os.open(name, DIRECTORY, dir_fd=directory)
    try:
        status = os.fstat(descriptor)
        if (status.st_mode ^ mode) & 0o777:
            # By way of /proc: fchmod refuses O_PATH descriptors, and opening it otherwise needs read permission. The
            # folder's own set-group-id and sticky bits stay as they are.
            os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IMODE(status.st_mode) & ~0o777 | mode & 0o777)
        # In a folder that others own one may make files, but not set its time.
        if mtime_ns is not None and os.geteuid() in (0, status.st_uid):
            os.utime(f"/proc/self/fd/{descriptor}", ns=(mtime_ns, mtime_ns))
    finally:
        os.close(descriptor)


def _delete(directory: int, name: bytes) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)
