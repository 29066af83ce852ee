"""The rtnetlink requests of a clone network: bridge, ports, forwarding entries. Pure functions that build messages."""

from __future__ import annotations

import socket
import struct

from sfparallel.net.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    attribute,
    nested,
    text,
    u8,
    u16,
    u32,
)

# <linux/rtnetlink.h>
_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_RTM_NEWADDR = 20
_RTM_NEWNEIGH = 28
_IFF_UP = 1
# <linux/if_link.h>
_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_MASTER = 10
_IFLA_TXQLEN = 13
_IFLA_LINKINFO = 18
_IFLA_GROUP = 27
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_IFLA_INFO_SLAVE_KIND = 4
_IFLA_INFO_SLAVE_DATA = 5
_IFLA_BR_STP_STATE = 5
_IFLA_BR_GROUP_FWD_MASK = 9
_IFLA_BR_MCAST_SNOOPING = 23
_IFLA_BRPORT_LEARNING = 8
_IFLA_BRPORT_UNICAST_FLOOD = 9
# <linux/neighbour.h>
_NDA_LLADDR = 2
_NUD_NOARP = 0x40
_NTF_MASTER = 0x04
# <linux/if_addr.h>
_IFA_ADDRESS = 1
_IFA_LOCAL = 2

_LOOPBACK = 1
# Ports that are to go are put in this group: one request then removes them all, and the kernel waits for its readers once
# instead of once per port.
_DOOMED = 1


def _link(index: int, flags: int, change: int, *attributes: bytes) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change) + b"".join(attributes)


def loopback_up() -> Message:
    return Message(_RTM_NEWLINK, NLM_F_ACK, _link(_LOOPBACK, _IFF_UP, _IFF_UP), "start the loopback interface")


def create_bridge(index: int, name: str, mac: bytes, mtu: int) -> Message:
    """A bridge, up. The fixed MAC keeps it from taking over its ports' lowest; the explicit MTU from following theirs."""
    # Snooping would have the bridge send queries of its own and hide multicast from clones that it thinks uninterested.
    #
    # Frames to the link-local group addresses 01:80:c2:00:00:0X are not bridged: the port's own network stack gets them, and
    # those for LLDP (0e) pass no filter on the way (br_handle_frame). Forwarding makes them frames like any other, which the
    # filter sees. The kernel refuses bits 0 to 2: it forwards 00 without spanning tree, drops 01, and filters 02.
    data = nested(_IFLA_INFO_DATA, u32(_IFLA_BR_STP_STATE, 0), u16(_IFLA_BR_GROUP_FWD_MASK, 0xFFF8),
                  u8(_IFLA_BR_MCAST_SNOOPING, 0))
    body = _link(index, _IFF_UP, _IFF_UP, text(_IFLA_IFNAME, name), attribute(_IFLA_ADDRESS, mac), u32(_IFLA_MTU, mtu),
                 nested(_IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"), data))
    return Message(_RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, f"create the bridge {name}")


def attach_port(index: int, bridge: int, mac: bytes, mtu: int, queue_length: int) -> list[Message]:
    """Puts a tap on the bridge and starts it.

    It gets the frames for `mac` (told beforehand, never learned) and broadcasts, nothing else.
    """
    joined = _link(index, 0, 0, u32(_IFLA_MASTER, bridge), u32(_IFLA_MTU, mtu), u32(_IFLA_TXQLEN, queue_length))
    # The bridge's settings for a port exist once it is on the bridge: a second request.
    settings = nested(_IFLA_INFO_SLAVE_DATA, u8(_IFLA_BRPORT_LEARNING, 0), u8(_IFLA_BRPORT_UNICAST_FLOOD, 0))
    started = _link(index, _IFF_UP, _IFF_UP, nested(_IFLA_LINKINFO, text(_IFLA_INFO_SLAVE_KIND, "bridge"), settings))
    # NUD_NOARP is a static entry; NUD_PERMANENT would say that the address is the bridge's own.
    entry = struct.pack("=BxHiHBB", socket.AF_BRIDGE, 0, index, _NUD_NOARP, _NTF_MASTER, 0) + attribute(_NDA_LLADDR, mac)
    return [
        Message(_RTM_NEWLINK, NLM_F_ACK, joined, f"put interface {index} on the bridge"),
        Message(_RTM_NEWLINK, NLM_F_ACK, started, f"start interface {index}"),
        Message(_RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, entry, f"direct {mac.hex(':')} to interface {index}"),
    ]


def remove_ports(indices: list[int]) -> list[Message]:
    """Destroys interfaces, whoever still holds their descriptors."""
    group = u32(_IFLA_GROUP, _DOOMED)
    marks = [Message(_RTM_NEWLINK, NLM_F_ACK, _link(index, 0, 0, group), f"mark interface {index}") for index in indices]
    return [*marks, Message(_RTM_DELLINK, NLM_F_ACK, _link(0, 0, 0, group), "remove interfaces")]


def remove_link(index: int) -> Message:
    return Message(_RTM_DELLINK, NLM_F_ACK, _link(index, 0, 0), f"remove interface {index}")


def add_address(index: int, address: str, prefix: int) -> Message:
    packed = socket.inet_aton(address)
    header = struct.pack("=BBBBi", socket.AF_INET, prefix, 0, 0, index)
    body = header + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    return Message(_RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, f"give interface {index} the address {address}")
