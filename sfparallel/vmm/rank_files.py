"""Brings the files that the ranks of a whole program (`sfrun --spmd`) changed back into the host's folders.

Each rank works on a private copy of the folders and sends what it changed when its program has ended. Files of different ranks
come together as they would on a shared disk, where that is clear: the same content is no conflict, and who writes a file wins
against who deletes it. Where it is not, the version of the lowest rank stays, and the rank that brings another one is told so,
which makes the job fail: nothing is lost in silence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfparallel.vmm.copy_back import CopyBack

Key = tuple[int, bytes]
"""An export's tag, and a path below it."""


class RankFiles:
    """One job's.

    Args:
        exports: host folders by tag, as given to the file server.
    """

    def __init__(self, exports: Mapping[int, Path]) -> None:
        self._exports = dict(exports)
        self._copies: dict[int, CopyBack] = {}
        self._digests: dict[tuple[int, Key], Any] = {}
        self._written: dict[Key, tuple[int, bytes]] = {}
        """By whom, and a fingerprint of what: its first byte is the kind."""

    @property
    def problems(self) -> list[str]:
        """What could not be written, one line each."""
        return [problem for copy in self._copies.values() for problem in copy.problems]

    @property
    def used(self) -> bool:
        """Whether a rank has begun to bring changes back."""
        return bool(self._copies)

    def handle(self, rank: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """Apply one request of a rank; see `CopyBack.handle`."""
        # Ranks send at the same time, and a transfer is known by its path.
        copy = self._copies.get(rank)
        if copy is None:
            copy = self._copies[rank] = CopyBack(self._exports)
        tag, path = request.get("tag"), request.get("path")
        if not isinstance(tag, int) or not isinstance(path, bytes):
            return copy.handle(request)  # which refuses it
        key = tag, path
        match request.get("kind"):
            case "begin":
                self._digests[rank, key] = hashlib.sha256()
                return copy.handle(request)
            case "data":
                self._add(rank, key, request)
                return copy.handle(request)
            case "commit":
                digest = self._digests.pop((rank, key), None)
                content = b"f" + (digest.digest() if digest else b"") + str(request.get("size")).encode()
            case "symlink":
                content = b"l" + repr(request.get("data")).encode()
            case "mkdir":
                content = b"d"
            case "delete":
                # What another rank has written it cannot have meant.
                return {"id": request.get("id"), "ok": True} if key in self._written else copy.handle(request)
            case _:
                return copy.handle(request)
        return self._settle(rank, copy, key, content, request)

    def close(self) -> None:
        """Remove what is not whole, and close every descriptor."""
        for copy in self._copies.values():
            copy.close()

    def _add(self, rank: int, key: Key, request: Mapping[str, Any]) -> None:
        digest, data, offset = self._digests.get((rank, key)), request.get("data"), request.get("offset")
        # A hole may be sent as zeros or not at all.
        if digest is not None and isinstance(data, bytes) and isinstance(offset, int) and data.strip(b"\0"):
            digest.update(f"{offset}:{len(data)}:".encode())
            digest.update(data)

    def _settle(self, rank: int, copy: CopyBack, key: Key, content: bytes, request: Mapping[str, Any]) -> dict[str, Any]:
        owner, known = self._written.get(key, (rank, b""))
        if not known or (known == content and content == b"d"):
            self._written[key] = owner, content
            return copy.handle(request)
        if known == content:
            copy.discard(*key)
            return {"id": request.get("id"), "ok": True}
        answer: dict[str, Any] = {"id": request.get("id"), "ok": True}
        if rank < owner and known[:1] == content[:1]:
            self._written[key] = rank, content
            answer = copy.handle(request)
        else:
            copy.discard(*key)
        if "ok" not in answer:
            return answer
        first, second = sorted((rank, owner))
        where = os.path.join(os.fsencode(self._exports[key[0]]), key[1]).decode("utf-8", "backslashreplace")
        message = (f"ranks {first} and {second} both wrote {where!r}, with different content; that of rank "
                   f"{self._written[key][0]} was kept (put the rank into the file's name, or let one rank write it)")
        return {"id": request.get("id"), "error": "conflict", "message": message}
