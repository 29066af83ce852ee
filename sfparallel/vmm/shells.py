"""Starting QEMU: shells for the parent and clones, and the VM that boots a template."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sfparallel import native
from sfparallel.errors import UsageError, VMError
from sfparallel.net.network import CloneNetwork
from sfparallel.vmm import native_parts
from sfparallel.vmm.command_errors import hint_for
from sfparallel.vmm.launcher import Launcher
from sfparallel.vmm.machine import (
    DATA_SLOTS,
    Boot,
    Endpoints,
    MachineSpec,
    arguments,
    data_disk,
)
from sfparallel.vmm.qmp import reopened
from sfparallel.vmm.record import PARENT
from sfparallel.vmm.vm import Sockets, Vm, VmState

# Descriptors as QEMU sees them.
_QMP, _AGENT, _PAGING, _CONSOLE, _TAP = 3, 4, 5, 6, 7
_ENDPOINTS = Endpoints(qmp=_QMP, agent=_AGENT, console=_CONSOLE, tap=_TAP)


def start_launcher(spec: MachineSpec) -> Launcher:
    """Start what makes the shells of a job.

    Raises:
        VMError: QEMU cannot be run.
    """
    return Launcher(arguments(spec, _ENDPOINTS), str(native_parts.LIBRARY))


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
            environment = {"PATH": os.environ.get("PATH", ""), **native_parts.environment(_PAGING)}
            try:
                pid = native.spawn(argv, output=for_qemu, fds=fds, env=environment)
            except OSError as error:
                raise VMError(f"{name}: cannot run {spec.qemu}: {error}", hint=hint_for(error)) from error
        try:
            vm = Vm(name, pid, Sockets(qmp, agent, paging, console), child=True, number=number)
        except BaseException:  # no descriptor for it, say: nobody else would reap it
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
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


async def start_parent(spec: MachineSpec, network: CloneNetwork, launcher: Launcher) -> Vm:
    """Start the parent, empty and paused: a shell as every other, so that parent and clones are one machine by construction.

    A template has no data disks, so that the parent gets those of `--data` when it runs (`plug_data_disks`). The launcher, whose
    shells have them from the start, cannot make it then.

    Raises:
        VMError: QEMU did not start; nothing is left.
    """
    without_disks = replace(spec, data_images=())
    return await start_shell(without_disks, 0, network, launcher=None if spec.data_images else launcher, name=PARENT)


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
