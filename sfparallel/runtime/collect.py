"""Files that clones wrote, brought back into the parent's tree (`collect="out/*.png"`).

A clone's file system is a private copy of the parent's. Before the fork the parent notes what is there; a clone compares, sends
what is new or changed, and the parent writes it under the same relative path, whole or not at all.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sfparallel.errors import CollectConflict, UsageError
from sfparallel.runtime.clone_messages import FileNote
from sfparallel.runtime.payload import IN_BAND_BYTES, Buffer

Stamp = tuple[int, int, int]
"""mtime in nanoseconds, size, inode: when all three are the same, the file is."""


def check_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Globs of `collect=`, checked.

    Raises:
        UsageError: one of them could reach outside the current folder.
    """
    if not isinstance(patterns, Iterable):
        raise UsageError(f"collect= takes a glob such as 'out/*.png', or a list of globs, not {patterns!r}")
    checked = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in checked:
        if not isinstance(pattern, str) or not pattern:
            raise UsageError(f"collect= takes globs such as 'out/*.png', not {pattern!r}")
        path = PurePosixPath(pattern)
        if path.is_absolute() or ".." in path.parts:
            raise UsageError(f"collect={pattern!r} leaves the current folder",
                             hint="write it relative to the current folder, without ..")
    return checked


def matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob (in parts) could have found a path (in parts), as `glob.glob(..., recursive=True)` does it."""
    if not pattern:
        return not path
    first, *rest = pattern
    if first == "**":
        return matches(path, rest) or bool(path and not path[0].startswith(".") and matches(path[1:], pattern))
    if not path or (path[0].startswith(".") and not first.startswith(".")):
        return False
    return fnmatch.fnmatchcase(path[0], first) and matches(path[1:], rest)


class Collector:
    """Collects the files of one region.

    Args:
        patterns: checked globs.
        root: folder to which they are relative.
    """

    def __init__(self, patterns: Sequence[str], root: Path) -> None:
        self._patterns = patterns
        self._root = root
        self._before = dict(self._scan())
        self._owners: dict[str, int] = {}
        self._files: dict[str, tuple[int, memoryview]] = {}
        self._conflicts: dict[str, tuple[int, int]] = {}

    def changed(self) -> tuple[list[dict[str, Any]], list[Buffer]]:
        """In a clone: descriptions and contents of files that are new or changed since the fork."""
        descriptions: list[dict[str, Any]] = []
        contents: list[Buffer] = []
        for path, stamp in self._scan():
            if self._before.get(path) == stamp:
                continue
            with open(self._root / path, "rb") as file:
                status = os.fstat(file.fileno())
                # A mapping is sent from the page cache as it is; it outlives the descriptor.
                contents.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                                if status.st_size > IN_BAND_BYTES else file.read())
            descriptions.append({"path": os.fsencode(path), "mode": status.st_mode & 0o777})
        return descriptions, contents

    def unwanted(self, notes: Sequence[FileNote]) -> str | None:
        """In the parent: a path that none of the globs could have found; None if there is none."""
        globs = [PurePosixPath(pattern).parts for pattern in self._patterns]
        return next((note.path for note in notes
                     if not any(matches(PurePosixPath(note.path).parts, pattern) for pattern in globs)), None)

    def receive(self, rank: int, notes: Sequence[FileNote], contents: Sequence[memoryview]) -> None:
        """In the parent: take a rank's files; they are written by `write`."""
        for (path, mode), content in zip(notes, contents, strict=True):
            if path in self._owners:
                self._conflicts.setdefault(path, (self._owners[path], rank))
                self._files.pop(path, None)
            else:
                self._owners[path] = rank
                self._files[path] = mode, content

    def write(self) -> None:
        """Write every file that one rank alone sent, each by rename.

        Raises:
            OSError: one of them could not be written; all others have been tried.
            CollectConflict: two ranks sent the same file; none of its versions is written.
        """
        failed: OSError | None = None
        for path in sorted(self._files):
            mode, content = self._files.pop(path)
            try:
                self._write_one(self._root / path, mode, content)
            except OSError as error:
                if failed is None:
                    error.add_note(f"while {path!r} of rank {self._owners[path]} was collected")
                    failed = error
        if failed is not None:
            raise failed
        for path, ranks in self._conflicts.items():
            first, second = sorted(ranks)
            raise CollectConflict(f"ranks {first} and {second} both wrote {path!r}; it was not collected", path=path,
                                  ranks=(first, second), hint="put the rank into the file's name, e.g. with sf.comm().rank")

    def _scan(self) -> Iterable[tuple[str, Stamp]]:
        seen: set[str] = set()
        for pattern in self._patterns:
            for path in glob.iglob(pattern, root_dir=self._root, recursive=True):
                full = self._root / path
                if path in seen or not full.is_file():
                    continue
                seen.add(path)
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    status = full.stat()
                    yield path, (status.st_mtime_ns, status.st_size, status.st_ino)

    @staticmethod
    def _write_one(target: Path, mode: int, content: memoryview) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        import tempfile  # late: it imports `random`, and a program may have a module of its own of that name

        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), mode)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
