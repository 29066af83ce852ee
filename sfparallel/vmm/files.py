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
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sfparallel.vmm import fuse_wire as fuse
from sfparallel.vmm.copy_back import shown
from sfparallel.vmm.exports import BENEATH, DIRECTORY, open_export
from sfparallel.vmm.file_nodes import Handle, Node, NodeTable
from sfparallel.vmm.fuse_wire import Opcode, OpenFlag, Request

log = logging.getLogger(__name__)
T = TypeVar("T")

VALID_S = 365 * 86400
"""How long guests may trust attributes, names and the absence of names."""

# O_NONBLOCK: should a fifo take the file's place after we looked, opening it must not hang the supervisor.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | BENEATH


@dataclass(frozen=True, slots=True)
class _Name:
    """An entry of a directory listing; of `mode` only the type counts."""

    name: bytes
    inode: int
    mode: int


class FileServer:
    """Answers the FUSE requests of all VMs of a job, in any number of threads. A request takes some tens of microseconds, or as
    long as the file system below makes it wait: only the thread that asks there waits.

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
        slow: exports whose server may never answer (`exports.may_hang`). Who has answered a request about one of them calls
            `surplus`, which closes what the server has no more room for.

    Raises:
        UsageError: a folder cannot be opened.
    """

    LISTINGS = 64
    WARNINGS = 20

    def __init__(
        self, exports: Mapping[int, Path], *, open_files: int = 128, nodes: int = 1 << 20, listed: int = 1 << 18,
        slow: Collection[int] = (),
    ) -> None:
        self._folders = dict(exports)
        self._nodes = NodeTable(max(nodes, 8), max(open_files, 4), slow)
        self.surplus = self._nodes.surplus
        self._listed_limit = listed
        self._listing_lock = threading.Lock()
        self._listings: OrderedDict[tuple[int, int], list[_Name]] = OrderedDict()
        self._listed = 0
        self._warnings = 0
        self._identity = (os.geteuid(), os.getegid())
        self._roots = {tag: Handle(open_export(folder)) for tag, folder in exports.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor; the server answers nothing after that. It may have to wait for a file's server."""
        self._roots.clear()
        self._nodes.close()

    def nodes(self) -> int:
        """Files that are remembered."""
        return len(self._nodes)

    def where(self, tag: int, request: Request) -> str:
        """Which file a request is about, for people. It does not ask the host."""
        path = self._nodes.path(request.nodeid)
        name = fuse.parse_name(request.body) if request.opcode == Opcode.LOOKUP else None
        return shown(self._folders.get(tag, Path()), os.path.join(path, name) if name else path)

    def answer(self, tag: int, request: Request) -> bytes:
        """Answer a request that the kernel waits for (not one of `fuse_wire.NO_REPLY`).

        Whatever is wrong with it: the agent counts it, and no fork of its VM ends before it is answered.

        Args:
            tag: the export that it is about.

        Returns:
            The reply for /dev/fuse.
        """
        try:
            if request.fault:
                raise OSError(errno.EINVAL, request.fault)
            self._root(tag)
            return fuse.reply(request, self._answer(tag, request))
        except OSError as error:
            return fuse.error(request, error.errno or errno.EIO)

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
                return fuse.statfs_reply(os.fstatvfs(self._root(tag).descriptor))
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

    def _root(self, tag: int) -> Handle:
        root = self._roots.get(tag)
        if not root:
            raise OSError(errno.ENODEV, f"no export {tag}")
        return root

    # -- files --------------------------------------------------------------------------------------------------------------

    def _stale(self, node: Node) -> OSError:
        # A guest may ask for it again and again.
        self._warnings += 1
        if self._warnings <= self.WARNINGS:
            log.warning("%r was replaced on the host during the job; VMs that used the old one get an error%s",
                        os.fsdecode(node.name), "; later ones are not reported" if self._warnings == self.WARNINGS else "")
        return OSError(errno.ESTALE, "replaced on the host")

    def _directory(self, tag: int, number: int) -> Handle:
        """A directory (O_PATH)."""
        handle, missing = self._nodes.nearest(tag, number)
        handle = handle or self._root(tag)
        for below in reversed(missing):
            handle = self._open_checked(self._nodes.directory(tag, below), below, handle, DIRECTORY)
        return handle

    def _open_checked(self, node: Node, number: int, parent: Handle, flags: int) -> Handle:
        try:
            handle = Handle(os.open(node.name, flags, dir_fd=parent.descriptor))
        except OSError as error:
            # O_NOFOLLOW and O_DIRECTORY complain when a link or a file has taken a directory's place.
            raise self._stale(node) if error.errno in (errno.ELOOP, errno.ENOTDIR) else error from None
        if not node.is_still(os.fstat(handle.descriptor)):
            raise self._stale(node)
        self._nodes.keep(number, node, handle)
        return handle

    def _status(self, tag: int, number: int) -> os.stat_result:
        if number == fuse.ROOT_ID:
            return os.fstat(self._root(tag).descriptor)
        node = self._nodes.node(tag, number)
        status = self._look(tag, node.parent, node.name)
        if not node.is_still(status):
            raise self._stale(node)
        return status

    def _look(self, tag: int, parent: int, name: bytes) -> os.stat_result:
        directory = self._directory(tag, parent)
        return os.stat(name, dir_fd=directory.descriptor, follow_symlinks=False)

    def _attributes(self, status: os.stat_result) -> bytes:
        # The guest's programs run as root: what belongs to the user who started the job belongs to root there, as in a
        # user namespace. Otherwise programs that check ownership (git, ssh) refuse the user's own files.
        uid, gid = self._identity
        return fuse.attributes(status, uid=0 if status.st_uid == uid else status.st_uid,
                               gid=0 if status.st_gid == gid else status.st_gid)

    # -- operations ---------------------------------------------------------------------------------------------------------

    def _lookup(self, tag: int, parent: int, name: bytes) -> bytes:
        try:
            status = self._look(tag, parent, name)
        except FileNotFoundError:
            return fuse.negative_entry(VALID_S)
        return fuse.entry_reply(self._nodes.number(Node.of(tag, parent, name, status)), self._attributes(status), VALID_S)

    def _read_link(self, tag: int, number: int) -> bytes:
        node = self._nodes.node(tag, number)
        directory = self._directory(tag, node.parent)
        return os.readlink(node.name, dir_fd=directory.descriptor)

    def _open_node(self, tag: int, request: Request) -> bytes:
        if _well_formed(fuse.parse_open(request.body)) & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        if request.opcode == Opcode.OPENDIR:
            self._directory(tag, request.nodeid)
            return fuse.open_reply(request.nodeid, OpenFlag.KEEP_CACHE | OpenFlag.CACHE_DIR)
        self._file(tag, request.nodeid)
        return fuse.open_reply(request.nodeid, OpenFlag.KEEP_CACHE)

    def _file(self, tag: int, number: int) -> Handle:
        """A regular file, for reading."""
        node = self._nodes.node(tag, number)
        if node.type != stat.S_IFREG:
            # A device or fifo of the host is none of the guest's business; the guest's kernel opens its own by number.
            raise OSError(errno.EISDIR if node.type == stat.S_IFDIR else errno.EACCES, "not a regular file")
        return self._nodes.opened(number) or self._open_checked(node, number, self._directory(tag, node.parent), _FILE)

    def _read(self, tag: int, number: int, offset: int, size: int) -> bytes:
        file = self._file(tag, number)
        return os.pread(file.descriptor, size, offset)

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
        with self._listing_lock:
            if key in self._listings:
                self._listings.move_to_end(key)
                return self._listings[key]
        listing = _listed(self._directory(tag, number))
        with self._listing_lock:
            if key not in self._listings:  # else another thread was faster
                self._listings[key] = listing
                self._listed += len(listing)
                while len(self._listings) > self.LISTINGS or (len(self._listings) > 1 and self._listed > self._listed_limit):
                    self._listed -= len(self._listings.popitem(last=False)[1])
            return self._listings[key]


def _listed(directory: Handle) -> list[_Name]:
    """The names in a directory, sorted."""
    own = os.fstat(directory.descriptor).st_ino
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.descriptor)
    try:
        with os.scandir(readable) as entries:
            names = sorted((_Name(os.fsencode(entry.name), entry.inode(), _entry_type(entry)) for entry in entries),
                           key=lambda name: name.name)
    finally:
        os.close(readable)
    return [_Name(b".", own, stat.S_IFDIR), _Name(b"..", own, stat.S_IFDIR), *names]


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
