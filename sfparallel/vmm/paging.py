"""Client of the paging layer: the library inside each QEMU that lays memory images over guest RAM and commits to them.

`native/sfpage.h` describes the packets. Ownership of descriptors: the caller keeps every descriptor that it passes in; what
travels to QEMU are the kernel's duplicates, which the library closes before it answers.
"""

from __future__ import annotations

import array
import asyncio
import enum
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from sfparallel.errors import Closed, PagingError, ProtocolError
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap, Records, check_runs
from sfparallel.vmm.plans import CommitMode, CommitPlan, MapPlan

_MAGIC = 0x47504653
_VERSION = 1
_REQUEST = struct.Struct("<IHHIIQQII")
_REPLY = struct.Struct("<IHHIiII8Q")
_INTACT = 1
_REMAPPED = 2
_PLAIN_PAGEMAP = 4
_HAS_PAGEMAP_SCAN = 1
_MAX_ERRNO = 4095


class _Operation(enum.IntEnum):
    HELLO = 1
    MAP = 2
    COMMIT = 3
    STATS = 4
    PREPARE = 5
    SETTLE = 6
    WARM = 7


class PagingStep(enum.IntEnum):
    """The step of an operation that failed."""

    NONE = 0
    RECEIVE = 1
    ARGUMENTS = 2
    RANGE = 3
    EXTENTS = 4
    FILES = 5
    BUDGET = 6
    MMAP = 7
    SOURCES = 8
    SCAN = 9
    MEMORY = 10
    WRITE = 11
    PUNCH = 12
    RUNS = 13
    MADVISE = 14
    STATS = 15
    POPULATE = 16


class ScanMethod(enum.Enum):
    """How private pages are found: AUTO prefers the PAGEMAP_SCAN ioctl (Linux 6.7), PAGEMAP reads /proc/self/pagemap."""

    AUTO = "auto"
    PAGEMAP = "pagemap"


