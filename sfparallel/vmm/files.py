"""The host's folders in guests: a read-only FUSE server.

It works below the exported folders only. A path is never handed to the kernel as a whole: every directory is opened by one
name, relative to the descriptor of its parent, with O_NOFOLLOW. So neither `..`, nor a symbolic link, nor a directory that is
swapped for a link meanwhile leads outside, whatever a guest asks for.

Guests see a snapshot of sorts: attributes and names are valid for longer than any job runs, and pages stay in the guest's
cache. A file that changes on the host during the run may be seen old or new; one that was *replaced* by another file after a
guest had seen it is refused with ESTALE rather than read with the size of the old one.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sfparallel.vmm import fuse_wire as fuse
from sfparallel.vmm.copy_back import CopyBack
from sfparallel.vmm.exports import BENEATH, DIRECTORY, exports_for, open_export
from sfparallel.vmm.fuse_wire import Opcode, OpenFlag, Request

__all__ = ["CopyBack", "FileServer", "FileStatistics", "exports_for"]

log = logging.getLogger(__name__)
T = TypeVar("T")

VALID_S = 365 * 86400
"""How long guests may trust attributes, names and the absence of names."""

# O_NONBLOCK: should a fifo take the file's place after we looked, opening it must not hang the supervisor.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | BENEATH

_SECOND_CHANCES = 64
"""Folders that are passed over in the search for a file to forget; then a folder is forgotten."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A file as a guest knows it: a name in a directory, and which file stood there when the guest looked."""

    tag: int
    parent: int
    name: bytes
    device: int
    inode: int
    type: int

    def is_still(self, status: os.stat_result) -> bool:
        return (status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)) == (self.device, self.inode, self.type)


@dataclass(frozen=True, slots=True)
class _Name:
    """An entry of a directory listing; of `mode` only the type counts."""

    name: bytes
    inode: int
    mode: int


@dataclass(frozen=True, slots=True)
class FileStatistics:
    """What a file server has done so far."""

    requests: int
    bytes_read: int
    nodes: int


