"""One virtual machine as the supervisor holds it: process, monitor, paging layer, agent port.

A VM is born as a *shell* (no guest in it), gets a guest by `load`, and then runs. Whatever ends it, `on_gone` is called once
with the cause, and nothing of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfparallel.errors import GuestError, ProtocolError, QmpError, StateError, VMError
from sfparallel.vmm import guest_frames
from sfparallel.vmm.agent_port import HIGH_WATER_BYTES, MOST_UNREAD_BYTES, AgentPort
from sfparallel.vmm.console import PERIOD_S, Console
from sfparallel.vmm.guest_events import EVENTS_PER_S, EventBudget
from sfparallel.vmm.guest_frames import Exited, Frozen, Woken
from sfparallel.vmm.layers import MemoryMap
from sfparallel.vmm.paging import PagingLayer, PagingRefused
from sfparallel.vmm.plans import MapPlan
from sfparallel.vmm.processes import address_space_hint
from sfparallel.vmm.qmp import Event, Qmp, reopened
from sfparallel.vmm.waiting import step_limit_s, within
from sfparallel.wire import Frame, FrameType, pack_names

log = logging.getLogger(__name__)

FREEZE_TIMEOUT_S = 30.0
"""A guest that has not stopped its programs within this time goes on, and the fork fails (a busy one needs milliseconds)."""

MOST_WHILE_FREEZING_BYTES = 256 << 20
"""What a guest may send from FREEZE to FROZEN. Its output is not held meanwhile, and one that prints on for ever would fill the
host's memory; an agent of ours empties two pipes, and passes on what its programs had asked for."""

_PORT_GRACE_S = 1.0
_KILL_GRACE_S = 2.0
_FRAME_COST_BYTES = 100


@dataclass(frozen=True)
class LoadTimes:
    """When the steps of a load ended, on the monotonic clock."""

    begun: float
    mapped: float
    loaded: float


class VmState(enum.Enum):
    """Life of a VM.

    SHELL -> LOADING -> STOPPED -> FROZEN -> RUNNING; a save goes RUNNING -> FREEZING -> FROZEN -> STOPPED -> FROZEN -> RUNNING,
    or back from FREEZING to RUNNING if the guest does not come to rest. GONE may follow any of them.
    """

    SHELL = "shell"
    LOADING = "loading"
    RUNNING = "running"
    FREEZING = "freezing"
    FROZEN = "frozen"
    STOPPED = "stopped"
    GONE = "gone"


@dataclass(frozen=True)
class Sockets:
    """Connected sockets (and the console's file) of one QEMU; the VM owns them."""

    qmp: socket.socket
    agent: socket.socket
    paging: socket.socket
    console: int


@dataclass
class VmEvents:
    """What a VM reports; the owner sets these before the guest runs. Frames have passed `guest_frames.check`."""

    on_frame: Callable[[Vm, Frame], None] = lambda vm, frame: None
    on_exited: Callable[[Vm, Exited], None] = lambda vm, report: None
    on_room: Callable[[Vm], None] = lambda vm: None
    on_gone: Callable[[Vm, str], None] = lambda vm, cause: None
    waits_for: Callable[[Vm], list[str]] = lambda vm: []
    """Files of the host that it has asked for, and waits for."""