class PagingRefused(PagingError):
    """The library answered a request with an error.

    Attributes:
        errno: the error number of the system call, or the library's own.
        step: which step failed.
        memory_intact: guest memory is as it was; the VM may be resumed. Otherwise it must be discarded.
    """

    def __init__(self, message: str, *, errno: int, step: PagingStep, memory_intact: bool, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno
        self.step = step
        self.memory_intact = memory_intact


@dataclass(frozen=True)
class PagingHello:
    """What the library says about itself.

    Attributes:
        version: of the protocol.
        page_bytes: page size of the host.
        pagemap_scan: the kernel has the PAGEMAP_SCAN ioctl.
        max_mappings: vm.max_map_count, the most mappings a process may have.
        pid: QEMU's process id in its own PID namespace.
    """

    version: int
    page_bytes: int
    pagemap_scan: bool
    max_mappings: int
    pid: int


@dataclass(frozen=True)
class MapResult:
    """Times of a `map`, in nanoseconds."""

    check_ns: int
    map_ns: int


@dataclass(frozen=True)
class CommitResult:
    """What a commit did.

    Attributes:
        runs: records of dtype `layers.RUN`; `MemoryMap.apply` takes them.
        remapped: the VM shares the target now. If False the image is complete all the same, but the VM's mappings are not
            as the new map says: `map` it (after `MemoryMap.flatten`, usually) before it is committed again, or discard it.
        remap_step: why not, if `remapped` is False (NONE with CommitMode.NO_REMAP).
        dirty_pages: pages that were private; `stored_pages` of them went to the target, `zero_pages` were zero, and the others
            were what their layer holds already.
        scan_ns: time to find them; then `copy_ns`, `remap_ns`, and `total_ns` for everything.
    """

    runs: Records
    remapped: bool
    remap_step: PagingStep
    dirty_pages: int
    stored_pages: int
    zero_pages: int
    scan_ns: int
    copy_ns: int
    remap_ns: int
    total_ns: int


@dataclass(frozen=True)
class PagingStatistics:
    """Memory of a VM.

    Attributes:
        private_pages: pages of guest memory that this VM alone has: written since the last commit or map.
        file_pages: pages of guest memory mapped from layers at this moment.
        process_private_bytes: Private_Clean + Private_Dirty of the QEMU process. Includes layer pages that no other process
            happens to map just now; `process_anonymous_bytes` does not.
        process_anonymous_bytes: what the process has that is no file's page.
        mappings: mappings of the process; the kernel allows `max_mappings`.
    """

    private_pages: int
    file_pages: int
    process_private_bytes: int
    process_anonymous_bytes: int
    mappings: int
    max_mappings: int


def control_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair for `PagingLayer` (first, non-blocking) and for a QEMU to inherit (second; close it after the start)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


@dataclass(frozen=True)
class _Reply:
    operation: int
    serial: int
    errno: int
    flags: int
    step: PagingStep
    values: tuple[int, ...]


_NO_REPLY = _Reply(0, 0, 0, 0, PagingStep.NONE, ())


def _decode(data: bytes) -> _Reply:
    """Read a reply. A guest that has taken its QEMU over can say anything here.

    Raises:
        ProtocolError: no paging layer says this.
    """
    if len(data) != _REPLY.size:
        size = f"more than {_REPLY.size}" if len(data) > _REPLY.size else str(len(data))
        raise ProtocolError(f"a reply of {size} bytes")
    magic, version, operation, serial, status, step, flags, *values = _REPLY.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        raise ProtocolError(f"it is of version {version}, not {_VERSION}", hint="rebuild it: make -C sfparallel/vmm/native")
    if not -_MAX_ERRNO <= status <= 0 or step > max(PagingStep):
        raise ProtocolError(f"a reply with the status {status} at step {step}")
    return _Reply(operation, serial, -status, flags, PagingStep(step), tuple(values))


class PagingLayer:
    """The paging layer of one QEMU. When its connection closes, that QEMU ends at once.

    Requests may come from several tasks; they go out one at a time. A request that is cancelled is carried out by QEMU all
    the same, but its outcome is lost: after a cancelled `map` or `commit` the VM should be discarded. An answer that violates the
    protocol is a PagingError of the request that waits for one.

    Args:
        control: connected SOCK_SEQPACKET socket, owned by this object from then on.
        name: of the VM, for messages.
        scan: how private pages are found.
        on_violation: called with what it said that no paging layer says. The connection is closed by then; a QEMU that its guest
            has taken over may not care.
    """

    def __init__(
        self,
        control: socket.socket,
        name: str = "VM",
        *,
        scan: ScanMethod = ScanMethod.AUTO,
        on_violation: Callable[[str], None] = lambda why: None,
    ) -> None:
        control.setblocking(False)
        self._control: socket.socket | None = control
        self._name = name
        self._scan_flag = _PLAIN_PAGEMAP if scan is ScanMethod.PAGEMAP else 0
        self._on_violation = on_violation
        self._lock = asyncio.Lock()
        self._serial = 0
        self._unanswered: deque[int] = deque()
        """Serial numbers of requests, in the order of their answers."""

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], name: str = "VM", *, scan: ScanMethod = ScanMethod.AUTO) -> Self:
        """Connect to a library that listens at `path`; it does from before QEMU's `main` on.

        Raises:
            PagingError: nobody listens there.
        """
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            control.setblocking(False)
            await asyncio.get_running_loop().sock_connect(control, os.fspath(path))
        except OSError as error:
            control.close()
            raise PagingError(f"{name}: no paging layer at {os.fspath(path)}: {error}",
                              hint="look into QEMU's log; the library must be readable for QEMU") from error
        except BaseException:
            control.close()
            raise
        return cls(control, name=name, scan=scan)

    async def hello(self) -> PagingHello:
        """Ask the library who it is.

        Raises:
            PagingError: QEMU ended, or the library does not fit.
        """
        values = (await self._call(_Operation.HELLO)).values
        if values[0] != PAGE_BYTES:
            raise PagingError(f"{self._name}: the host's pages have {values[0]} bytes, only {PAGE_BYTES} are supported")
        return PagingHello(version=_VERSION, page_bytes=values[0], pagemap_scan=bool(values[1] & _HAS_PAGEMAP_SCAN),
                           max_mappings=values[2], pid=values[3])

    async def map(self, address: int, plan: MapPlan) -> MapResult:
        """Lay an image over guest memory, copy-on-write. The VM must not run meanwhile.

        Args:
            address: where guest memory begins in QEMU (`gpa2hva 0`).
            plan: the image; of exactly the size of guest memory.

        Raises:
            PagingRefused: see `memory_intact`.
            PagingError: QEMU ended.
        """
        reply = await self._call(_Operation.MAP, plan.fds, address=address, length=plan.memory_map.size_bytes,
                                 extents=plan.extents.array.size)
        return MapResult(check_ns=reply.values[0], map_ns=reply.values[1])

    async def commit(self, address: int, memory_map: MemoryMap, target: int, target_number: int,
                     mode: CommitMode = CommitMode.FRESH, *, layers: Mapping[int, int] | None = None) -> CommitResult:
        """`carry_out` of a plan that is made now; see there, and `CommitPlan`."""
        with CommitPlan(memory_map, target, target_number, mode, layers=layers) as plan:
            return await self.carry_out(address, plan)

    async def prepare(self, address: int, plan: CommitPlan) -> int:
        """Make ready what `carry_out` of the same plan will need, while the VM runs; `settle` must follow it, or follow that.

        Args:
            address: where guest memory begins in QEMU.
            plan: what will be carried out.

        Returns:
            The number of pages that need only be copied now.

        Raises:
            PagingRefused: there was no memory, say. The commit can be carried out all the same; it takes longer.
            PagingError: QEMU ended.
        """
        reply = await self._call(_Operation.PREPARE, plan.fds, flags=plan.mode | self._scan_flag, address=address,
                                 length=plan.size_bytes, target=plan.target_number)
        if reply.values[0] > plan.page_count:
            raise self._violation(ProtocolError(f"{reply.values[0]} prepared pages of {plan.page_count}"))
        return reply.values[0]

    async def settle(self) -> None:
        """Free what `prepare` and `carry_out` left behind. It is only ordered here: QEMU does it while the VM runs.

        Raises:
            PagingError: QEMU ended.
        """
        await self._call(_Operation.SETTLE, wait=False)

    async def carry_out(self, address: int, plan: CommitPlan) -> CommitResult:
        """Store the pages that the VM changed since it was mapped or committed last. The VM must not run meanwhile.

        Args:
            address: where guest memory begins in QEMU.
            plan: from which map to which target; good for one commit.

        Raises:
            PagingRefused: guest memory is intact and the VM may go on; a fresh target is worth nothing, one that was
                committed to in place holds no usable image before a later commit succeeds (see `MemoryMap.distrusted`).
            PagingError: QEMU ended.
        """
        reply = await self._call(_Operation.COMMIT, plan.fds, flags=plan.mode | self._scan_flag, address=address,
                                 length=plan.size_bytes, target=plan.target_number)
        dirty, stored, zero, scan_ns, copy_ns, remap_ns, total_ns = reply.values[:7]
        try:
            if max(dirty, stored, zero, reply.values[7]) > plan.page_count:
                raise ProtocolError(f"a commit of more than the {plan.page_count} pages that there are")
            runs = plan.read_runs(reply.values[7])
            check_runs(runs, plan.page_count)
        except ProtocolError as error:
            raise self._violation(error) from error
        return CommitResult(runs=runs, remapped=bool(reply.flags & _REMAPPED), remap_step=reply.step, dirty_pages=dirty,
                            stored_pages=stored, zero_pages=zero, scan_ns=scan_ns, copy_ns=copy_ns, remap_ns=remap_ns,
                            total_ns=total_ns)

    async def statistics(self, address: int, size_bytes: int) -> PagingStatistics:
        """Measure the memory of the VM; costs some milliseconds.

        Raises:
            PagingError: QEMU ended, or refused.
        """
        reply = await self._call(_Operation.STATS, flags=self._scan_flag, address=address, length=size_bytes)
        return PagingStatistics(*reply.values[:6])

    async def warm(self, size_bytes: int) -> int:
        """Allocate memory that QEMU will write to when its guest runs: the first part of its buffer for translated code.

        Returns:
            The number of bytes that are allocated now: 0 with KVM, which translates nothing.

        Raises:
            PagingRefused: there was no memory, say. QEMU can be used all the same.
            PagingError: QEMU ended.
        """
        return (await self._call(_Operation.WARM, length=size_bytes)).values[0]

    def close(self) -> None:
        """Close the connection: QEMU ends at once."""
        if self._control is not None:
            self._control.close()
            self._control = None

    async def _call(self, operation: _Operation, fds: Sequence[int] = (), *, flags: int = 0, address: int = 0, length: int = 0,
                    extents: int = 0, target: int = 0, wait: bool = True) -> _Reply:
        async with self._lock:
            self._serial = (self._serial + 1) & 0xFFFFFFFF
            packet = _REQUEST.pack(_MAGIC, _VERSION, operation, self._serial, flags, address, length, extents, target)
            try:
                await self._send(packet, fds)
                self._unanswered.append(self._serial)
                # The answer to a request that nobody waits for is passed over by the next one that somebody does.
                return await self._receive(operation) if wait else _NO_REPLY
            except OSError as error:
                raise self._gone(operation, error) from error

    async def _send(self, packet: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            control = self._open()
            try:
                control.sendmsg([packet], ancillary)
                return
            except BlockingIOError:
                await _writable(control)

    async def _receive(self, operation: _Operation) -> _Reply:
        loop = asyncio.get_running_loop()
        while True:
            data = await loop.sock_recv(self._open(), _REPLY.size + 1)
            if not data:
                raise self._gone(operation)
            try:
                reply = _decode(data)
                # Each request is answered once: what answers none of them would keep the loop busy here without end.
                if reply.serial not in self._unanswered:
                    raise ProtocolError("an answer to what was not asked")
                while self._unanswered.popleft() != reply.serial:
                    pass
                if reply.serial != self._serial:  # the answer to a request that was cancelled, or not waited for
                    continue
                if reply.operation != operation:
                    raise ProtocolError(f"an answer to operation {reply.operation} where {operation.name} was asked for")
            except ProtocolError as error:
                raise self._violation(error) from error
            if reply.errno:
                raise self._refused(operation, reply.errno, reply.step, bool(reply.flags & _INTACT))
            return reply

    def _open(self) -> socket.socket:
        if self._control is None:
            raise Closed(f"{self._name}: the connection to the paging layer was closed")
        return self._control

    def _violation(self, error: ProtocolError) -> PagingError:
        """What follows is not to be understood, and what it says of guest memory not to be believed."""
        self.close()
        why = f"its paging layer violated the protocol: {error.message}"
        self._on_violation(why)
        return PagingError(f"{self._name}: {why}", hint=error.hint)

    def _gone(self, operation: _Operation, error: OSError | None = None) -> PagingError:
        reason = f": {error.strerror}" if error else ""
        return PagingError(f"{self._name}: QEMU ended during {operation.name.lower()}{reason}",
                           hint="its standard error output (or libvirt's log) says why")

    def _refused(self, operation: _Operation, number: int, step: PagingStep, intact: bool) -> PagingRefused:
        return PagingRefused(
            f"{self._name}: {operation.name.lower()} failed at {step.name.lower()}: {os.strerror(number)}"
            + ("" if intact else "; its memory is lost"),
            errno=number, step=step, memory_intact=intact, hint=_HINTS.get((step, number)) or _HINTS.get((step, 0)))


_HINTS: dict[tuple[PagingStep, int], str] = {
    (PagingStep.BUDGET, 0): "raise vm.max_map_count (sysctl), or merge layers with MemoryMap.flatten",
    (PagingStep.MMAP, errno.ENOMEM): "raise vm.max_map_count (sysctl), or merge layers with MemoryMap.flatten",
    (PagingStep.RECEIVE, errno.EMFILE): "raise the limit of open files (ulimit -n) for QEMU",
    (PagingStep.WRITE, errno.ENOSPC): "free memory or disk space where the memory image is kept",
    (PagingStep.WRITE, errno.ENOMEM): "free memory on the host, or fork from a smaller parent",
    (PagingStep.FILES, errno.ENODATA): "a layer file is shorter than guest memory: truncate it to that size",
    (PagingStep.SCAN, 0): "/proc/self/pagemap must be readable for QEMU",
}


async def _writable(control: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    fd = control.fileno()
    loop.add_writer(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_writer(fd)
