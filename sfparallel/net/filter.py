"""Source enforcement: the nf_tables rules of a clone network (bridge family). Pure functions that build messages.

In nft's language:

    table bridge sfparallel {
        set senders { type iface_index . ether_addr . ipv4_addr }   # one element per port
        set hosts   { type iface_index }                            # ports that may talk to the host's end of the bridge
        chain prerouting {
            type filter hook prerouting priority -300; policy drop;
            ether type ip iif . ether saddr . ip saddr @senders accept
            ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 \
                iif . ether saddr . arp saddr ip @senders iif . arp saddr ether . arp saddr ip @senders accept
            counter
        }
        chain input  { type filter hook input priority 0; policy drop; iif @hosts meta pkttype != multicast accept }
        chain output { type filter hook output priority 0; policy drop; oif @hosts accept }
    }

What is not IPv4 or ARP from its rightful owner is dropped where it enters, IPv6 and tagged frames included: nothing else
has to be thought of. It relies on the bridge forwarding link-local groups too (see `links.create_bridge`), except
01:80:c2:00:00:02, which comes to `input` as multicast.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from sfparallel.net.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, Message, be32, nested, parse_attributes, text
from sfparallel.net.netlink import attribute as raw

_TABLE = "sfparallel"
_FAMILY_BRIDGE = 7  # NFPROTO_BRIDGE

# <linux/netfilter/nfnetlink.h>
_SUBSYSTEM = 10 << 8
_BATCH_BEGIN = 16
_BATCH_END = 17
# <linux/netfilter/nf_tables.h>
_NEWTABLE, _NEWCHAIN, _NEWRULE, _GETRULE, _NEWSET, _NEWSETELEM, _DELSETELEM = 0, 3, 6, 7, 9, 12, 14
_REGISTER = 8  # NFT_REG32_00, the first of 16 registers of 4 bytes
_VERDICT_REGISTER = 0
_LINK, _PACKET = 0, 1  # NFT_PAYLOAD_LL_HEADER, NFT_PAYLOAD_NETWORK_HEADER
_META_IIF, _META_OIF, _META_PACKET_TYPE = 4, 5, 19
_EQUAL, _UNEQUAL = 0, 1
_MULTICAST = 2  # PACKET_MULTICAST in <linux/if_packet.h>
_DROP, _ACCEPT = 0, 1
_LIST_ELEMENT = 1
# nft's own numbers for the types of set keys (its `enum datatypes`): the kernel stores them, `nft list` prints with them.
_TYPE_INDEX, _TYPE_ETHER, _TYPE_IPV4 = 20, 9, 7

_HOOK_PREROUTING, _HOOK_INPUT, _HOOK_OUTPUT = 0, 1, 3  # <linux/netfilter_bridge.h>


def _message(kind: int, flags: int, what: str, *attributes: bytes) -> Message:
    header = struct.pack("=BBH", _FAMILY_BRIDGE, 0, 0)
    return Message(_SUBSYSTEM | kind, flags | NLM_F_ACK, header + b"".join(attributes), what)


def _transaction(messages: list[Message]) -> list[Message]:
    """nf_tables takes changes as a batch, and makes all of them or none."""
    mark = struct.pack(">BBH", socket.AF_UNSPEC, 0, _SUBSYSTEM >> 8)
    what = "change the packet filter"
    return [Message(_BATCH_BEGIN, 0, mark, what), *messages, Message(_BATCH_END, 0, mark, what)]


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(_LIST_ELEMENT, text(1, name), nested(2, *attributes))


def _meta(key: int, register: int) -> bytes:
    return _expression("meta", be32(1, register), be32(2, key))


def _load(base: int, offset: int, length: int, register: int) -> bytes:
    return _expression("payload", be32(1, register), be32(2, base), be32(3, offset), be32(4, length))


def _compare(register: int, operator: int, value: bytes) -> bytes:
    return _expression("cmp", be32(1, register), be32(2, operator), nested(3, raw(1, value)))


def _equals(register: int, value: bytes) -> bytes:
    return _compare(register, _EQUAL, value)


def _in_set(name: str) -> bytes:
    return _expression("lookup", text(1, name), be32(2, _REGISTER))


def _accept() -> bytes:
    return _expression("immediate", be32(1, _VERDICT_REGISTER), nested(2, nested(2, be32(1, _ACCEPT))))


def _sender(mac: tuple[int, int], address: int) -> bytes:
    """Looks up interface . MAC . IPv4 address, the MAC at (header, offset) and the address at an offset in the network header.

    The key fills registers of 4 bytes: 1 for the index, 2 for the MAC (the rest is zeroed by the kernel), 1 for the address.
    """
    return (_meta(_META_IIF, _REGISTER) + _load(*mac, 6, _REGISTER + 1) + _load(_PACKET, address, 4, _REGISTER + 3)
            + _in_set("senders"))


def _ether_type(value: int) -> bytes:
    # Read from the frame, not from `meta protocol`: the kernel takes a VLAN tag off and would show what is under it.
    return _load(_LINK, 12, 2, _REGISTER) + _equals(_REGISTER, struct.pack(">H", value))


def _chain(name: str, hook: int, priority: int) -> Message:
    return _message(_NEWCHAIN, NLM_F_CREATE, f"create the filter chain {name}", text(1, _TABLE), text(3, name),
                    nested(4, be32(1, hook), be32(2, priority)), be32(5, _DROP), text(7, "filter"))


def _rule(chain: str, *expressions: bytes) -> Message:
    return _message(_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, f"add a rule to the filter chain {chain}",
                    text(1, _TABLE), text(2, chain), nested(4, *expressions))


def _set(name: str, number: int, key_type: int, key_length: int) -> Message:
    return _message(_NEWSET, NLM_F_CREATE, f"create the filter set {name}", text(1, _TABLE), text(2, name), be32(3, 0),
                    be32(4, key_type), be32(5, key_length), be32(10, number))


def rules() -> list[Message]:
    """The whole rule set, as one transaction."""
    sender_type = (_TYPE_INDEX << 12) | (_TYPE_ETHER << 6) | _TYPE_IPV4
    # Hardware type Ethernet, protocol type IPv4, address lengths 6 and 4: the layout that the offsets below assume.
    arp_layout = _load(_PACKET, 0, 6, _REGISTER) + _equals(_REGISTER, struct.pack(">HHBB", 1, 0x0800, 6, 4))
    arp_senders = _sender((_LINK, 6), 14) + _sender((_PACKET, 8), 14)
    return _transaction([
        _message(_NEWTABLE, NLM_F_CREATE, "create the filter table", text(1, _TABLE), be32(2, 0)),
        _set("senders", 1, sender_type, 16),
        _set("hosts", 2, _TYPE_INDEX, 4),
        _chain("prerouting", _HOOK_PREROUTING, -300),
        _chain("input", _HOOK_INPUT, 0),
        _chain("output", _HOOK_OUTPUT, 0),
        _rule("prerouting", _ether_type(0x0800), _sender((_LINK, 6), 12), _accept()),
        _rule("prerouting", _ether_type(0x0806), arp_layout, arp_senders, _accept()),
        _rule("prerouting", _expression("counter")),
        _rule("input", _meta(_META_IIF, _REGISTER), _in_set("hosts"),
              _meta(_META_PACKET_TYPE, _REGISTER), _compare(_REGISTER, _UNEQUAL, bytes([_MULTICAST])), _accept()),
        _rule("output", _meta(_META_OIF, _REGISTER), _in_set("hosts"), _accept()),
    ])


def _elements(kind: int, name: str, keys: Iterable[bytes]) -> Message:
    elements = [nested(_LIST_ELEMENT, nested(1, raw(1, key))) for key in keys]
    flags = NLM_F_CREATE if kind == _NEWSETELEM else 0
    return _message(kind, flags, f"change the filter set {name}", text(1, _TABLE), text(2, name), nested(3, *elements))


def sender_key(index: int, mac: bytes, address: str) -> bytes:
    """The element of the set `senders` for a port: what may come in through that interface."""
    return struct.pack("=I6s2x4s", index, mac, socket.inet_aton(address))


def host_key(index: int) -> bytes:
    return struct.pack("=I", index)


# A nested attribute's length is 16 bits wide, and an element of `senders` takes 28 bytes of it.
MAX_ELEMENTS = 1024


def allow_senders(keys: Iterable[bytes]) -> list[Message]:
    return _transaction([_elements(_NEWSETELEM, "senders", keys)])


def forbid_senders(keys: Iterable[bytes]) -> list[Message]:
    return _transaction([_elements(_DELSETELEM, "senders", keys)])


def allow_hosts(keys: Iterable[bytes]) -> list[Message]:
    return _transaction([_elements(_NEWSETELEM, "hosts", keys)])


def forbid_hosts(keys: Iterable[bytes]) -> list[Message]:
    return _transaction([_elements(_DELSETELEM, "hosts", keys)])


def list_prerouting() -> Message:
    return _message(_GETRULE, 0, "read the filter's counters", text(1, _TABLE), text(2, "prerouting"))


def parse_dropped(bodies: Iterable[bytes]) -> int:
    """Frames counted by the last rule of `prerouting`, from the answers to `list_prerouting`."""
    total = 0
    for body in bodies:
        for rule_kind, expressions in parse_attributes(body[4:]):
            if rule_kind != 4:
                continue
            for _, expression in parse_attributes(expressions):
                fields = dict(parse_attributes(expression))
                if fields.get(1) == b"counter\0":
                    total += struct.unpack(">Q", dict(parse_attributes(fields[2]))[2])[0]
    return total