class Vm:
    """One VM.

    Args:
        name: for messages ("parent", "clone 7").
        pid: the QEMU process; 0 if it is in another PID namespace: a libvirt daemon started it.
        sockets: its sockets, connected.
    """

    def __init__(self, name: str, pid: int, sockets: Sockets, *, child: bool, number: int = 0) -> None:
        self.name = name
        self.pid = pid
        self.number = number
        self._state = VmState.SHELL
        self.events = VmEvents()
        self.memory: MemoryMap | None = None
        self.disks: tuple[Path, ...] = ()
        self.ram_address = 0
        self.ram_bytes = 0
        self.woken: asyncio.Future[Woken] = asyncio.get_running_loop().create_future()
        self.save_lock = asyncio.Lock()
        """Held by who saves it, from before it freezes until it is thawed."""
        self.closing = contextlib.ExitStack()
        self.started = self.ready = time.monotonic()
        self.woken_at: float | None = None
        self.cause = ""
        """Why it is gone, or was ended."""
        self.failure = ""
        """What its agent said when it gave up."""
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._console = Console(sockets.console)
        self._agent_socket = sockets.agent
        self._port = AgentPort(self.frame_received, self.end, self._port_closed, self._port_has_room)
        self._frozen: asyncio.Future[Frozen] | None = None
        self._freeze_abandoned = False
        self._held: list[Frame] = []
        self._held_bytes = 0
        self._while_freezing = 0
        self._room: asyncio.Future[None] | None = None
        self._budget = EventBudget(self.started)
        self._dying: asyncio.TimerHandle | None = None
        self._pidfd = os.pidfd_open(pid) if pid else None
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._exited)
        self.qmp = Qmp(sockets.qmp, name, on_event=self._event, on_close=self._monitor_closed)
        self.paging = PagingLayer(sockets.paging, name=name, on_violation=self.end)
        self._trimming = self._loop.call_later(PERIOD_S, self._trim_console)

    @property
    def state(self) -> VmState:
        return self._state

    @state.setter
    def state(self, state: VmState) -> None:
        """Raises VMError if it is gone: it may have ended together with the answer that its owner has just waited for."""
        if self._state is VmState.GONE:
            raise VMError(f"{self.name}: {self.cause or 'it is gone'}")
        self._state = state

    # -- start and end ---------------------------------------------------------------------------------------------

    async def prepare(self, ram_bytes: int) -> None:
        """Connect to a started QEMU; afterwards it is a shell.

        Raises:
            VMError: QEMU ended, or does not answer; the message has what it printed.
        """
        try:
            async with within(step_limit_s(), "QEMU's monitor"):
                await self._negotiate()
            self.ram_bytes = ram_bytes
            async with within(step_limit_s(), "its paging layer"):
                await self.paging.hello()
            await self.connect_port()
            self.ready = time.monotonic()
        except VMError as error:
            output = self.console_tail()
            message = f"{self.name} did not start: {error}" + (f"\n{output}" if output else "")
            raise VMError(message, hint=address_space_hint()) from error

    async def _negotiate(self) -> None:
        await self.qmp.negotiate()
        # The end of loading is told by an event only when asked for.
        capability = {"capability": "events", "state": True}
        events = self.qmp.send("migrate-set-capabilities", capabilities=[capability])
        found = await self.qmp.monitor("gpa2hva 0")
        await events
        address = re.search(r"is (?:0x)?([0-9a-f]+)\s*$", found.strip())
        if not address:
            raise VMError(f"{self.name}: QEMU did not report the address of guest memory: {found[:200]!r}")
        self.ram_address = int(address[1], 16)

    async def connect_port(self) -> None:
        """Begin to take frames from the agent."""
        await self._loop.create_unix_connection(lambda: self._port, sock=self._agent_socket)

    def kill(self) -> None:
        """End the VM at once. `on_gone` follows when the kernel has reaped it."""
        if self.state is VmState.GONE:
            return
        self._dying = self._dying or self._loop.call_later(_KILL_GRACE_S, self._give_up)
        if self._pidfd is None:
            self.paging.close()  # which the library inside QEMU takes as the order to end
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _give_up(self) -> None:
        """It was killed, and does not end: the kernel keeps it (state D), or it is in another PID namespace and stands still.
        Nobody is to wait for its answers."""
        if self._pidfd is None:
            self._exited()
        else:
            self.qmp.close()

    @contextlib.contextmanager
    def ended_if_cancelled(self) -> Iterator[None]:
        """Whoever is cancelled in this block leaves the VM in an unknown state. It is ended before anything else is done, so that
        what still waits for its answers comes to an end."""
        try:
            yield
        except asyncio.CancelledError:
            self.kill()
            raise

    def end(self, cause: str) -> None:
        """End the VM at once, for a reason that its owner is to be told."""
        self.cause = self.cause or cause
        self.kill()

    def end_later(self, cause: str, delay_s: float) -> None:
        """End the VM if it has not ended by itself by then."""
        self._loop.call_later(delay_s, self.end, cause)

    def _port_closed(self) -> None:
        # A QEMU that ends closes its files first. How it ended says more than that it did: leave it the time to do so.
        self.end_later("its agent port closed", _PORT_GRACE_S)

    def _monitor_closed(self, why: str) -> None:
        if why:
            self.end(why)
        if self._pidfd is None and self.state is not VmState.GONE:
            self._exited()

    def _exited(self) -> None:
        """The process has ended: release everything, tell the owner why."""
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        cause = self.cause
        if self._child:
            with contextlib.suppress(ChildProcessError):
                _, status = os.waitpid(self.pid, 0)
                code = os.waitstatus_to_exitcode(status)
                if not cause:
                    cause = _describe_exit(code)
        if not cause:
            cause = "its QEMU process is gone"
        self.state = VmState.GONE
        self.qmp.close()
        self.paging.close()
        # Frames that the guest sent before it died are still in the socket, and may say why it did.
        self._port.drain(self._agent_socket.fileno())
        if not self._port.close():
            self._agent_socket.close()
        self._trimming.cancel()
        if self._dying:
            self._dying.cancel()
        error = VMError(f"{self.name}: {cause}")
        for future in (self._frozen, self.woken):
            if future and not future.done():
                future.set_exception(error)
                future.exception()
        self._let_go_on()
        self.closing.close()
        self.cause = self.cause or cause
        # Not now: what its last frames ask for (the answer of a clone, say) is dealt with by tasks that are about to run.
        self._loop.call_soon(self._tell_end)

    def _tell_end(self) -> None:
        self.events.on_gone(self, self.cause)
        # The VM, its monitor and its port refer to each other, until the collector comes; its map is as large as half a MiB.
        self.memory = None
        self._console.close()

    def console_tail(self) -> str:
        """The end of what the guest's console printed."""
        return self._console.tail()

    def _trim_console(self) -> None:
        self._console.trim()
        self._trimming = self._loop.call_later(PERIOD_S, self._trim_console)

    # -- the guest -------------------------------------------------------------------------------------------------

    def require(self, *states: VmState) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"{self.name} is {self.state.value}; this call requires {wanted}")

    async def warm(self, code_bytes: int) -> None:
        """Let QEMU allocate memory for code that it will translate, all at once and not page by page when it runs.

        Raises:
            VMError: QEMU ended.
        """
        self.require(VmState.SHELL)
        try:
            async with within(step_limit_s(), f"{self.name} to allocate its memory"):
                await self.paging.warm(code_bytes)
        except PagingRefused as error:
            log.info("%s; it will be slower to wake", error)

    async def map_ahead(self, plan: MapPlan) -> None:
        """Lay an image over a shell that waits; a `load` with a plan that has it as base maps only what differs.

        Raises:
            VMError: the paging layer refused; the VM is unusable.
        """
        self.require(VmState.SHELL)
        async with within(step_limit_s(), f"{self.name} to be mapped by an image"):
            await self.paging.map(self.ram_address, plan)
        self.memory = plan.memory_map

    async def load(self, plan: MapPlan, device_state: int) -> LoadTimes:
        """Give a shell a guest; it stands still until `resume`.

        Args:
            plan: the memory image, ready to be mapped; its base is what `map_ahead` has mapped, if it has.
            device_state: descriptor of the device state; only duplicated here.

        Raises:
            VMError: QEMU or the paging layer refused; the VM is unusable.
        """
        self.require(VmState.SHELL)
        self.state = VmState.LOADING
        started = time.monotonic()
        await self.paging.map(self.ram_address, plan)
        mapped = time.monotonic()
        # The plan's map, not the checkpoint's: short gaps of zero pages are mapped from a layer too, which must be held.
        self.memory = plan.memory_map
        done = self.qmp.expect(lambda event: event["event"] == "MIGRATION" and
                               event["data"].get("status") in ("completed", "failed"))  # fmt: skip
        with reopened(device_state, os.O_RDONLY) as state:
            named = self.qmp.send("getfd", fds=[state], fdname="state")
        loading = self.qmp.send("migrate-incoming", uri="fd:state")
        await named
        await loading
        event = await done
        if event["data"]["status"] != "completed":
            raise VMError(f"{self.name}: QEMU could not load the device state")
        self.state = VmState.STOPPED
        return LoadTimes(started, mapped, time.monotonic())

    def send(self, kind: FrameType, payload: bytes = b"", channel: int = 0) -> None:
        """Send a frame to the agent.

        While the guest is being saved nothing may be under way to it: a clone would find the first bytes of a frame and never
        the rest. Such frames wait for `thaw`, and go to this VM only. The exception is the answer to a file request while it
        freezes: the agent says FROZEN only when it has all of them, and a process that waits for one stops only when it has it.
        """
        frame = Frame(kind, payload, channel)
        answers_file = self.state is VmState.FREEZING and kind is FrameType.FUSE_REPLY
        if self.state in (VmState.FREEZING, VmState.FROZEN, VmState.STOPPED) and not answers_file:
            self._held.append(frame)
            self._held_bytes += len(frame.payload) + _FRAME_COST_BYTES
            if self._held_bytes > MOST_UNREAD_BYTES:
                self._port.overflow()
        else:
            self._write(frame)

    def _write(self, frame: Frame) -> None:
        self._port.write(frame)

    @property
    def congested(self) -> bool:
        """So much waits for this VM to read that the files it asks for are better sent later; `on_room` tells when.

        What is held for a VM that freezes does not count: it freezes only when it has its files.
        """
        return self._port.congested

    def _is_full(self) -> bool:
        return self._port.congested or self._held_bytes > HIGH_WATER_BYTES

    async def room(self) -> None:
        """Wait until little waits for this VM, or it is gone."""
        while self._is_full() and self.state is not VmState.GONE:
            if not self._room:
                self._room = self._loop.create_future()
            await asyncio.shield(self._room)

    def _port_has_room(self) -> None:
        if not self._is_full():
            self._let_go_on()
        if not self.congested:
            self.events.on_room(self)

    def _let_go_on(self) -> None:
        room, self._room = self._room, None
        if room:
            room.set_result(None)

    def thaw(self, message: dict[str, Any]) -> None:
        """Let a frozen guest go on, or one that does not come to rest; `message` is the THAW map of the agent protocol."""
        self.require(VmState.FROZEN, VmState.FREEZING)
        # Then its FROZEN may be under way to us, and means nothing any more. WOKEN comes behind it.
        self._freeze_abandoned = self.state is VmState.FREEZING
        self._frozen = None
        self.state = VmState.RUNNING
        # A parent's clock has stood still while it was saved. A clone finds the time in its identity.
        self._write(Frame(FrameType.THAW, pack_names({"time_ns": time.time_ns(), **message})))
        held, self._held, self._held_bytes = self._held, [], 0
        for frame in held:
            self._write(frame)
        if held:
            self._loop.call_soon(self._port_has_room)

    def hold(self) -> None:
        """Take nothing from the agent port until `release`: its programs' prints block, and all else that it asks for waits.

        Not while it freezes: FREEZE must come through, and what its programs can print until they stand still is little.
        """
        if self.state is not VmState.FREEZING:
            self._port.pause_reading()

    def release(self) -> None:
        """Take what comes from the agent port again."""
        self._port.resume_reading()

    def wait_frozen(self, timeout_s: float) -> Coroutine[Any, Any, Frozen]:
        """Wait for the agent's FROZEN frame (a boot ends with one): it may come from this call on, also before the `await`.

        Raises:
            GuestError: it does not come in time.
        """
        self._frozen = self._loop.create_future()
        return self._wait_frozen(self._frozen, timeout_s)

    async def _wait_frozen(self, frozen: asyncio.Future[Frozen], timeout_s: float) -> Frozen:
        try:
            return await asyncio.wait_for(frozen, timeout_s)
        except TimeoutError:
            self._frozen = None
            message = f"{self.name}: the guest's processes did not freeze within {timeout_s:.0f} s"
            if files := self.events.waits_for(self):
                raise GuestError(f"{message}: one of them waits for the host's {', '.join(files[:3])}",
                                 hint="the server of that folder does not answer") from None
            raise GuestError(f"{message}\n{self.console_tail()}".rstrip(),
                             hint="one of them may be stuck in the guest's kernel") from None

    async def freeze(self, limit_s: float = FREEZE_TIMEOUT_S) -> None:
        """Bring guest and agent port to a clean cut: no byte is under way in either direction. File requests are answered
        meanwhile.

        Raises:
            GuestError: the guest does not come to rest. It is still FREEZING: `thaw` lets it go on.
        """
        self.require(VmState.RUNNING)
        self.state = VmState.FREEZING
        self._while_freezing = 0
        self.release()
        self._write(Frame(FrameType.FREEZE))
        await self.wait_frozen(limit_s)

    @contextlib.asynccontextmanager
    async def devices_to(self, file: int) -> AsyncIterator[str]:
        """Make a file (a memfd) known to QEMU, so that nothing but the save itself is left to do while the VM is stopped.

        Yields:
            The name by which QEMU opens it.
        """
        # QEMU looks for a descriptor with exactly the access mode that it would open the file with.
        with reopened(file, os.O_WRONLY) as writable:
            added = await self.qmp.execute("add-fd", fds=[writable])
        number = added.get("fdset-id") if isinstance(added, dict) else None
        if type(number) is not int:
            raise VMError(f"{self.name}: QEMU did not report the number of a descriptor")
        try:
            with self.ended_if_cancelled():
                yield f"/dev/fdset/{number}"
        finally:
            with contextlib.suppress(QmpError):  # of one that is ending: why is known, or told by whatever comes next
                await self.qmp.execute("remove-fd", fdset_id=number)

    async def stop_and_save(self, devices: str) -> asyncio.Future[float]:
        """Stop the virtual CPUs and begin to write CPU and device state, without memory, to a file of `devices_to`.

        Guest memory does not change from here on: to write the state of a device only reads it. (QEMU's own migration sends
        all memory before it.)

        Returns:
            When the CPUs stand still: a future that must be awaited, for the time (monotonic clock) at which the state was
            written.
        """
        self.require(VmState.FROZEN)
        stopping = self.qmp.send("stop")
        saving = self.qmp.send("xen-save-devices-state", filename=devices, live=False)
        self.state = VmState.STOPPED

        async def saved() -> float:
            await saving
            return time.monotonic()

        written = self._loop.create_task(saved())
        try:
            with self.ended_if_cancelled():
                await stopping
        except BaseException:
            await asyncio.gather(written, return_exceptions=True)
            raise
        return written

    async def resume(self) -> None:
        """Let the virtual CPUs run; the guest's programs stay frozen until `thaw`."""
        self.require(VmState.STOPPED)
        await self.qmp.execute("cont")
        self.state = VmState.FROZEN

    # -- what QEMU and the agent say ---------------------------------------------------------------------------------

    def frame_received(self, frame: Frame) -> None:
        """Deal with a frame.

        Raises:
            ProtocolError: no agent sends this, or not now.
        """
        guest_frames.check(frame)
        if self.state in (VmState.FROZEN, VmState.STOPPED):
            # What is sent now would be lost in every clone, and answers to it would find the guest asleep.
            raise ProtocolError(f"it sent {frame.type.name} while it was frozen")
        if self.state is VmState.FREEZING:
            self._while_freezing += len(frame.payload) + _FRAME_COST_BYTES
            if self._while_freezing > MOST_WHILE_FREEZING_BYTES:
                raise ProtocolError(f"it sent {MOST_WHILE_FREEZING_BYTES >> 20} MiB after it was told to freeze")
        match frame.type:
            case FrameType.FROZEN:
                report = guest_frames.frozen(frame)
                if self._freeze_abandoned:
                    return
                if self.state is VmState.FREEZING:
                    self.state = VmState.FROZEN
                if self._frozen and not self._frozen.done():
                    self._frozen.set_result(report)
                self._frozen = None
            case FrameType.WOKEN:
                report_of_wake = guest_frames.woken(frame)
                self._freeze_abandoned = False
                if not self.woken.done():
                    self.woken_at = time.monotonic()
                    self.woken.set_result(report_of_wake)
            case FrameType.FAILED:
                self.failure = guest_frames.failed(frame)
                self.end(f"its agent gave up: {self.failure}")
            case FrameType.EXITED:
                self.events.on_exited(self, guest_frames.exited(frame))
            case _:
                self.events.on_frame(self, frame)

    def _event(self, event: Event) -> None:
        if not self._budget.allows(event["event"], time.monotonic()):
            self.end(f"its QEMU reports more than {EVENTS_PER_S:.0f} events a second; the last one was {event['event']}")
            return
        match event["event"]:
            # CRASHLOADED is a panic, too: of a kernel that has another one loaded to look into it, which ours has not.
            case "GUEST_PANICKED" | "GUEST_CRASHLOADED":
                self.end("guest kernel panic")
            case "SHUTDOWN":
                reason = str(event["data"].get("reason", ""))[:guest_frames.MAX_TEXT_CHARS]
                if not self.cause and reason not in ("host-signal", "host-qmp-quit"):
                    self.cause = f"the guest ended ({reason})"
            case "STOP" if event["data"].get("reason") == "io-error":
                self.end("an I/O error on one of its disks")


def _describe_exit(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"its QEMU process was killed by {name}"
    return f"its QEMU process ended with status {code}"


__all__ = ["QmpError", "Sockets", "Vm", "VmEvents", "VmState"]
