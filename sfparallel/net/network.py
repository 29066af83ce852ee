"""The network of one job: an unnamed namespace with a bridge and a tap per VM, and nothing else."""

from __future__ import annotations

import asyncio
import enum
import errno
import fcntl
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sfparallel import native
from sfparallel.errors import Closed, NetworkError, StateError, UsageError
from sfparallel.net import addresses, filter, links
from sfparallel.net.forward import Forward
from sfparallel.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkSocket

log = logging.getLogger(__name__)

# <linux/if_tun.h>
_TUNSETIFF = 0x400454CA
_TUNSETIFINDEX = 0x400454DA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000

# Interface numbers are ours to choose (the namespace is): they follow from the VM's number, so none has to be looked up.
_BRIDGE = 2
_FIRST_PORT = 10
_BRIDGE_NAME = "br0"
# A guest that does not read (frozen, or not yet started) must not pin memory: the kernel's default is 500 frames of up to 64 KiB.
_QUEUE_LENGTH = 256


class NetworkState(enum.Enum):
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True)
class NetworkStatistics:
    """A moment's counts.

    Attributes:
        ports: ports now.
        forwards: forwarded host ports now.
        dropped_frames: what the filter has dropped where it entered: spoofed, IPv6, or of any other kind that is not let in.
    """

    ports: int
    forwards: int
    dropped_frames: int


class Port:
    """One VM's place on the bridge.

    Attributes:
        number: the VM's number.
        mac: the only MAC address that may send here.
        address: the only IPv4 address that may send here.
        name: the tap's name inside the namespace.
        index: its interface number there.
    """

    def __init__(self, number: int, mac: bytes, address: str, tap_fd: int) -> None:
        self.number = number
        self.mac = mac
        self.address = address
        self.name = f"tap{number}"
        self.index = _FIRST_PORT + number
        self._tap_fd: int | None = tap_fd

    def __repr__(self) -> str:
        return f"<Port {self.number} {self.address} {addresses.format_mac(self.mac)}>"

    @property
    def tap_fd(self) -> int:
        """The tap's descriptor (non-blocking, close-on-exec), for QEMU's `-netdev tap,fd=`. It stays this object's own.

        Raises:
            StateError: `CloneNetwork.release_tap` was called, or the port was removed.
        """
        if self._tap_fd is None:
            raise StateError(f"port {self.number} no longer has a tap descriptor", hint="its tap was released, or it was removed")
        return self._tap_fd

    def drain(self) -> int:
        """Throws away the frames that wait for the VM, so that another one may take over the port; returns how many there were.

        Keeping a port for the next VM of the same number costs nothing; removing one costs the kernel more than a millisecond.
        """
        count = 0
        while True:
            try:
                os.read(self.tap_fd, 1 << 17)
            except BlockingIOError:
                return count
            count += 1

    def close_tap(self) -> None:
        """For `CloneNetwork`: closes this process's descriptor. Idempotent."""
        if self._tap_fd is not None:
            os.close(self._tap_fd)
            self._tap_fd = None


