"""What tests of the clone network share: what they need, and the proof that nothing of it is left."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from sfparallel import native
from sfparallel.net import netlink
from tests.conftest import HANG_S

needs_network = [pytest.mark.needs("root"), pytest.mark.needs("net")]


@pytest.fixture(name="nothing_left", autouse=True)
def nothing_left_fixture() -> Iterator[None]:
    """No descriptor stays open: a namespace without a name and a tap live by descriptors alone."""
    def held() -> dict[str, str]:
        links = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that lists
                links[name] = os.readlink(f"/proc/self/fd/{name}")
        return links

    gc.collect()  # transports of an event loop that has ended hold their sockets until then; so may what earlier tests left
    before, interfaces, home = held(), socket.if_nameindex(), os.readlink("/proc/thread-self/ns/net")
    yield
    gc.collect()
    assert not held().items() - before.items()
    assert socket.if_nameindex() == interfaces
    assert os.readlink("/proc/thread-self/ns/net") == home


class Tripwire:
    """Tells when a network namespace is gone: a veth in a namespace of ours loses its peer, which is in the other one."""

    _INFO_DATA, _INFO_KIND, _LINKINFO, _IFNAME, _NET_NS_FD, _PEER = 2, 1, 18, 3, 28, 1
    _RTM_NEWLINK, _RTM_DELLINK, _RTMGRP_LINK = 16, 17, 1

    def __init__(self, namespace: int) -> None:
        self._home = native.new_network_namespace()
        with native.inside(self._home):
            self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE)
            self._events.bind((0, self._RTMGRP_LINK))
            route = netlink.NetlinkSocket(netlink.NETLINK_ROUTE)
        header = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        peer = header + netlink.text(self._IFNAME, "wire1") + netlink.u32(self._NET_NS_FD, namespace)
        info = netlink.nested(self._LINKINFO, netlink.text(self._INFO_KIND, "veth"),
                              netlink.nested(self._INFO_DATA, netlink.attribute(self._PEER, peer)))
        flags = netlink.NLM_F_ACK | netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
        body = header + netlink.text(self._IFNAME, "wire0") + info
        route.transact([netlink.Message(self._RTM_NEWLINK, flags, body, "lay a tripwire")])
        route.close()

    def wait(self) -> None:
        """Returns when the namespace is gone, and fails when it is still there after a while."""
        self._events.settimeout(HANG_S)
        while struct.unpack_from("=IH", self._events.recv(1 << 16))[1] != self._RTM_DELLINK:
            pass

    def close(self) -> None:
        self._events.close()
        os.close(self._home)


@contextlib.contextmanager
def namespace_vanishes(namespace: int) -> Iterator[None]:
    with contextlib.closing(Tripwire(namespace)) as wire:
        yield
        wire.wait()
