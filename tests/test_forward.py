"""Forwarded ports: TCP from the host to a VM, with a network stack of the kernel in the VM's place."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct

import pytest

from sfparallel import native
from sfparallel.errors import NetworkError, UsageError
from sfparallel.net import addresses, netlink
from sfparallel.net.network import CloneNetwork, Port
from tests.bare_network import needs_network
from tests.bare_network import nothing_left_fixture as nothing_left_fixture
from tests.conftest import HANG_S


class Guest:
    """A network stack at the other end of a port: a tap in a namespace of its own, frames carried over by the event loop."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self.namespace = native.new_network_namespace()
        with native.inside(self.namespace):
            self._tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            fcntl.ioctl(self._tap, 0x400454DA, struct.pack("=I", 7))  # TUNSETIFINDEX
            fcntl.ioctl(self._tap, 0x400454CA, struct.pack("=16sH22x", b"eth0", 0x1002))  # TUNSETIFF
            route = netlink.NetlinkSocket(netlink.NETLINK_ROUTE)
        link = struct.pack("=BxHiII", 0, 0, 7, 1, 1) + netlink.attribute(1, port.mac) + netlink.u32(4, 9000)
        packed = socket.inet_aton(port.address)
        address = struct.pack("=BBBBi", socket.AF_INET, 16, 0, 0, 7)
        address += netlink.attribute(2, packed) + netlink.attribute(1, packed)
        flags = netlink.NLM_F_ACK | netlink.NLM_F_CREATE
        route.transact([netlink.Message(16, netlink.NLM_F_ACK, link, "start eth0"),
                        netlink.Message(20, flags, address, "give eth0 an address")])  # fmt: skip
        route.close()
        loop = asyncio.get_running_loop()
        loop.add_reader(port.tap_fd, self._carry, port.tap_fd, self._tap)
        loop.add_reader(self._tap, self._carry, self._tap, port.tap_fd)

    def _carry(self, source: int, target: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(target, os.read(source, 1 << 16))

    def listener(self, port: int) -> socket.socket:
        with native.inside(self.namespace):
            listener = socket.socket()
        listener.bind((self._port.address, port))
        return listener

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._port.tap_fd)
        loop.remove_reader(self._tap)
        os.close(self._tap)
        os.close(self.namespace)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says who called, then, after the caller's end of stream, everything in reverse."""
    writer.write(writer.get_extra_info("peername")[0].encode() + b"\n")
    writer.write((await reader.read())[::-1])
    writer.close()


class TestForward:
    pytestmark = needs_network

    def test_relays_both_ways_until_both_ends(self) -> None:
        async def call(address: tuple[str, int], payload: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(payload)
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            return answer

        async def run() -> None:
            with CloneNetwork(vnet_header=False) as network:
                forward = await network.forward(0, addresses.address_of(0), 8888)  # before the VM is there
                guest = Guest(network.add_port(0))
                server = await asyncio.start_server(_echo, sock=guest.listener(8888))
                payloads = [os.urandom(size) for size in (0, 1, 1000, 300_000, 1_000_000)]
                answers = await asyncio.gather(*(call(forward.address, payload) for payload in payloads))
                for payload, answer in zip(payloads, answers, strict=True):
                    assert answer == addresses.GATEWAY_ADDRESS.encode() + b"\n" + payload[::-1]
                assert network.statistics().forwards == 1
                server.close()
                await server.wait_closed()
                with contextlib.suppress(ConnectionResetError):
                    assert await call(forward.address, b"x") == b"", "nobody listens in the guest any more"
                guest.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*forward.address)

        asyncio.run(asyncio.wait_for(run(), HANG_S))

    def test_close_drops_connections(self) -> None:
        async def run() -> None:
            with CloneNetwork(vnet_header=False) as network:
                guest = Guest(network.add_port(0))
                forward = await network.forward(0, addresses.address_of(0), 80)
                with guest.listener(80) as listener:
                    listener.listen()
                    listener.setblocking(False)
                    reader, writer = await asyncio.open_connection(*forward.address)
                    inner, _ = await asyncio.get_running_loop().sock_accept(listener)
                    with inner:
                        await asyncio.get_running_loop().sock_sendall(inner, b"hello\n")
                        assert await reader.readline() == b"hello\n"
                        guest.close()
                        network.close()
                        with contextlib.suppress(ConnectionResetError):
                            assert await reader.read() == b""
                writer.close()

        asyncio.run(asyncio.wait_for(run(), HANG_S))

    def test_refusals(self) -> None:
        async def run() -> None:
            with CloneNetwork() as network, socket.create_server(("127.0.0.1", 0)) as taken:
                with pytest.raises(NetworkError, match="in use"):
                    await network.forward(taken.getsockname()[1], addresses.address_of(0), 80)
                with pytest.raises(UsageError, match=r"10\.84\.0\.1"):
                    await network.forward(0, "10.84.0.1", 80)
                assert network.statistics().forwards == 0

        asyncio.run(run())

    def test_a_connection_that_comes_while_it_closes_is_no_error(self) -> None:
        async def run() -> list[str]:
            errors: list[str] = []
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: errors.append(str(context)))
            for steps in range(3, 8):  # of the loop, between the connection and the end (before, asyncio drops it)
                with CloneNetwork() as network:
                    forward = await network.forward(0, addresses.address_of(0), 80)
                    with socket.create_connection(forward.address):
                        for _ in range(steps):
                            await asyncio.sleep(0)
                        network.close()
                        await asyncio.sleep(0.1)
            return errors

        assert not asyncio.run(asyncio.wait_for(run(), HANG_S))
