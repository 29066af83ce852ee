"""What the file server remembers of the host's files: their numbers, and descriptors of some of them.

Threads share it. Its lock is held for look-ups only, never while the kernel is asked for a file: one whose file system does not
answer must not stop the others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count

from sfparallel.vmm.fuse_wire import ROOT_ID

_SECOND_CHANCES = 64
"""Folders that are passed over in the search for a file to forget; then a folder is forgotten."""


@dataclass(frozen=True, slots=True)
class Node:
    """A file as a guest knows it: a name in a directory, and which file stood there when the guest looked."""

    tag: int
    parent: int
    name: bytes
    device: int
    inode: int
    type: int

    @classmethod
    def of(cls, tag: int, parent: int, name: bytes, status: os.stat_result) -> Node:
        return cls(tag, parent, name, status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode))

    def is_still(self, status: os.stat_result) -> bool:
        return (status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)) == (self.device, self.inode, self.type)


class Handle:
    """A descriptor. It is closed when the last one who uses it lets go of it, by that one: close(2) of a file that was opened on
    FUSE waits for its server (FUSE_FLUSH); of a folder (O_PATH) never."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


class _Kept:
    """Open descriptors by node, the one used longest ago first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.handles: OrderedDict[int, Handle] = OrderedDict()

    def get(self, number: int) -> Handle | None:
        handle = self.handles.get(number)
        if handle:
            self.handles.move_to_end(number)
        return handle

    def put(self, number: int, handle: Handle) -> list[Handle]:
        """Returns what there is no more room for."""
        surplus = [self.handles.popitem(last=False)[1] for _ in range(len(self.handles) + 1 - self.limit)]
        self.handles[number] = handle
        return surplus


class NodeTable:
    """Files by number, for all exports of a job.

    Args:
        nodes: files remembered at most.
        open_files: descriptors kept at most.
        slow: exports whose files may have to wait for a server to be closed. A quarter of the descriptors is for these, so that
            they are let go of only by who asks for others of their kind.
    """

    def __init__(self, nodes: int, open_files: int, slow: Collection[int] = ()) -> None:
        self._lock = threading.Lock()
        self._node_limit = nodes
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._numbers: dict[Node, int] = {}
        self._next_number = count(ROOT_ID + 1)
        self._slow = frozenset(slow)
        self._slow_files = _Kept(max(open_files // 4, 1) if slow else 0)
        self._open = _Kept(open_files - self._slow_files.limit)
        self._surplus = threading.local()
        self._closed = False

    def __len__(self) -> int:
        return len(self._nodes)

    def close(self) -> None:
        """Close what is open. It may wait for files' servers."""
        with self._lock:
            self._closed = True
            handles = [*self._open.handles.values(), *self._slow_files.handles.values()]
            self._open.handles.clear()
            self._slow_files.handles.clear()
        handles.clear()

    def node(self, tag: int, number: int) -> Node:
        """Raises OSError (ESTALE) if it is not known (any more)."""
        with self._lock:
            return self._node(tag, number)

    def directory(self, tag: int, number: int) -> Node:
        """Raises OSError: it is not known, or no directory."""
        node = self.node(tag, number)
        if node.type != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return node

    def number(self, node: Node) -> int:
        """The number of a file, a new one if it has none."""
        with self._lock:
            number = self._numbers.get(node)
            if number is None:
                self._forget_surplus()
                number = self._numbers[node] = next(self._next_number)
                self._nodes[number] = node
            else:
                self._nodes.move_to_end(number)
            return number

    def opened(self, number: int) -> Handle | None:
        """Its descriptor, if it is open."""
        with self._lock:
            return self._open.get(number) or self._slow_files.get(number)

    def nearest(self, tag: int, number: int) -> tuple[Handle | None, list[int]]:
        """From a folder up to its nearest ancestor that is open (None: the export itself); and what is to be opened on the way
        down, innermost first."""
        missing: list[int] = []
        with self._lock:
            # A loop, as a path may have 2,000 parts.
            while number != ROOT_ID and number not in self._open.handles:
                missing.append(number)
                number = self._node(tag, number).parent
            if number != ROOT_ID and self._node(tag, number).type != stat.S_IFDIR:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory")
            return self._open.get(number), missing

    def keep(self, number: int, node: Node, handle: Handle) -> None:
        """Keep a descriptor for the next who asks. What was used longest ago is closed instead: at once, or by
        `surplus` where that may have to wait."""
        with self._lock:
            is_slow = node.tag in self._slow and node.type != stat.S_IFDIR
            kept = self._slow_files if is_slow else self._open
            if self._closed or number in kept.handles:
                return  # it is all over, or another thread was faster: this handle goes when its user is done
            surplus = kept.put(number, handle)
        if is_slow:
            self._surplus.__dict__.setdefault("handles", []).extend(surplus)

    def surplus(self) -> Callable[[], None] | None:
        """What closes the descriptors that this thread's requests have left behind; None if there are none."""
        handles: list[Handle] = self._surplus.__dict__.pop("handles", [])
        return handles.clear if handles else None

    def path(self, number: int) -> bytes:
        """Where a file was seen, relative to its export, for messages."""
        names: list[bytes] = []
        with self._lock:
            while (node := self._nodes.get(number)) is not None:
                names.append(node.name)
                number = node.parent
        return b"/".join(reversed(names))

    def _node(self, tag: int, number: int) -> Node:
        node = self._nodes.get(number)
        if node is None or node.tag != tag:
            raise OSError(errno.ESTALE, "no such node")
        self._nodes.move_to_end(number)
        return node

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
        # If it is open, that descriptor will be the one used longest ago: no number is given twice.
        del self._numbers[self._nodes.pop(number)]
