"""Starting QEMU: raw shells for clones, the VM that boots a template, and the libvirt-managed parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sfparallel import native
from sfparallel.errors import EnvironmentProblem, UsageError, VMError
from sfparallel.net.network import CloneNetwork
from sfparallel.vmm.launcher import Launcher
from sfparallel.vmm.libvirt_domain import Connection
from sfparallel.vmm.machine import (
    DATA_SLOTS,
    Boot,
    Confinement,
    DomainPaths,
    Endpoints,
    MachineSpec,
    arguments,
    data_disk,
    domain_xml,
)
from sfparallel.vmm.qmp import reopened
from sfparallel.vmm.record import PARENT
from sfparallel.vmm.vm import Sockets, Vm, VmState

LIBRARY = Path(__file__).parent / "native" / "libsfpage.so"
"""The paging layer, loaded into each QEMU."""

# Descriptors as QEMU sees them.
_QMP, _AGENT, _PAGING, _CONSOLE, _TAP = 3, 4, 5, 6, 7
_ENDPOINTS = Endpoints(qmp=_QMP, agent=_AGENT, console=_CONSOLE, tap=_TAP)
_CONNECT_TIMEOUT_S = 10.0


def require_library() -> None:
    """Raises EnvironmentProblem when the native paging layer has not been built."""
    if not LIBRARY.exists():
        raise EnvironmentProblem(f"the paging layer {LIBRARY.name} is not built", hint="run `make build`")


def start_launcher(spec: MachineSpec) -> Launcher:
    """Start what makes the shells of a job.

    Raises:
        VMError: QEMU cannot be run.
    """
    return Launcher.start(arguments(spec, _ENDPOINTS), str(LIBRARY))


async def start_shell(
    spec: MachineSpec,
    number: int,
    network: CloneNetwork | None,
    *,
    launcher: Launcher | None = None,
    boot: Boot | None = None,
    name: str = "",
) -> Vm:
    """Start a raw QEMU: a shell with its port on the clone network or, with `boot`, a VM that boots a guest.

    Everything that it talks through is a descriptor handed over at the start, so that no name is left in any file system.

    Args:
        launcher: from `start_launcher` with the same `spec`, to make the shell with; a QEMU is started anew without one.

    Raises:
        VMError: QEMU did not start; nothing is left.
    """
    name = name or f"clone {number}"
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        def pair(kind: int) -> tuple[socket.socket, socket.socket]:
            mine, other = socket.socketpair(socket.AF_UNIX, kind)
            theirs.callback(other.close)
            ours.callback(mine.close)
            return mine, other

        qmp, their_qmp = pair(socket.SOCK_STREAM)
        agent, their_agent = pair(socket.SOCK_STREAM)
        paging, their_paging = pair(socket.SOCK_SEQPACKET)
        console = os.memfd_create("sf-console", os.MFD_CLOEXEC)
        ours.callback(os.close, console)
        # QEMU takes a descriptor of a set only if its access mode is the one that it would open the file with.
        for_qemu = theirs.enter_context(reopened(console, os.O_WRONLY | os.O_APPEND))
        fds = {_QMP: their_qmp.fileno(), _AGENT: their_agent.fileno(), _PAGING: their_paging.fileno(), _CONSOLE: for_qemu}
        if network:
            # A port outlives its VM: the next one of that number takes it over, which costs nothing.
            port = network.ports.get(number) or network.add_port(number)
            port.drain()
            fds[_TAP] = port.tap_fd
        if launcher:
            pid = await launcher.launch(fds | {1: for_qemu, 2: for_qemu}, _PAGING)
        else:
            argv = arguments(spec, replace(_ENDPOINTS, tap=_TAP if network else None), boot)
            environment = {"PATH": os.environ.get("PATH", ""), "LD_PRELOAD": str(LIBRARY), "SFPAGE_FD": str(_PAGING)}
            try:
                pid = native.spawn(argv, output=for_qemu, fds=fds, env=environment)
            except OSError as error:
                raise VMError(f"{name}: cannot run {spec.qemu}: {error}", hint="see `sf doctor`") from error
        vm = Vm(name, pid, Sockets(qmp, agent, paging, console), child=True, number=number)
        vm.disks = spec.data_images
        ours.pop_all()
    try:
        await vm.prepare(spec.memory_bytes)
        if spec.code_bytes and not boot:
            await vm.warm(spec.code_bytes)
    except BaseException:
        vm.kill()
        raise
    return vm


def _connect(path: Path, kind: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(_CONNECT_TIMEOUT_S)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise VMError(f"parent: cannot connect to its {path.name}: {error}") from error
    return sock


async def start_parent(spec: MachineSpec, connection: Connection, network: CloneNetwork, name: str) -> Vm:
    """Start the parent's domain, empty and paused, as a shell.

    Raises:
        VMError: libvirt or QEMU refused; nothing is left.
    """
    folder = connection.folder
    paths = DomainPaths(qmp=folder / "qmp", agent=folder / "agent", paging=folder / "page", console=folder / "console")
    confinement = None if connection.embedded else Confinement(os.geteuid(), os.getegid(), connection.security_models())
    xml = domain_xml(spec, name, paths, LIBRARY, confinement)
    domain = await asyncio.to_thread(connection.start, xml)
    with contextlib.ExitStack() as undo:
        undo.callback(domain.destroy)
        paging = _connect(paths.paging, socket.SOCK_SEQPACKET)
        undo.callback(paging.close)
        qmp = _connect(paths.qmp, socket.SOCK_STREAM)
        undo.callback(qmp.close)
        agent = _connect(paths.agent, socket.SOCK_STREAM)
        undo.callback(agent.close)
        # The library inside QEMU made this socket itself, so that its peer is QEMU and not libvirt.
        pid, _, _ = struct.unpack("3i", paging.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        console = os.open(paths.console, os.O_RDONLY | os.O_CLOEXEC)
        # The embedded driver's QEMU is an orphan, and so a child of the job's init: this process (see vmm.confinement).
        vm = Vm(PARENT, pid, Sockets(qmp, agent, paging, console), child=connection.embedded)
        undo.pop_all()
    try:
        await vm.prepare(spec.memory_bytes)
        port = network.add_port(0)
        await vm.qmp.execute("getfd", fds=[port.tap_fd], fdname="tap")
        await vm.qmp.execute("netdev_add", type="tap", id="tap0", fd="tap")
        await vm.qmp.execute("netdev_add", type="hubport", id="hub-to-tap", hubid=0, netdev="tap0")
    except BaseException:
        vm.kill()
        raise
    return vm


async def plug_data_disks(vm: Vm, images: Sequence[Path]) -> None:
    """Hot-plug data disks into the next free slots of a VM that runs, or of a shell that is to load the state of one.

    What a VM has is part of its checkpoints: a shell can load a state only with the same devices at the same addresses.

    Raises:
        UsageError: there are not so many slots.
        StateError: the VM is just being saved.
        VMError: QEMU refused.
    """
    vm.require(VmState.RUNNING, VmState.SHELL)
    if len(vm.disks) + len(images) > DATA_SLOTS:
        raise UsageError(f"{vm.name} can have {DATA_SLOTS} data disks at most")
    for image in images:
        node, device = data_disk(image, len(vm.disks))
        await vm.qmp.execute("blockdev-add", **node)
        await vm.qmp.execute("device_add", **device)
        vm.disks = (*vm.disks, image)
