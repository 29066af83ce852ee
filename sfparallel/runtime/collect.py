"""Files that clones wrote, brought back into the parent's tree (`collect="out/*.png"`).

A clone's file system is a private copy of the parent's. Before the fork the parent notes what is there; a clone compares, sends
what is new or changed, and the parent writes it under the same relative path, whole or not at all. Files belong to the key in
whose time they were written (a rank, an item of a map, a task), so that which of them conflict does not depend on which clone
had which item.
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


def check_patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...]:
    """Globs of `collect=`, checked; none for None.

    Raises:
        UsageError: one of them could reach outside the current folder.
    """
    if patterns is None:
        return ()
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


def unwanted(collector: Collector | None, notes: Sequence[FileNote]) -> str | None:
    """In the parent: a path that was sent and not asked for; None if there is none."""
    return collector.unwanted(notes) if collector is not None else next((note.path for note in notes), None)


class Collector:
    """Collects the files of one region, or of the tasks of a crew.

    Args:
        patterns: checked globs.
        root: folder to which they are relative.
        noun: what a key is called: "rank", "item" or "task".
    """

    def __init__(self, patterns: Sequence[str], root: Path, noun: str = "rank") -> None:
        self._patterns = patterns
        self._root = root
        self._noun = noun
        self._before = dict(self._scan())
        self._owners: dict[str, int] = {}
        self._files: dict[str, tuple[int, memoryview]] = {}
        self._conflicts: dict[str, tuple[int, int]] = {}
        self._written: set[str] = set()

    def changed(self) -> tuple[list[dict[str, Any]], list[Buffer]]:
        """In a clone: descriptions and contents of files that are new or changed since the fork, or since the last call."""
        descriptions: list[dict[str, Any]] = []
        contents: list[Buffer] = []
        for path, stamp in self._scan():
            if self._before.get(path) == stamp:
                continue
            self._before[path] = stamp
            with open(self._root / path, "rb") as file:
                status = os.fstat(file.fileno())
                # A mapping is sent from the page cache as it is; it outlives the descriptor.
                contents.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                                if status.st_size > IN_BAND_BYTES else file.read())
            descriptions.append({"path": os.fsencode(path), "mode": status.st_mode & 0o777})
        return descriptions, contents

    def skip(self) -> None:
        """In a clone: what was written until now is not collected (its item failed), nor taken for the next item's."""
        self._before = dict(self._scan())

    def unwanted(self, notes: Sequence[FileNote]) -> str | None:
        """In the parent: a path that none of the globs could have found; None if there is none."""
        globs = [PurePosixPath(pattern).parts for pattern in self._patterns]
        return next((note.path for note in notes
                     if not any(matches(PurePosixPath(note.path).parts, pattern) for pattern in globs)), None)

    def receive(self, key: int, notes: Sequence[FileNote], contents: Sequence[memoryview]) -> None:
        """In the parent: take the files of a key; they are written by `write`. Of a file that two keys sent, none is written that
        is not on the disk already."""
        for (path, mode), content in zip(notes, contents, strict=True):
            if path in self._owners:
                self._conflicts.setdefault(path, (self._owners[path], key))
                self._files.pop(path, None)
            else:
                self._owners[path] = key
                self._files[path] = mode, content

    def write(self) -> None:
        """Write what was received since the last call, each file by rename.

        Raises:
            OSError: one of them could not be written; all others have been tried.
            CollectConflict: two keys sent the same file.
        """
        failed: OSError | None = None
        for path in sorted(self._files):
            mode, content = self._files.pop(path)
            try:
                self._write_one(self._root / path, mode, content)
                self._written.add(path)
            except OSError as error:
                if failed is None:
                    error.add_note(f"while {path!r} of {self._noun} {self._owners[path]} was collected")
                    failed = error
        if failed is not None:
            raise failed
        conflicts, self._conflicts = self._conflicts, {}
        for path, keys in conflicts.items():
            first, second = sorted(keys)
            example = ", e.g. with sf.comm().rank" if self._noun == "rank" else ", e.g. by an argument of the function"
            raise CollectConflict(f"{self._noun}s {first} and {second} both wrote {path!r}; {self._outcome(path)}", path=path,
                                  ranks=(first, second), hint=f"put the {self._noun} into the file's name{example}")

    def _outcome(self, path: str) -> str:
        if path not in self._written:
            return "it was not collected"
        return f"that of {self._noun} {self._owners[path]} was collected"

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
