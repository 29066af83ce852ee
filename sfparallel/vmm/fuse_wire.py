"""The raw FUSE kernel protocol, as far as a read-only server needs it, without any I/O.

Layouts are those of `include/uapi/linux/fuse.h`, protocol 7.31 (Linux 5.4), which every later kernel still speaks: a kernel
takes the lower minor version of both sides, and the structures used here have not changed since. All integers are in the
guest's byte order, which is little endian on every machine that we run.
"""

from __future__ import annotations

import enum
import os
import stat
import struct
from dataclasses import dataclass

from sfparallel.errors import ProtocolError

MAJOR = 7
MINOR = 31
ROOT_ID = 1
MAX_NAME_BYTES = 255
MAX_READ_BYTES = 128 << 10
"""Largest READ and read-ahead. Larger ones gain nothing: the kernel's read-ahead stops at 128 KiB (VM_READAHEAD_PAGES)."""

MAX_REQUEST_BYTES = 132 << 10
"""Largest request that is looked at: a WRITE of the size that INIT allows, which is refused, and its header."""

PAGE_BYTES = 4096


class Opcode(enum.IntEnum):
    """Requests of the kernel (`enum fuse_opcode`)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


NO_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY})
"""Requests that the kernel sends without waiting: a reply to one would be refused with ENOENT."""

WRITING = frozenset({
    Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.LINK,
    Opcode.WRITE, Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.CREATE, Opcode.FALLOCATE, Opcode.RENAME2,
    Opcode.COPY_FILE_RANGE, Opcode.TMPFILE,
})


class InitFlag(enum.IntFlag):
    """Capabilities negotiated by INIT (`FUSE_*` in fuse.h)."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23


class OpenFlag(enum.IntFlag):
    """What an OPEN or OPENDIR reply allows the kernel (`FOPEN_*` in fuse.h)."""

    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3


_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_ATTR_VALID = struct.Struct("<QII")
_ENTRY = struct.Struct("<4Q2I")
ENTRY_BYTES = _ENTRY.size + _ATTR.size
_OPEN_OUT = struct.Struct("<QII")
_READ_IN = struct.Struct("<QQIIQII")
_DIRENT = struct.Struct("<QQII")
_STATFS = struct.Struct("<5Q4I24x")
_INIT_IN = struct.Struct("<4I")
_INIT_OUT = struct.Struct("<4I2H2I2HI28x")

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its header, taken apart, and what follows it; `fault` says what is wrong with its form."""

    opcode: int
    unique: int
    nodeid: int
    body: bytes
    fault: str = ""


def parse(data: bytes) -> Request:
    """Take a request apart.

    One that no kernel sends is taken apart all the same, and says so (`Request.fault`): whoever has sent it waits for its answer.

    Raises:
        ProtocolError: there is not even a header, and so nothing that could be answered.
    """
    if len(data) < _IN_HEADER.size:
        raise ProtocolError(f"FUSE request of {len(data)} bytes; its header alone has {_IN_HEADER.size}")
    length, opcode, unique, nodeid, _uid, _gid, _pid, extension_words, _ = _IN_HEADER.unpack_from(data)
    fault = ""
    if length != len(data):
        fault = f"FUSE request of {len(data)} bytes says that it has {length}"
    elif len(data) > MAX_REQUEST_BYTES:
        fault = f"FUSE request of {len(data)} bytes"
    elif extension_words:
        # Extensions (7.38, in units of 8 bytes) stand at the end; a server that negotiated 7.31 gets none.
        fault = "FUSE request with extensions, which were not negotiated"
    return Request(opcode, unique, nodeid, b"" if fault else data[_IN_HEADER.size:], fault)


def reply(request: Request, payload: bytes = b"") -> bytes:
    """A successful reply."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(payload), 0, request.unique) + payload


