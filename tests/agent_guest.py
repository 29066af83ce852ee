"""A guest with its agent, without engine or supervisor: raw QEMU, its port and its monitor.

A guest is booted once and its state kept in a file (QEMU's own migration); every test gets a VM that wakes up from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sfparallel import bootstrap
from sfparallel.errors import ImageMissing
from sfparallel.vmm import image
from sfparallel.vmm.job import GUEST_BOOTSTRAP
from sfparallel.vmm.machine import Accelerator, MachineSpec
from sfparallel.vmm.options import Program
from sfparallel.wire import Frame, FrameParser, FrameType, pack, unpack
from tests.conftest import HANG_S

PATIENCE_S = HANG_S
QUIET_S = 0.3
COMMAND_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/root"}


class Monitor:
    """A QMP connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb", 0)
        self._file.readline()
        self.events: list[dict[str, Any]] = []
        self("qmp_capabilities")

    def __call__(self, command: str, descriptor: int | None = None, **arguments: object) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._connection, [message], [] if descriptor is None else [descriptor])
        while True:
            answer = self._read()
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("QEMU is gone")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        self._file.close()
        self._connection.close()

    def event(self, name: str, **data: object) -> None:
        """Wait for an event with this data."""
        while not any(event["event"] == name and data.items() <= event["data"].items() for event in self.events):
            self._read()

    def migrate(self, command: str, descriptor: int) -> None:
        """Write the VM's state to a file, or read it from there, to the end."""
        self("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self("getfd", descriptor, fdname="state")
        self(command, uri="fd:state")
        self.event("MIGRATION", status="completed")


class Guest:
    """A VM on sockets."""

    def __init__(self, chosen: image.Image, console: Path, state: int | None = None) -> None:
        self.console = console
        port, their_port = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        self._port = port
        self._parser = FrameParser()
        self._frames: list[Frame] = []
        self.taken = 0
        self.answer_fuse: Callable[[int, bytes], bytes | None] | None = None
        passed = [their_port.fileno(), their_monitor.fileno()]
        chosen_cpu = MachineSpec(Accelerator.TCG, cpus=1, memory_bytes=384 << 20, root_image=chosen.root).cpu_model
        argv = [
            "qemu-system-x86_64", "-M", "q35,usb=off,suppress-vmdesc=on", "-accel", "tcg", "-cpu", chosen_cpu,
            "-m", "384", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S",
            "-chardev", f"socket,id=agent,fd={passed[0]}", "-device", "virtio-serial-pci,addr=0x1",
            "-device", "virtserialport,nr=1,chardev=agent,name=sf.agent",
            "-blockdev", f"driver=file,filename={chosen.root},node-name=root,read-only=on",
            "-device", "virtio-blk-pci,drive=root,addr=0x2",
            "-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,addr=0x3,romfile=",
            "-device", "pvpanic", "-chardev", f"socket,id=monitor,fd={passed[1]}", "-mon", "chardev=monitor,mode=control",
            "-serial", f"file:{console}",
        ]  # fmt: skip
        if state is None:
            argv += ["-kernel", str(chosen.kernel), "-initrd", str(image.guest_half(chosen))]
            argv += ["-append", image.KERNEL_COMMAND_LINE]
        else:
            argv += ["-incoming", "defer"]
        self.process = subprocess.Popen(argv, pass_fds=passed, stderr=subprocess.DEVNULL)
        their_port.close()
        their_monitor.close()
        self.monitor = Monitor(monitor)
        if state is not None:
            os.lseek(state, 0, os.SEEK_SET)
            self.monitor.migrate("migrate-incoming", state)
        self.monitor("cont")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._port.close()
        self.monitor.close()

    # -- frames --

    def send(self, kind: FrameType, payload: bytes = b"", channel: int = 0) -> None:
        self._port.settimeout(PATIENCE_S)
        self._port.sendall(Frame(kind, payload, channel).encode())

    def wait_until_taken(self) -> None:
        """Wait, without reading, until QEMU has taken all that was sent, and so passed it on to the guest (unix(7), SIOCOUTQ)."""
        deadline = time.monotonic() + PATIENCE_S
        while struct.unpack("i", fcntl.ioctl(self._port, termios.TIOCOUTQ, bytes(4)))[0]:
            assert time.monotonic() < deadline, "QEMU does not read from the port"
            time.sleep(0.01)

    def _receive(self, timeout_s: float) -> None:
        self._port.settimeout(timeout_s)
        data = self._port.recv(1 << 16)
        if not data:
            raise EOFError(f"QEMU is gone; console:\n{self.console.read_text(errors='replace')[-3000:]}")
        for frame in self._parser.feed(data):
            if frame.type is FrameType.FUSE and self.answer_fuse:
                answer = self.answer_fuse(frame.channel, frame.payload)
                if answer is not None:
                    self.send(FrameType.FUSE_REPLY, answer, frame.channel)
            elif frame.type is FrameType.TAKEN:
                self.taken += 1
            else:
                self._frames.append(frame)

    def frame(self) -> Frame:
        while not self._frames:
            self._receive(PATIENCE_S)
        return self._frames.pop(0)

    def expect(self, kind: FrameType) -> Frame:
        """The next frame, which must be of this type."""
        frame = self.frame()
        assert frame.type is kind, frame
        return frame

    def skip_to(self, kind: FrameType) -> Frame:
        """The next frame of this type; output before it is dropped."""
        while (frame := self.frame()).type is not kind:
            assert frame.type is FrameType.OUTPUT, frame
        return frame

    def assert_silent(self) -> None:
        """Nothing comes for a while: this is the one wait that has no event to wait for."""
        with pytest.raises(TimeoutError):
            self._receive(QUIET_S)
        assert not self._frames and not self._parser.pending_bytes

    # -- the protocol --

    def thaw(self, who: dict[str, Any] | None = None, channel: int = 0, reply: bytes | None = None,
             mounts: list[list[Any]] | None = None) -> dict[str, Any]:  # fmt: skip
        self.send(FrameType.THAW, pack({"identity": who, "channel": channel, "reply": reply, "mounts": mounts or []}))
        return unpack(self.expect(FrameType.WOKEN).payload)

    def freeze(self) -> dict[str, Any]:
        self.send(FrameType.FREEZE)
        return unpack(self.skip_to(FrameType.FROZEN).payload)

    def run(self, code: str, *arguments: str, mode: str = "command", cwd: str = "/") -> None:
        words = Program(mode, (code, *arguments), Path(cwd), None).words
        environment = bootstrap.environment(COMMAND_ENVIRONMENT, {}, GUEST_BOOTSTRAP)
        self.send(FrameType.RUN, pack({"argv": words, "cwd": cwd, "env": environment}))

    def signal(self, number: int) -> None:
        self.send(FrameType.SIGNAL, number.to_bytes(4, "little"))

    def output_until(self, text: str) -> str:
        """Standard output up to a text."""
        seen = ""
        while text not in seen:
            frame = self.expect(FrameType.OUTPUT)
            seen += frame.payload.decode()
        return seen

    def ended(self) -> Ended:
        """All output until the program ends."""
        result = Ended()
        while (frame := self.frame()).type is not FrameType.EXITED:
            if frame.type is FrameType.OUTPUT:
                result.text[frame.channel] += frame.payload
            else:
                assert frame.type in (FrameType.GONE, FrameType.REQUEST), frame
        result.report = unpack(frame.payload)
        return result

    def execute(self, code: str, *arguments: str, **options: str) -> Ended:
        self.run(code, *arguments, **options)
        return self.ended()


@dataclass
class Ended:
    """A program that has ended."""

    text: dict[int, bytes] = field(default_factory=lambda: {1: b"", 2: b""})
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> str:
        return self.text[1].decode()

    @property
    def err(self) -> str:
        return self.text[2].decode()

    @property
    def status(self) -> int:
        """Exit status, or minus the signal."""
        return os.waitstatus_to_exitcode(self.report["status"])


def identity(role: str = "parent", number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "role": role, "time_ns": time.time_ns(), "entropy": secrets.token_bytes(64), "hostname": f"sf-{number}",
        "machine_id": secrets.token_hex(16), "mac": bytes([10, 83, 70, 0, 0, number]), "address": f"10.83.0.{number}",
        "prefix": 16, "mtu": 9000, "neighbours": [["10.83.0.77", bytes([10, 83, 70, 0, 0, 77])]], **changes,
    }  # fmt: skip


@pytest.fixture(name="booted", scope="module")
def booted_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[image.Image, int]]:
    """A guest that has booted to its first FROZEN, as the descriptor of a state file."""
    try:
        chosen = image.find()
    except ImageMissing as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("booted")
    guest = Guest(chosen, folder / "console")
    state = os.open(folder / "state", os.O_RDWR | os.O_CREAT)
    try:
        assert unpack(guest.expect(FrameType.FROZEN).payload) == {"oom_kills": 0, "agent": "1"}
        guest.assert_silent()
        guest.monitor("stop")
        guest.monitor.migrate("migrate", state)
        assert "sfagent" not in (folder / "console").read_text(errors="replace")
        guest.close()
        yield chosen, state
    finally:
        guest.close()
        os.close(state)


@pytest.fixture(name="frozen")
def frozen_fixture(booted: tuple[image.Image, int], tmp_path: Path) -> Iterator[Guest]:
    """A VM resumed from there: it waits for THAW."""
    chosen, state = booted
    guest = Guest(chosen, tmp_path / "console", state)
    try:
        yield guest
    finally:
        guest.close()


@pytest.fixture(name="guest")
def guest_fixture(frozen: Guest) -> Guest:
    """The same as a parent, thawed."""
    frozen.thaw(identity())
    return frozen
