"""Brings the files that the ranks of a whole program (`sfrun --spmd`) changed back into the host's folders.

Each rank works on a private copy of the folders and sends what it changed when its program has ended. Files of different ranks
come together as they would on a shared disk, where that is clear: the same content is no conflict, and who writes a file wins
against who deletes it. Where it is not, the version of the lowest rank stays, and the rank that brings another one is told so,
which makes the job fail: nothing is lost in silence.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfparallel.errors import ProtocolError
from sfparallel.vmm.copy_back import ChangeKind, CopyBack, FileChange, request_id, shown

Key = tuple[int, bytes]
"""An export's tag, and a path below it."""


class _Rank:
    """One rank's way to the host.

    Attributes:
        digests: of files in transfer, so that there are no more than `CopyBack.TRANSFERS`.
    """

    def __init__(self, exports: Mapping[int, Path]) -> None:
        self.copy = CopyBack(exports)
        self.digests: dict[Key, Any] = {}


class RankFiles:
    """One job's. Ranks may bring their files in threads of their own, one at a time for each rank.

    Args:
        exports: host folders by tag, as given to the file server.
    """

    FILES = 1 << 20
    """Files that ranks can have written in all: each is remembered."""

    def __init__(self, exports: Mapping[int, Path]) -> None:
        self._exports = dict(exports)
        self._ranks: dict[int, _Rank] = {}
        self._lock = threading.Lock()
        self._settling: weakref.WeakValueDictionary[Key, threading.Lock] = weakref.WeakValueDictionary()
        """Whose file stays is decided for one rank after the other; those who bring other files do not wait for that."""
        self._written: dict[Key, tuple[int, bytes]] = {}
        """By whom, and a fingerprint of what: its first byte is the kind."""

    @property
    def problems(self) -> list[str]:
        """What could not be written, one line each."""
        return [problem for rank in list(self._ranks.values()) for problem in rank.copy.problems]

    @property
    def used(self) -> bool:
        """Whether a rank has begun to bring changes back."""
        return bool(self._ranks)

    def handle(self, rank: int, request: Mapping[Any, Any]) -> dict[str, Any]:
        """Read and apply one request of a rank; see `CopyBack.handle`."""
        # Ranks send at the same time, and a transfer is known by its path.
        with self._lock:
            known = self._ranks.get(rank)
        if known is None:
            known = self._ranks[rank] = _Rank(self._exports)
        copy = known.copy
        try:
            change = FileChange.decode(request)
        except ProtocolError:
            answer = copy.handle(request)  # which refuses it
        else:
            answer = {"id": request_id(request), **self._apply(rank, known, change)}
        if "ok" not in answer:
            for key in [key for key in known.digests if not copy.is_under_way(key)]:
                del known.digests[key]
        return answer

    def _apply(self, rank: int, known: _Rank, change: FileChange) -> dict[str, Any]:
        copy = known.copy
        match change.kind:
            case ChangeKind.BEGIN:
                answer = copy.apply(change)
                known.digests[change.key] = hashlib.sha256()
                return answer
            case ChangeKind.DATA:
                _add(known.digests, change)
                return copy.apply(change)
            case ChangeKind.COMMIT:
                digest = known.digests.pop(change.key, None)
                content = b"f" + (digest.digest() if digest else b"") + str(change.size).encode()
            case ChangeKind.SYMLINK:
                content = b"l" + hashlib.sha256(change.data).digest()
            case ChangeKind.MKDIR:
                content = b"d"
            case ChangeKind.DELETE:
                content = b""
        with self._lock:
            settling = self._settling.setdefault(change.key, threading.Lock())
        with settling:
            if content:
                return self._settle(rank, copy, change, content)
            # What another rank has written it cannot have meant.
            return {"ok": True} if change.key in self._written else copy.apply(change)

    def close(self) -> None:
        """Remove what is not whole, and close every descriptor."""
        for rank in list(self._ranks.values()):
            rank.copy.close()

    def _settle(self, rank: int, copy: CopyBack, change: FileChange, content: bytes) -> dict[str, Any]:
        owner, known = self._written.get(change.key, (rank, b""))
        if not known or (known == content and content == b"d"):
            return self._write(owner, copy, change, content)
        if known == content:
            copy.discard(change.key)
            return {"ok": True}
        answer: dict[str, Any] = {"ok": True}
        if rank < owner and known[:1] == content[:1]:
            answer = self._write(rank, copy, change, content)
        else:
            copy.discard(change.key)
        if "ok" not in answer:
            return answer
        first, second = sorted((rank, owner))
        where = shown(self._exports[change.tag], change.path)
        message = (f"ranks {first} and {second} both wrote {where!r}, with different content; that of rank "
                   f"{self._written[change.key][0]} was kept (put the rank into the file's name, or let one rank write it)")
        return {"error": "conflict", "message": message}

    def _write(self, rank: int, copy: CopyBack, change: FileChange, content: bytes) -> dict[str, Any]:
        if change.key not in self._written and len(self._written) >= self.FILES:
            copy.discard(change.key)
            return {"error": "io", "message": f"the ranks have written {self.FILES} files; no more are accepted"}
        answer = copy.apply(change)
        # What could not be written is nothing that another rank's file could contradict.
        if "ok" in answer:
            self._written[change.key] = rank, content
        return answer


def _add(digests: Mapping[Key, Any], change: FileChange) -> None:
    digest = digests.get(change.key)
    # A hole may be sent as zeros or not at all.
    if digest is not None and change.data.strip(b"\0"):
        digest.update(f"{change.offset}:{len(change.data)}:".encode())
        digest.update(change.data)
