"""The address plan of a clone network: everything follows from a VM's number (the parent is 0, clones count from 1)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from sfparallel.errors import UsageError

NETWORK = IPv4Network("10.83.0.0/16")
PREFIX = NETWORK.prefixlen
HIGHEST_NUMBER = 65000  # the last tenth of a percent of the /16 is kept for what is not a VM
# Locally administered (second lowest bit of the first byte), then "SF".
MAC_PREFIX = bytes.fromhex("0a5346")

_FIRST = int(NETWORK.network_address) + 1


def address_of(number: int) -> str:
    """The IPv4 address of a VM: 10.83.0.1 for the parent, 10.83.0.1 + k for clone k.

    Raises:
        UsageError: no VM has that number.
    """
    if not 0 <= number <= HIGHEST_NUMBER:
        raise UsageError(f"{number} is not the number of a VM", hint=f"numbers go from 0 (the parent) to {HIGHEST_NUMBER}")
    return str(IPv4Address(_FIRST + number))


def mac_of(number: int) -> bytes:
    """The MAC address of a VM, 0a:53:46:00:hi:lo.

    Raises:
        UsageError: no VM has that number.
    """
    address_of(number)
    return _mac(number)


def _mac(number: int) -> bytes:
    return MAC_PREFIX + b"\0" + number.to_bytes(2, "big")


def format_mac(mac: bytes) -> str:
    return mac.hex(":")


# The bridge's own end, which exists only while a host port is forwarded to the parent.
GATEWAY_ADDRESS = "10.83.255.254"
GATEWAY_MAC = _mac(int(IPv4Address(GATEWAY_ADDRESS)) - _FIRST)
