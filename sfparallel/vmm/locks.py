"""Locks by flock(2), which end with their holders, however these end: of builders, on a file beside the one that they build; of
jobs, on the files that they use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def hold(path: Path, on_wait: Callable[[], None]) -> int:
    """Hold an exclusive lock until the returned descriptor is closed.

    Args:
        path: the lock's file; made if it is not there. Its folder must be there.
        on_wait: called before it waits for another holder.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # `sf clean` removes the files of free locks: a lock on a file without a name keeps nobody out.
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """`hold` for the length of a block."""
    descriptor = hold(path, on_wait)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder itself, which keeps out nobody but others who do the same."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def use(path: Path) -> bool:
    """Mark a file as in use until this process ends; False if it no longer exists.

    The descriptor is left open on purpose: the kernel drops the lock however the process ends. A removal holds the lock
    only for a moment, so this rarely waits.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if _is_at(descriptor, path):
        return True
    os.close(descriptor)
    return False


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Hold a file's exclusive lock during a block if it is free; yields whether it was. The lock of a missing file is free."""
    try:
        descriptor = _open_for_exclusive(path)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        free = False
    else:
        free = True
    try:
        yield free
    finally:
        os.close(descriptor)


def _open_for_exclusive(path: Path) -> int:
    """On NFS a file must be open for writing to be locked exclusively (flock(2): EBADF otherwise). Folders cannot be, nor files
    of a read-only file system: there, as on any local one, it makes no difference."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EROFS, errno.EACCES):
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def is_lock(path: Path) -> bool:
    """Whether a file of the cache folder is a builder's lock."""
    return path.suffix == ".lock" or path.name.startswith(".lock-")


def of_builder(path: Path) -> Path:
    """The file that the builder of an unfinished entry of the cache folder has locked."""
    name = path.name
    if name.startswith(".doomed-"):
        return path
    if name.startswith(".build-"):  # an image; others may have the same name before the hyphen
        return path.with_name(f".lock-{name.removeprefix('.build-')}")
    if name.startswith(".") and "-" in name:  # a template
        return path.with_name(f"{name[1:].partition('-')[0]}.lock")
    if path.suffix == ".part":  # an image of data
        return path.with_name(f"{name.partition('-')[0]}.lock")
    return path
