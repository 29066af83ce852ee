"""The clone network with the real kernel: frames are written to taps, and what comes out of the others is looked at.

A write to a tap carries the frame all the way through the bridge to the other taps before it returns, in order. So "nothing
came" needs no waiting: a frame that is known to pass is sent afterwards, and nothing may arrive before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel import native
from sfparallel.errors import Closed, NetworkError, StateError, UsageError
from sfparallel.net import addresses, netlink
from sfparallel.net.network import CloneNetwork, NetworkState, Port
from tests.bare_network import Tripwire, namespace_vanishes, needs_network
from tests.bare_network import nothing_left_fixture as nothing_left_fixture
from tests.conftest import HANG_S

BROADCAST = b"\xff" * 6
IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
REQUEST, REPLY = 1, 2


# -- frames ------------------------------------------------------------------------------------------------------------


def ethernet(target: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return (target + source + struct.pack(">H", kind) + payload).ljust(60, b"\0")


def arp(operation: int, mac: bytes, address: str, wanted: str, *, source: bytes | None = None, target: bytes = BROADCAST,
        layout: bytes = b"\0\x01\x08\0\x06\x04") -> bytes:
    body = layout + struct.pack(">H", operation) + mac + socket.inet_aton(address) + bytes(6) + socket.inet_aton(wanted)
    return ethernet(target, mac if source is None else source, ARP, body)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    folded: int = ~(total + (total >> 16)) & 0xFFFF
    return folded


def ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    def header(check: int) -> bytes:
        return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, check,
                           socket.inet_aton(source), socket.inet_aton(target))

    return header(checksum(header(0))) + payload


def udp(
    sender: Port, receiver: Port, payload: bytes = b"hello", *, mac: bytes | None = None, address: str | None = None
) -> bytes:
    datagram = struct.pack(">HHHH", 1000, 2000, 8 + len(payload), 0) + payload
    body = ipv4(sender.address if address is None else address, receiver.address, 17, datagram)
    return ethernet(receiver.mac, sender.mac if mac is None else mac, IPV4, body)


def receive(port: Port) -> bytes:
    """The next frame that the VM would get."""
    assert select.select([port.tap_fd], [], [], HANG_S)[0], f"no frame at {port}"
    return os.read(port.tap_fd, 1 << 16)


def delivered(sender: Port, frames: list[bytes], *receivers: Port) -> list[list[bytes]]:
    """What each receiver gets when the sender sends these frames."""
    last = arp(REQUEST, sender.mac, sender.address, "10.83.77.77")
    for frame in [*frames, last]:
        os.write(sender.tap_fd, frame)
    result: list[list[bytes]] = []
    for receiver in receivers:
        result.append([])
        while (frame := receive(receiver)) != last:
            result[-1].append(frame)
    return result


@pytest.fixture
def network() -> Iterator[CloneNetwork]:
    with CloneNetwork(vnet_header=False) as network:
        network.add_ports(range(3))
        with namespace_vanishes(network.namespace_fd):
            yield network
            network.close()


# -- delivery and isolation --------------------------------------------------------------------------------------------


THIRD_MAC, THIRD_ADDRESS = addresses.mac_of(2), addresses.address_of(2)
NOT_IPV4, WIDE = b"\0\x01\x86\xdd\x06\x04", b"\0\x01\x08\0\x08\x04"
STP = b"\x42\x42\x03" + bytes(40)
IPV6_BODY = b"\x60" + bytes(59)

# What VM a could send to b in order to be somebody else, or to say something that the network does not carry.
FORGERIES = [
    pytest.param(forge, id=name) for name, forge in {
        "another's MAC": lambda a, b: udp(a, b, mac=THIRD_MAC),
        "nobody's MAC": lambda a, b: udp(a, b, mac=bytes.fromhex("525400123456")),
        "another's IP": lambda a, b: udp(a, b, address=THIRD_ADDRESS),
        "another's MAC and IP": lambda a, b: udp(a, b, mac=THIRD_MAC, address=THIRD_ADDRESS),
        "no IP (DHCP)": lambda a, b: udp(a, b, address="0.0.0.0"),
        "an IP from outside": lambda a, b: udp(a, b, address="8.8.8.8"),
        "the gateway's IP": lambda a, b: udp(a, b, address=addresses.GATEWAY_ADDRESS),
        "ARP, another's MAC inside": lambda a, b: arp(REPLY, THIRD_MAC, a.address, b.address, source=a.mac),
        "ARP, another's MAC outside": lambda a, b: arp(REPLY, a.mac, a.address, b.address, source=THIRD_MAC),
        "ARP, another's IP": lambda a, b: arp(REPLY, a.mac, THIRD_ADDRESS, b.address),
        "ARP probe": lambda a, b: arp(REQUEST, a.mac, "0.0.0.0", b.address),
        "ARP, not for IPv4": lambda a, b: arp(REQUEST, a.mac, a.address, b.address, layout=NOT_IPV4),
        "ARP, shifted fields": lambda a, b: arp(REQUEST, a.mac, a.address, b.address, layout=WIDE),
        "ARP, cut short": lambda a, b: ethernet(b.mac, a.mac, ARP, b"\0\x01\x08\0\x06\x04")[:24],
        "IP, cut short": lambda a, b: ethernet(b.mac, a.mac, IPV4, b"")[:20],
        "IPv6": lambda a, b: ethernet(b.mac, a.mac, IPV6, IPV6_BODY),
        "IPv6 multicast": lambda a, b: ethernet(bytes.fromhex("333300000001"), a.mac, IPV6, IPV6_BODY),
        "tagged": lambda a, b: ethernet(b.mac, a.mac, VLAN, b"\0\x01" + udp(a, b)[12:]),
        "tagged, priority only": lambda a, b: ethernet(b.mac, a.mac, VLAN, b"\0\0" + udp(a, b)[12:]),
        "tagged twice": lambda a, b: ethernet(b.mac, a.mac, 0x88A8, b"\0\x01\x81\0\0\x02" + udp(a, b)[12:]),
        "another protocol": lambda a, b: ethernet(b.mac, a.mac, 0x88B5, bytes(50)),
        "spanning tree": lambda a, b: ethernet(bytes.fromhex("0180c2000000"), a.mac, 0x0026, STP),
    }.items()
]  # fmt: skip


class TestFrames:
    pytestmark = needs_network

    def test_unicast_goes_to_its_port_only(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()
        large = udp(a, b, bytes(range(256)) * 34)  # nearly the MTU of 9000
        assert delivered(a, [udp(a, b), large], b, c) == [[udp(a, b), large], []]

    def test_broadcast_and_answer(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()
        question = arp(REQUEST, a.mac, a.address, b.address)
        assert delivered(a, [question], b, c) == [[question], [question]]
        answer = arp(REPLY, b.mac, b.address, a.address, target=a.mac)
        assert delivered(b, [answer], a, c) == [[answer], []]

    def test_unknown_unicast_is_not_flooded(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()
        assert delivered(a, [bytes(addresses.mac_of(9)) + udp(a, b)[6:]], b, c) == [[], []]

    @pytest.mark.parametrize("forge", FORGERIES)
    def test_what_is_not_its_own_is_dropped(self, network: CloneNetwork, forge: Callable[[Port, Port], bytes]) -> None:
        a, b, c = network.ports.values()
        before = network.statistics().dropped_frames
        assert delivered(a, [forge(a, b)], b, c) == [[], []]
        assert network.statistics().dropped_frames == before + 1
        # And what it pretended has taught the bridge nothing: the rightful owner still gets its frames.
        assert delivered(a, [udp(a, c)], c, b) == [[udp(a, c)], []]

    def test_two_networks_do_not_see_each_other(self, network: CloneNetwork) -> None:
        a, b, _ = network.ports.values()
        with CloneNetwork(vnet_header=False) as other:
            x, y = other.add_ports([0, 1])
            assert delivered(a, [udp(a, b), arp(REQUEST, a.mac, a.address, y.address)], b)[0]
            assert delivered(x, [udp(x, y)], y) == [[udp(x, y)]], "the same addresses, and only its own frame"
            with pytest.raises(BlockingIOError):
                os.read(x.tap_fd, 100)

    def test_frozen_vm_does_not_block_others(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()
        for _ in range(2000):
            os.write(a.tap_fd, udp(a, b))
        assert 0 < b.drain() < 2000
        assert delivered(a, [udp(a, c)], c) == [[udp(a, c)]]
        assert b.drain() == 1  # the last, a broadcast
        assert b.drain() == 0


# Destinations that a bridge, or the tap below it, may take for its own; the link-local groups are handled apart by Linux.
WAYS_TO_THE_HOST = [addresses.GATEWAY_MAC, BROADCAST, bytes.fromhex("01005e000001"),
                    *(bytes.fromhex("0180c20000") + bytes([last]) for last in range(0x30))]  # fmt: skip


class TestHost:
    """Nothing of the host answers."""

    pytestmark = needs_network

    def host_addresses(self) -> list[str]:
        found = {"127.0.0.1", addresses.GATEWAY_ADDRESS}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                    found.add(socket.inet_ntoa(answer[20:24]))
        return sorted(found)

    def attempts(self, port: Port) -> list[bytes]:
        """ARP, ping and TCP SYN to every address of the host, to every MAC that might take them in."""
        frames = []
        for address in self.host_addresses():
            echo = struct.pack(">BBHHH", 8, 0, 0xF7FD, 1, 1)
            syn = struct.pack(">HHIIBBHHH", 1000, 22, 0, 0, 0x50, 2, 1000, 0, 0)
            pseudo = socket.inet_aton(port.address) + socket.inet_aton(address) + struct.pack(">HH", 6, len(syn))
            syn = syn[:16] + struct.pack(">H", checksum(pseudo + syn)) + syn[18:]
            for mac in WAYS_TO_THE_HOST:
                frames += [arp(REQUEST, port.mac, port.address, address, target=mac),
                           ethernet(mac, port.mac, IPV4, ipv4(port.address, address, 1, echo)),
                           ethernet(mac, port.mac, IPV4, ipv4(port.address, address, 6, syn))]  # fmt: skip
        return frames

    def answers(self, port: Port, other: Port) -> list[bytes]:
        port.drain()
        for frame in self.attempts(port):
            os.write(port.tap_fd, frame)
        os.write(other.tap_fd, last := udp(other, port, b"last"))
        found = []
        while (frame := receive(port)) != last:
            found.append(frame)
        return found

    def test_no_address_answers(self, network: CloneNetwork) -> None:
        a, b, _ = network.ports.values()
        assert self.answers(a, b) == []

    def test_with_a_forward_the_parent_alone_gets_answers(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()

        asyncio.run(network.forward(0, a.address, 80))
        # The bridge's own end sends once the kernel has noticed, in the background, that it has a port (carrier).
        deadline = time.monotonic() + HANG_S
        os.write(a.tap_fd, arp(REQUEST, a.mac, a.address, addresses.GATEWAY_ADDRESS))
        while not select.select([a.tap_fd], [], [], 0.05)[0]:
            assert time.monotonic() < deadline, "the gateway does not answer"
            os.write(a.tap_fd, arp(REQUEST, a.mac, a.address, addresses.GATEWAY_ADDRESS))
        parent, first, second = self.answers(a, b), self.answers(b, c), self.answers(c, b)
        assert (first, second) == ([], [])
        kinds = {frame[12:14] for frame in parent}
        assert parent and all(frame[6:12] == addresses.GATEWAY_MAC and frame[:6] == a.mac for frame in parent)
        assert b"\x08\x06" in kinds, "the bridge's own address answers ARP; nothing else of the host does"
        for frame in parent:
            if frame[12:14] == b"\x08\x06":
                assert frame[28:32] == socket.inet_aton(addresses.GATEWAY_ADDRESS)
            else:
                assert frame[26:30] == socket.inet_aton(addresses.GATEWAY_ADDRESS)

    def test_with_a_forward_the_parent_alone_is_heard_and_spoken_to(self, network: CloneNetwork) -> None:
        a, b, _ = network.ports.values()
        asyncio.run(network.forward(0, a.address, 80))
        with native.inside(network.namespace_fd), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
            ear.bind((addresses.GATEWAY_ADDRESS, 2000))
            ear.settimeout(HANG_S)
            for port in (b, a):
                datagram = struct.pack(">HHHH", 1000, 2000, 12, 0) + b"from"
                for mac in WAYS_TO_THE_HOST:
                    body = ipv4(port.address, addresses.GATEWAY_ADDRESS, 17, datagram)
                    os.write(port.tap_fd, ethernet(mac, port.mac, IPV4, body))
            assert ear.recvfrom(100) == (b"from", (a.address, 1000))
            for port in (b, a):
                ear.sendto(b"to", (port.address, 2000))
        while receive(a)[6:12] != addresses.GATEWAY_MAC:
            pass
        assert addresses.GATEWAY_MAC not in [frame[6:12] for frame in delivered(a, [], b)[0]]

    def test_namespace_neither_forwards_nor_speaks_ipv6(self, network: CloneNetwork) -> None:
        with native.inside(network.namespace_fd):
            assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "0\n"
            assert len(Path("/proc/net/route").read_text().splitlines()) <= 1
            inet6 = Path("/proc/net/if_inet6")
            assert not inet6.exists() or {line.split()[-1] for line in inet6.read_text().splitlines()} <= {"lo"}


# -- ports -------------------------------------------------------------------------------------------------------------


class TestPorts:
    pytestmark = needs_network

    def names(self, network: CloneNetwork) -> set[str]:
        with native.inside(network.namespace_fd):
            return {name for _, name in socket.if_nameindex() if name.startswith("tap")}

    def test_64_ports(self) -> None:
        with CloneNetwork(vnet_header=False) as network:
            start = time.process_time()
            ports = network.add_ports(range(64))
            took = time.process_time() - start  # the kernel in its system calls
            assert [port.address for port in ports] == [addresses.address_of(number) for number in range(64)]
            for port, following in zip(ports, [*ports[1:], ports[0]], strict=True):
                os.write(port.tap_fd, udp(port, following))
            for port, previous in zip(ports, [ports[-1], *ports[:-1]], strict=True):
                assert receive(port) == udp(previous, port)
                assert port.drain() == 0
        assert took < 1, f"64 ports took {took:.3f} s"  # measured: 0.035 s

    def test_numbers_are_used_once_and_again(self, network: CloneNetwork) -> None:
        a = network.ports[0]
        for numbers in ([5, 0], [6, 6], [-1], [addresses.HIGHEST_NUMBER + 1]):
            with pytest.raises(UsageError):
                network.add_ports(numbers)
        assert self.names(network) == {"tap0", "tap1", "tap2"}
        old = network.ports[2]
        network.remove_port(2)
        network.remove_port(2)
        assert self.names(network) == {"tap0", "tap1"}
        with pytest.raises(StateError):
            _ = old.tap_fd
        new = network.add_port(2)
        assert delivered(a, [udp(a, new)], new) == [[udp(a, new)]]
        assert network.add_ports([]) == []

    def test_removed_port_is_dead_for_whoever_holds_it(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()
        copy = os.dup(c.tap_fd)
        try:
            network.remove_port(2)
            with pytest.raises(OSError) as caught:
                os.write(copy, udp(c, a))
            assert caught.value.errno in (errno.EBADFD, errno.EIO)
        finally:
            os.close(copy)
        assert delivered(a, [udp(a, b)], b) == [[udp(a, b)]]

    def test_discarded_port_is_mute_at_once(self, network: CloneNetwork) -> None:
        a, b, c = network.ports.values()

        async def run() -> None:
            task = asyncio.create_task(network.discard_ports([2]))
            await asyncio.sleep(0)
            with contextlib.suppress(OSError):
                os.write(c.tap_fd, udp(c, a))
            assert delivered(b, [], a) == [[]]
            await task

        asyncio.run(run())
        assert self.names(network) == {"tap0", "tap1"}
        network.add_port(2)

    def test_released_tap_goes_with_its_vm(self, network: CloneNetwork) -> None:
        port = network.ports[2]
        with subprocess.Popen(["sleep", "1000"], pass_fds=[port.tap_fd]) as vm:
            network.release_tap(2)
            network.release_tap(2)
            assert "tap2" in self.names(network)
            vm.kill()
        assert "tap2" not in self.names(network)
        network.remove_port(2)
        network.add_port(2)

    def test_ports_inside_a_running_event_loop(self, network: CloneNetwork) -> None:
        async def run() -> list[Port]:
            return network.add_ports([10, 11])

        a, b = asyncio.run(run())
        assert delivered(a, [udp(a, b)], b) == [[udp(a, b)]]

    def test_failure_half_way_leaves_nothing(self, network: CloneNetwork) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 10, limits[1]))
        try:
            with pytest.raises(NetworkError, match="Too many open files"):
                network.add_ports(range(10, 100))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert self.names(network) == {"tap0", "tap1", "tap2"}
        # A refusal by the kernel, after the taps were made: no interface may have a group address as its own.
        with pytest.raises(NetworkError, match=r"direct ff:ff:ff:ff:ff:ff|group|Invalid") as caught:
            network.add_port(20, mac=bytes(6))
        assert isinstance(caught.value.__cause__, OSError)
        assert self.names(network) == {"tap0", "tap1", "tap2"}
        assert set(network.ports) == {0, 1, 2}
        assert len(network.add_ports(range(10, 100))) == 90

    def test_mtu(self) -> None:
        with CloneNetwork(mtu=1400) as network:
            network.add_port(0)
            with native.inside(network.namespace_fd):
                lines = [line for line in Path("/proc/net/dev").read_text().splitlines() if "tap0" in line]
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                    for name in (b"br0", b"tap0"):
                        answer = fcntl.ioctl(probe, 0x8921, struct.pack("256s", name))  # SIOCGIFMTU
                        assert struct.unpack_from("=i", answer, 16)[0] == 1400
            assert len(lines) == 1
        with pytest.raises(UsageError):
            CloneNetwork(mtu=100)


class TestEnd:
    pytestmark = needs_network

    def test_close_removes_what_vms_still_hold(self) -> None:
        network = CloneNetwork()
        port = network.add_port(0)
        with subprocess.Popen(["sleep", "1000"], pass_fds=[port.tap_fd]) as vm:
            with native.inside(network.namespace_fd):
                watcher = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            try:
                network.close()
                with native.inside(watcher):
                    assert [name for _, name in socket.if_nameindex() if name.startswith(("tap", "br"))] == []
            finally:
                os.close(watcher)
                vm.kill()
        assert network.state is NetworkState.CLOSED
        network.close()
        network.remove_port(0)
        for call in (lambda: network.add_port(1), network.statistics, lambda: network.namespace_fd):
            with pytest.raises(Closed):
                call()

    def test_nothing_is_left_after_a_kill(self) -> None:
        program = ("import sys; from sfparallel.net.network import CloneNetwork; n = CloneNetwork(); n.add_ports(range(8)); "
                   "print(n.namespace_fd, flush=True); sys.stdin.read()")
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            number = int(holder.stdout.readline())
            namespace = os.open(f"/proc/{holder.pid}/fd/{number}", os.O_RDONLY)
            try:
                wire = Tripwire(namespace)
            finally:
                os.close(namespace)
            with contextlib.closing(wire):
                holder.kill()
                wire.wait()

    def test_many_in_a_row(self) -> None:
        for _ in range(20):
            with CloneNetwork() as network:
                network.add_port(0)


# -- pure parts --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, addresses.HIGHEST_NUMBER), st.integers(0, addresses.HIGHEST_NUMBER))
def test_addresses_are_unique_and_on_the_network(first: int, second: int) -> None:
    assert (addresses.address_of(first) == addresses.address_of(second)) == (first == second)
    assert (addresses.mac_of(first) == addresses.mac_of(second)) == (first == second)
    address = IPv4Address(addresses.address_of(first))
    assert address in addresses.NETWORK
    assert address not in (addresses.NETWORK.network_address, addresses.NETWORK.broadcast_address)
    assert str(address) != addresses.GATEWAY_ADDRESS
    mac = addresses.mac_of(first)
    assert len(mac) == 6 and mac[0] & 3 == 2 and mac != addresses.GATEWAY_MAC


def test_the_address_plan() -> None:
    assert (addresses.address_of(0), addresses.format_mac(addresses.mac_of(0))) == ("10.83.0.1", "0a:53:46:00:00:00")
    assert (addresses.address_of(300), addresses.format_mac(addresses.mac_of(300))) == ("10.83.1.45", "0a:53:46:00:01:2c")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40))))
def test_netlink_attributes_round_trip(pairs: list[tuple[int, bytes]]) -> None:
    assert list(netlink.parse_attributes(b"".join(netlink.attribute(kind, payload) for kind, payload in pairs))) == pairs


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_malformed_netlink_is_an_error_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(NetworkError):
        list(netlink.parse_attributes(data))
