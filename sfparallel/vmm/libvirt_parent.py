"""The parent as a libvirt domain (`--connect`): started empty and paused, as a shell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

from sfparallel.errors import SfError, VMError
from sfparallel.net.network import CloneNetwork
from sfparallel.vmm.confinement import Places
from sfparallel.vmm.libvirt_domain import Connection
from sfparallel.vmm.machine import Confinement, DomainPaths, MachineSpec, domain_xml
from sfparallel.vmm.native_parts import LIBRARY
from sfparallel.vmm.record import PARENT
from sfparallel.vmm.vm import Sockets, Vm
from sfparallel.vmm.waiting import in_thread, step_limit_s, within

_LIBVIRT_LIMIT_S = 120.0
_CLOSE_LIMIT_S = 1.0


async def start_domain(
    spec: MachineSpec, uri: str, places: Places, network: CloneNetwork, name: str, stack: contextlib.AsyncExitStack
) -> Vm:
    """Start the parent's domain.

    Args:
        name: of the domain.
        stack: what closes the connection, at the end of the job.

    Raises:
        EnvironmentProblem: libvirt cannot be reached.
        VMError: libvirt or QEMU refused; nothing is left.
    """
    async with within(_LIBVIRT_LIMIT_S, f"the libvirt connection {uri}", hint="check that this daemon runs; see `sf doctor`"):
        connection = await in_thread(Connection, uri, places.private, places.public)
    stack.push_async_callback(_close, connection)
    folder = connection.folder
    paths = DomainPaths(qmp=folder / "qmp", agent=folder / "agent", paging=folder / "page", console=folder / "console")
    models: tuple[str, ...] = ()
    if not connection.embedded:
        async with within(_LIBVIRT_LIMIT_S, "libvirt to name its security models",
                          hint="check that this daemon runs; see `sf doctor`"):  # fmt: skip
            models = await in_thread(connection.security_models)
    confinement = None if connection.embedded else Confinement(os.geteuid(), os.getegid(), models)
    xml = domain_xml(spec, name, paths, LIBRARY, confinement)
    async with within(_LIBVIRT_LIMIT_S, "libvirt to start the parent", hint="see libvirt's log of this domain"):
        domain = await in_thread(connection.start, xml)
    try:
        async with within(step_limit_s(), "the sockets of the parent's QEMU"):
            vm = await _connected(paths)
    except BaseException:
        with contextlib.suppress(SfError):  # it goes with the connection as well
            async with within(_CLOSE_LIMIT_S, "libvirt to destroy the parent"):
                await in_thread(domain.destroy)
        raise
    try:
        await vm.prepare(spec.memory_bytes)
        async with within(step_limit_s(), "QEMU to plug the parent's tap"):
            await _plug_tap(vm, network)
    except BaseException:
        vm.kill()
        raise
    return vm


async def _close(connection: Connection) -> None:
    # It would close with the process as well, and a libvirt that hangs cannot keep the job.
    with contextlib.suppress(SfError):
        async with within(_CLOSE_LIMIT_S, "libvirt to close the connection"):
            await in_thread(connection.close)


async def _connect(path: Path, kind: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, str(path))
    except OSError as error:
        sock.close()
        raise VMError(f"parent: cannot connect to its {path.name}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _connected(paths: DomainPaths) -> Vm:
    with contextlib.ExitStack() as undo:
        paging = await _connect(paths.paging, socket.SOCK_SEQPACKET)
        undo.callback(paging.close)
        qmp = await _connect(paths.qmp, socket.SOCK_STREAM)
        undo.callback(qmp.close)
        agent = await _connect(paths.agent, socket.SOCK_STREAM)
        undo.callback(agent.close)
        # The library inside QEMU made this socket itself, so that its peer is QEMU and not libvirt.
        pid, _, _ = struct.unpack("3i", paging.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        console = os.open(paths.console, os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, console)
        try:
            # The embedded driver's QEMU is an orphan, and so a child of the job's init, which reaps it (see vmm.confinement).
            vm = Vm(PARENT, pid, Sockets(qmp, agent, paging, console), child=False)
        except ProcessLookupError as error:
            raise VMError("parent: its QEMU has ended already", hint="see libvirt's log of this domain") from error
        undo.pop_all()
    return vm


async def _plug_tap(vm: Vm, network: CloneNetwork) -> None:
    """Its NIC sits on a hub port, because libvirt opens no tap in our unnamed namespace; plug the tap into that hub."""
    port = network.add_port(0)
    await vm.qmp.execute("getfd", fds=[port.tap_fd], fdname="tap")
    await vm.qmp.execute("netdev_add", type="tap", id="tap0", fd="tap")
    await vm.qmp.execute("netdev_add", type="hubport", id="hub-to-tap", hubid=0, netdev="tap0")