def error(request: Request, errno: int) -> bytes:
    """A reply that says `errno` (positive)."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -errno, request.unique)


def parse_name(body: bytes) -> bytes | None:
    """The file name of a LOOKUP; None when it is no name of a directory entry."""
    name = body.removesuffix(b"\0")
    if len(name) != len(body) - 1 or name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        return None
    return name


def parse_open(body: bytes) -> int | None:
    """The open(2) flags of an OPEN or OPENDIR."""
    return int.from_bytes(body[:4], "little") if len(body) == 8 else None


def parse_read(body: bytes) -> tuple[int, int] | None:
    """Offset and size of a READ, READDIR or READDIRPLUS; None when malformed. The size is cut to what was negotiated."""
    if len(body) != _READ_IN.size:
        return None
    _fh, offset, size, *_ = _READ_IN.unpack(body)
    return (offset, min(size, MAX_READ_BYTES)) if offset < 1 << 63 else None


def init_reply(body: bytes) -> bytes | None:
    """The answer to INIT: what both sides can, and our limits; None when the request is malformed or too old."""
    if len(body) < _INIT_IN.size:
        return None
    major, _minor, max_readahead, flags = _INIT_IN.unpack_from(body)
    if major < MAJOR:
        return None
    # READDIRPLUS_AUTO: attributes come with the first page of a listing, and further ones only while the program asks for
    # them; a page holds some 20 entries with attributes and 130 without.
    ours = (InitFlag.ASYNC_READ | InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO | InitFlag.PARALLEL_DIROPS
            | InitFlag.MAX_PAGES | InitFlag.CACHE_SYMLINKS)
    # A kernel with a newer major version repeats INIT with ours, as fuse.h asks.
    return _INIT_OUT.pack(MAJOR, MINOR, min(max_readahead, MAX_READ_BYTES), flags & ours, 64, 48, MAX_READ_BYTES, 1,
                          MAX_READ_BYTES // PAGE_BYTES, 0, 0)


def device_number(rdev: int) -> int:
    """A device number as the kernel writes it in 32 bits (`new_encode_dev`)."""
    major, minor = os.major(rdev), os.minor(rdev)
    return ((minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)) & _U32


def attributes(status: os.stat_result, *, uid: int, gid: int) -> bytes:
    """`struct fuse_attr`."""
    atime, atime_ns = divmod(status.st_atime_ns, 1_000_000_000)
    mtime, mtime_ns = divmod(status.st_mtime_ns, 1_000_000_000)
    ctime, ctime_ns = divmod(status.st_ctime_ns, 1_000_000_000)
    return _ATTR.pack(status.st_ino & _U64, status.st_size, status.st_blocks, atime & _U64, mtime & _U64, ctime & _U64,
                      atime_ns, mtime_ns, ctime_ns, status.st_mode, min(status.st_nlink, _U32), uid, gid,
                      device_number(status.st_rdev), PAGE_BYTES, 0)


def attributes_reply(attr: bytes, valid_s: int) -> bytes:
    """`struct fuse_attr_out`."""
    return _ATTR_VALID.pack(valid_s, 0, 0) + attr


def entry_reply(nodeid: int, attr: bytes, valid_s: int) -> bytes:
    """`struct fuse_entry_out`."""
    return _ENTRY.pack(nodeid, 0, valid_s, valid_s, 0, 0) + attr


def negative_entry(valid_s: int) -> bytes:
    """There is no such name, and the kernel may remember that: node 0 instead of ENOENT."""
    return _ENTRY.pack(0, 0, valid_s, 0, 0, 0) + bytes(_ATTR.size)


def open_reply(handle: int, flags: OpenFlag) -> bytes:
    """`struct fuse_open_out`."""
    return _OPEN_OUT.pack(handle, flags, 0)


def directory_entry(name: bytes, *, inode: int, next_offset: int, mode: int) -> bytes:
    """`struct fuse_dirent`, padded; of `mode` only the file type counts (0: unknown)."""
    head = _DIRENT.pack(inode & _U64, next_offset, len(name), stat.S_IFMT(mode) >> 12)
    return head + name + bytes(-len(name) % 8)


def statfs_reply(status: os.statvfs_result) -> bytes:
    """`struct fuse_statfs_out`."""
    return _STATFS.pack(status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree,
                        min(status.f_bsize, _U32), MAX_NAME_BYTES, min(status.f_frsize, _U32), 0)