class FileServer:
    """Answers the FUSE requests of all VMs of a job. Not thread-safe; a request takes some tens of microseconds.

    It knows nothing of single VMs: a node is numbered once, for the parent and for every clone, and its number is also its
    file handle. So a clone goes on with the numbers that it inherited, and nothing has to be told to the server at a fork.
    A FORGET, which speaks for one VM only, frees no node. When there are too many, the file whose turn is longest ago is
    forgotten: a guest that comes back to it by name looks it up anew (the kernel does so after ESTALE), and one that has it open
    reads an error.

    Args:
        exports: host folders by tag (1..65535).
        open_files: descriptors kept open at most, over all exports.
        nodes: files remembered at most; one takes about 400 bytes.
        listed: names of folders' listings remembered at most, beside those of the one that is being read.

    Raises:
        UsageError: a folder cannot be opened.
    """

    LISTINGS = 64
    WARNINGS = 20

    def __init__(
        self, exports: Mapping[int, Path], *, open_files: int = 128, nodes: int = 1 << 20, listed: int = 1 << 18
    ) -> None:
        self._roots: dict[int, int] = {}
        self._node_limit = max(nodes, 8)
        self._listed_limit = listed
        self._warnings = 0
        self._nodes: OrderedDict[int, _Node] = OrderedDict()
        self._numbers: dict[_Node, int] = {}
        self._next_number = count(fuse.ROOT_ID + 1)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._open_limit = max(open_files, 4)
        self._listings: OrderedDict[tuple[int, int], list[_Name]] = OrderedDict()
        self._listed = 0
        self._requests = 0
        self._bytes_read = 0
        self._identity = (os.geteuid(), os.getegid())
        with ExitStack() as undo:
            for tag, folder in exports.items():
                self._roots[tag] = open_export(folder)
                undo.callback(os.close, self._roots[tag])
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor; the server answers nothing after that."""
        for descriptor in (*self._open.values(), *self._roots.values()):
            os.close(descriptor)
        self._open.clear()
        self._roots.clear()

    def statistics(self) -> FileStatistics:
        return FileStatistics(self._requests, self._bytes_read, len(self._nodes))

    def handle(self, tag: int, request: bytes) -> bytes | None:
        """Answer one request.

        Args:
            tag: the export that it is about.
            request: as read from the guest's /dev/fuse.

        Returns:
            The reply for /dev/fuse, or None where the kernel waits for none. What has a number is answered, whatever else is
            wrong with it: the agent counts it, and no fork of its VM ends before it is answered.

        Raises:
            ProtocolError: too short for a FUSE request; the guest's agent is not what we put there.
        """
        parsed = fuse.parse(request)
        self._requests += 1
        if parsed.opcode in fuse.NO_REPLY:
            return None
        try:
            if parsed.fault:
                raise OSError(errno.EINVAL, parsed.fault)
            if tag not in self._roots:
                raise OSError(errno.ENODEV, f"no export {tag}")
            return fuse.reply(parsed, self._answer(tag, parsed))
        except OSError as error:
            return fuse.error(parsed, error.errno or errno.EIO)

    def _answer(self, tag: int, request: Request) -> bytes:
        match request.opcode:
            case Opcode.INIT:
                return _well_formed(fuse.init_reply(request.body))
            case Opcode.LOOKUP:
                return self._lookup(tag, request.nodeid, _well_formed(fuse.parse_name(request.body)))
            case Opcode.GETATTR:
                return fuse.attributes_reply(self._attributes(self._status(tag, request.nodeid)), VALID_S)
            case Opcode.READLINK:
                return self._read_link(tag, request.nodeid)
            case Opcode.OPEN | Opcode.OPENDIR:
                return self._open_node(tag, request)
            case Opcode.READ:
                return self._read(tag, request.nodeid, *_well_formed(fuse.parse_read(request.body)))
            case Opcode.READDIR | Opcode.READDIRPLUS:
                offset, size = _well_formed(fuse.parse_read(request.body))
                return self._read_directory(tag, request.nodeid, offset, size, plus=request.opcode == Opcode.READDIRPLUS)
            case Opcode.STATFS:
                return fuse.statfs_reply(os.fstatvfs(self._roots[tag]))
            case Opcode.RELEASE | Opcode.RELEASEDIR | Opcode.FSYNC | Opcode.FSYNCDIR | Opcode.SYNCFS | Opcode.DESTROY:
                return b""
            case Opcode.IOCTL:
                # Overlayfs asks for file flags before it copies a file up; ENOTTY means "has none", ENOSYS an error (5.15+).
                raise OSError(errno.ENOTTY, "no ioctl")
            case opcode if opcode in fuse.WRITING:
                raise OSError(errno.EROFS, "read-only")
        # FLUSH, ACCESS, GETXATTR, LISTXATTR, STATX, LSEEK and unknown ones: after ENOSYS the kernel does without and stops
        # asking. Overlayfs would otherwise ask for trusted.overlay.* of every directory.
        raise OSError(errno.ENOSYS, "not implemented")

    # -- nodes --------------------------------------------------------------------------------------------------------------

    def _node(self, tag: int, number: int) -> _Node:
        node = self._nodes.get(number)
        if node is None or node.tag != tag:
            raise OSError(errno.ESTALE, "no such node")
        self._nodes.move_to_end(number)
        return node

    def _number(self, tag: int, parent: int, name: bytes, status: os.stat_result) -> int:
        node = _Node(tag, parent, name, status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode))
        number = self._numbers.get(node)
        if number is None:
            self._forget_surplus()
            number = self._numbers[node] = next(self._next_number)
            self._nodes[number] = node
        else:
            self._nodes.move_to_end(number)
        return number

    def _forget_surplus(self) -> None:
        # Folders stay, as far as that goes: what is below them could not be found any more. They are few beside files.
        for _ in range(_SECOND_CHANCES):
            if len(self._nodes) < self._node_limit:
                return
            number, node = next(iter(self._nodes.items()))
            if node.type != stat.S_IFDIR:
                self._forget(number)
            else:
                self._nodes.move_to_end(number)
        while len(self._nodes) >= self._node_limit:
            self._forget(next(iter(self._nodes)))

    def _forget(self, number: int) -> None:
        del self._numbers[self._nodes.pop(number)]
        descriptor = self._open.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)

    def _stale(self, node: _Node) -> OSError:
        # A guest may ask for it again and again.
        self._warnings += 1
        if self._warnings <= self.WARNINGS:
            log.warning("%r was replaced on the host while the job runs; guests that know the old one get an error%s",
                        os.fsdecode(node.name), "; no more is said of others" if self._warnings == self.WARNINGS else "")
        return OSError(errno.ESTALE, "replaced on the host")

    def _keep_open(self, number: int, descriptor: int) -> int:
        while len(self._open) >= self._open_limit:
            os.close(self._open.popitem(last=False)[1])
        self._open[number] = descriptor
        return descriptor

    def _directory(self, tag: int, number: int) -> int:
        """An O_PATH descriptor of a directory; valid until the next call that opens something."""
        missing: list[int] = []
        # From the node up to the nearest ancestor that is open, then down again: a loop, as a path may have 2,000 parts.
        while number != fuse.ROOT_ID and number not in self._open:
            missing.append(number)
            number = self._node(tag, number).parent
        if number == fuse.ROOT_ID:
            descriptor = self._roots[tag]
        else:
            self._directory_node(tag, number)
            self._open.move_to_end(number)
            descriptor = self._open[number]
        for number in reversed(missing):
            descriptor = self._open_checked(self._directory_node(tag, number), number, descriptor, DIRECTORY)
        return descriptor

    def _directory_node(self, tag: int, number: int) -> _Node:
        node = self._node(tag, number)
        if node.type != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return node

    def _open_checked(self, node: _Node, number: int, parent: int, flags: int) -> int:
        try:
            descriptor = os.open(node.name, flags, dir_fd=parent)
        except OSError as error:
            # O_NOFOLLOW and O_DIRECTORY complain when a link or a file has taken a directory's place.
            raise self._stale(node) if error.errno in (errno.ELOOP, errno.ENOTDIR) else error from None
        if not node.is_still(os.fstat(descriptor)):
            os.close(descriptor)
            raise self._stale(node)
        return self._keep_open(number, descriptor)

    def _status(self, tag: int, number: int) -> os.stat_result:
        if number == fuse.ROOT_ID:
            return os.fstat(self._roots[tag])
        node = self._node(tag, number)
        status = os.stat(node.name, dir_fd=self._directory(tag, node.parent), follow_symlinks=False)
        if not node.is_still(status):
            raise self._stale(node)
        return status

    def _attributes(self, status: os.stat_result) -> bytes:
        # The guest's programs run as root: what belongs to the user who started the job belongs to root there, as in a
        # user namespace. Otherwise programs that check ownership (git, ssh) refuse the user's own files.
        uid, gid = self._identity
        return fuse.attributes(status, uid=0 if status.st_uid == uid else status.st_uid,
                               gid=0 if status.st_gid == gid else status.st_gid)

    # -- operations ---------------------------------------------------------------------------------------------------------

    def _lookup(self, tag: int, parent: int, name: bytes) -> bytes:
        try:
            status = os.stat(name, dir_fd=self._directory(tag, parent), follow_symlinks=False)
        except FileNotFoundError:
            return fuse.negative_entry(VALID_S)
        return fuse.entry_reply(self._number(tag, parent, name, status), self._attributes(status), VALID_S)

    def _read_link(self, tag: int, number: int) -> bytes:
        node = self._node(tag, number)
        return os.readlink(node.name, dir_fd=self._directory(tag, node.parent))

    def _open_node(self, tag: int, request: Request) -> bytes:
        if _well_formed(fuse.parse_open(request.body)) & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        if request.opcode == Opcode.OPENDIR:
            self._directory(tag, request.nodeid)
            return fuse.open_reply(request.nodeid, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR)
        self._file(tag, request.nodeid)
        return fuse.open_reply(request.nodeid, OpenFlag.KEEP_CACHE)

    def _file(self, tag: int, number: int) -> int:
        """A descriptor of a regular file, for reading; valid until the next call that opens something."""
        node = self._node(tag, number)
        if node.type != stat.S_IFREG:
            # A device or fifo of the host is none of the guest's business; the guest's kernel opens its own by number.
            raise OSError(errno.EISDIR if node.type == stat.S_IFDIR else errno.EACCES, "not a regular file")
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        return self._open_checked(node, number, self._directory(tag, node.parent), _FILE)

    def _read(self, tag: int, number: int, offset: int, size: int) -> bytes:
        data = os.pread(self._file(tag, number), size, offset)
        self._bytes_read += len(data)
        return data

    def _read_directory(self, tag: int, number: int, offset: int, size: int, *, plus: bool) -> bytes:
        listing = self._listing(tag, number)
        reply = bytearray()
        for index in range(offset, len(listing)):
            entry = listing[index]
            record = fuse.directory_entry(entry.name, inode=entry.inode, next_offset=index + 1, mode=entry.mode)
            if plus:
                # The length first: attributes are looked up only of what fits.
                if len(reply) + fuse.ENTRY_BYTES + len(record) > size:
                    break
                reply += self._entry(tag, number, entry)
            elif len(reply) + len(record) > size:
                break
            reply += record
        if not reply and offset < len(listing):
            raise OSError(errno.EINVAL, "no entry fits")
        return bytes(reply)

    def _entry(self, tag: int, parent: int, entry: _Name) -> bytes:
        """What a LOOKUP of the entry would say; of node 0 (no lookup was done) for the dots and names that are gone."""
        if entry.name in (b".", b".."):
            return fuse.negative_entry(0)
        try:
            return self._lookup(tag, parent, entry.name)
        except OSError:
            return fuse.negative_entry(0)

    def _listing(self, tag: int, number: int) -> list[_Name]:
        # An offset is an index into this list, for all VMs: it has to stay the same as long as it may be in use. It is
        # sorted, so that one made again after it fell out of the cache is the same.
        key = (tag, number)
        if key in self._listings:
            self._listings.move_to_end(key)
            return self._listings[key]
        directory = self._directory(tag, number)
        own = os.fstat(directory).st_ino
        listing = [_Name(b".", own, stat.S_IFDIR), _Name(b"..", own, stat.S_IFDIR)]
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            with os.scandir(readable) as entries:
                listing += sorted((_Name(os.fsencode(entry.name), entry.inode(), _entry_type(entry)) for entry in entries),
                                  key=lambda name: name.name)
        finally:
            os.close(readable)
        self._listings[key] = listing
        self._listed += len(listing)
        while len(self._listings) > self.LISTINGS or (len(self._listings) > 1 and self._listed > self._listed_limit):
            self._listed -= len(self._listings.popitem(last=False)[1])
        return listing


def _entry_type(entry: os.DirEntry[str]) -> int:
    """The type as readdir(3) tells it, without a stat; 0 for devices, fifos and sockets, which guests look up."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0


def _well_formed(value: T | None) -> T:
    if value is None:
        raise OSError(errno.EINVAL, "malformed request")
    return value