class CloneNetwork:
    """A job's network: whoever is on it reaches the others on it, and nothing else.

    It lives in a network namespace without a name, held by descriptors of this process and by its taps: after a `kill -9` the
    kernel removes it all. Every frame must come from the MAC and IPv4 address of its port; only IPv4 and ARP pass.
    Calls block for some milliseconds at most; they may be made inside an asyncio loop, from one thread.

    Args:
        mtu: of the bridge and the taps; guests have to be told the same.
        vnet_header: frames carry a `struct virtio_net_hdr`, which lets guests pass large unsegmented packets to each other
            without checksums. QEMU's virtio-net wants it; off for plain frames.

    Raises:
        NetworkError: the kernel refused a step; nothing is left then.
    """

    def __init__(self, *, mtu: int = 9000, vnet_header: bool = True) -> None:
        if not 576 <= mtu <= 65521:
            raise UsageError(f"{mtu} is not a possible MTU of a clone network", hint="choose one from 576 to 65521, such as 9000")
        self._mtu = mtu
        self._tap_flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_header else 0)
        self._ports: dict[int, Port] = {}
        self._forwards: list[Forward] = []
        self._has_gateway = False
        self._hosts: set[int] = set()  # interface numbers in the filter's set of that name
        self._forwarded: set[str] = set()  # addresses of VMs, with a port or not yet
        with ExitStack() as stack:
            try:
                self._namespace = native.new_network_namespace()
                stack.callback(os.close, self._namespace)
                with native.inside(self._namespace):
                    _configure_kernel()
                    self._route = NetlinkSocket(NETLINK_ROUTE)
                    stack.callback(self._route.close)
                    self._filter = NetlinkSocket(NETLINK_NETFILTER)
                    stack.callback(self._filter.close)
            except OSError as error:
                raise NetworkError(f"could not make a network namespace: {error}",
                                   hint="`sf doctor` says which permission or kernel feature is missing") from error
            # The filter first: a port never exists without it.
            self._filter.transact(filter.rules())
            self._route.transact([links.loopback_up(), links.create_bridge(_BRIDGE, _BRIDGE_NAME, addresses.GATEWAY_MAC, mtu)])
            self._resources = stack.pop_all()
        self.state = NetworkState.OPEN

    def __enter__(self) -> CloneNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def namespace_fd(self) -> int:
        """A descriptor of the namespace, for `native.inside`; this object's own."""
        self._require_open()
        return self._namespace

    @property
    def mtu(self) -> int:
        return self._mtu

    @property
    def ports(self) -> dict[int, Port]:
        """The ports by VM number (a copy)."""
        return dict(self._ports)

    def add_port(self, number: int, mac: bytes | None = None, address: str | None = None) -> Port:
        """A port for the VM of that number; MAC and address follow from the number unless given. See `add_ports`."""
        mac = addresses.mac_of(number) if mac is None else mac
        address = addresses.address_of(number) if address is None else address
        return self._add([(number, mac, address)])[0]

    def add_ports(self, numbers: Iterable[int]) -> list[Port]:
        """Ports for the VMs of these numbers, at once: far cheaper than one by one.

        Returns:
            The ports, in the order of the numbers.

        Raises:
            UsageError: a number is in use already, or no number of a VM.
            NetworkError: the kernel refused a step; none of these ports is left then.
        """
        return self._add([(number, addresses.mac_of(number), addresses.address_of(number)) for number in numbers])

    def _add(self, wanted: list[tuple[int, bytes, str]]) -> list[Port]:
        self._require_open()
        numbers = [number for number, _, _ in wanted]
        taken = self._ports.keys() & numbers
        if taken or len(set(numbers)) != len(numbers):
            raise UsageError(f"port {min(taken, default=0)} already exists" if taken else "a port number was given twice",
                             hint="a VM has one port: remove the old one first")
        if not wanted:
            return []
        with ExitStack() as stack:
            ports = self._open_taps(wanted, stack)
            self._route.transact([message for port in ports
                                  for message in links.attach_port(port.index, _BRIDGE, port.mac, self._mtu, _QUEUE_LENGTH)])
            for part in _parts(ports):
                keys = [filter.sender_key(port.index, port.mac, port.address) for port in part]
                self._filter.transact(filter.allow_senders(keys))
                stack.callback(self._filter.transact, filter.forbid_senders(keys))
            self._admit_to_host(ports)
            stack.pop_all()
        self._ports.update((port.number, port) for port in ports)
        return ports

    def _admit_to_host(self, ports: Iterable[Port]) -> None:
        """Lets the ports of forwarded addresses talk to the bridge's own address."""
        admitted = {port.index for port in ports if port.address in self._forwarded} - self._hosts
        if admitted:
            self._filter.transact(filter.allow_hosts(map(filter.host_key, admitted)))
            self._hosts |= admitted

    def _open_taps(self, wanted: list[tuple[int, bytes, str]], stack: ExitStack) -> list[Port]:
        ports = []
        try:
            # A tap belongs to the namespace in which /dev/net/tun was opened; it dies with its last descriptor.
            with native.inside(self._namespace):
                for number, mac, address in wanted:
                    port = Port(number, mac, address, os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
                    stack.callback(port.close_tap)
                    fcntl.ioctl(port.tap_fd, _TUNSETIFINDEX, struct.pack("=I", port.index))
                    fcntl.ioctl(port.tap_fd, _TUNSETIFF, struct.pack("=16sH22x", port.name.encode(), self._tap_flags))
                    ports.append(port)
        except OSError as error:
            raise NetworkError(f"could not make a tap: {error}",
                               hint="`sf doctor` checks /dev/net/tun and the permissions") from error
        return ports

    def release_tap(self, number: int) -> None:
        """Closes this process's descriptor of a tap: from now on it goes away with the VM that holds a copy. Idempotent.

        The port stays in the filter until `remove_port`, which then finds no tap to remove and costs little.
        """
        self._require_open()
        if number in self._ports:
            self._ports[number].close_tap()

    def remove_port(self, number: int) -> None:
        """See `remove_ports`."""
        self.remove_ports([number])

    def remove_ports(self, numbers: Iterable[int]) -> None:
        """Removes ports at once, also while a VM still holds the taps (its network is dead then).

        Unknown numbers are ignored, and after `close` all of them are: VMs may end in any order.

        The kernel waits for its readers once per port: 64 take 80 ms, 1 takes 20 (measured). See `discard_ports`.

        Raises:
            NetworkError: the kernel refused a step; the ports no longer count as such all the same.
        """
        ports = self._mute(numbers)
        if ports:
            # Not there any more: the tap was released, and its VM has ended.
            self._route.transact(links.remove_ports([port.index for port in ports]), tolerate=[errno.ENODEV])
        for port in ports:
            port.close_tap()

    async def discard_ports(self, numbers: Iterable[int]) -> None:
        """Like `remove_ports`: the ports are mute at once, and a thread waits for the kernel to take the taps down."""
        ports = self._mute(numbers)
        if not ports:
            return
        # A socket of its own: the thread shares nothing with this one.
        with native.inside(self._namespace), ExitStack() as stack:
            route = NetlinkSocket(NETLINK_ROUTE)
            stack.callback(route.close)
            for port in ports:
                stack.callback(port.close_tap)
            cleanup = stack.pop_all()

        def take_down() -> None:
            with cleanup:
                route.transact(links.remove_ports([port.index for port in ports]), tolerate=[errno.ENODEV])

        await asyncio.shield(asyncio.to_thread(take_down))

    def _mute(self, numbers: Iterable[int]) -> list[Port]:
        """Forgets ports and takes them out of the filter: nothing comes in through them any more."""
        ports = [self._ports.pop(number) for number in dict.fromkeys(numbers) if number in self._ports]
        for part in _parts(ports):
            self._filter.transact(filter.forbid_senders(filter.sender_key(port.index, port.mac, port.address) for port in part))
        doomed_hosts = self._hosts & {port.index for port in ports}
        if doomed_hosts:
            self._filter.transact(filter.forbid_hosts(map(filter.host_key, doomed_hosts)))
            self._hosts -= doomed_hosts
        return ports

    async def forward(self, host_port: int, guest_address: str, guest_port: int, *, host: str = "127.0.0.1") -> Forward:
        """Lets the host reach one TCP port of one VM.

        The bridge gets an address (10.83.255.254), to and from which only that VM's port may send.

        Args:
            host_port: where the host listens; 0 for any free port (see the result's `address`).
            guest_address: the VM's address; it may get its port later.
            guest_port: where the VM listens; it need not yet.
            host: the host's address to listen on.

        Raises:
            UsageError: that address is not on this network.
            NetworkError: the host port can't be had, or the kernel refused a step.
        """
        self._require_open()
        if ipaddress.IPv4Address(guest_address) not in addresses.NETWORK:
            raise UsageError(f"{guest_address} is not on the clone network {addresses.NETWORK}",
                             hint=f"the parent's address is {addresses.address_of(0)}")
        if not self._has_gateway:
            self._route.transact([links.add_address(_BRIDGE, addresses.GATEWAY_ADDRESS, addresses.PREFIX)])
            self._has_gateway = True
        self._forwarded.add(guest_address)
        self._admit_to_host(self._ports.values())
        forward = Forward((guest_address, guest_port), self._guest_socket)
        await forward.listen(host, host_port)
        if self.state is not NetworkState.OPEN:  # closed while this waited
            forward.close()
            self._require_open()
        self._forwards.append(forward)
        return forward

    def _guest_socket(self) -> socket.socket:
        self._require_open()
        with native.inside(self._namespace):
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def statistics(self) -> NetworkStatistics:
        self._require_open()
        dropped = filter.parse_dropped(self._filter.dump(filter.list_prerouting()))
        return NetworkStatistics(len(self._ports), len(self._forwards), dropped)

    def close(self) -> None:
        """Removes everything, also what VMs still hold. Idempotent."""
        if self.state is NetworkState.CLOSED:
            return
        self.state = NetworkState.CLOSED
        for forward in self._forwards:
            forward.close()
        self._forwards.clear()
        indices = [port.index for port in self._ports.values()]
        with self._resources:
            try:
                self._route.transact([*links.remove_ports(indices), links.remove_link(_BRIDGE)], tolerate=[errno.ENODEV])
            finally:
                for port in self._ports.values():
                    port.close_tap()
                self._ports.clear()

    def _require_open(self) -> None:
        if self.state is not NetworkState.OPEN:
            raise Closed("the clone network was closed")


def _parts(ports: list[Port]) -> list[list[Port]]:
    return [ports[start : start + filter.MAX_ELEMENTS] for start in range(0, len(ports), filter.MAX_ELEMENTS)]


def _configure_kernel() -> None:
    """Sets what a new namespace may have inherited from the host (net.core.devconf_inherit_init_net); called inside it.

    No forwarding. No IPv6 on the bridge or the taps, which would announce themselves with link-local addresses. No detour of
    bridged packets through iptables, which is on by default where br_netfilter is loaded and alters them.
    """
    settings = {"ipv4/ip_forward": "0", "ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1",
                "bridge/bridge-nf-call-iptables": "0", "bridge/bridge-nf-call-arptables": "0"}  # fmt: skip
    for name, value in settings.items():
        path = Path("/proc/sys/net") / name
        # Missing: a kernel without IPv6 or br_netfilter. Not writable, but right: a container's read-only /proc/sys.
        if path.exists() and path.read_text().strip() != value:
            path.write_text(value)
