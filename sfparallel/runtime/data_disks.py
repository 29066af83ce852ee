"""In the guest: mount the data disks of `sfrun --data` at the folders of which they are images.

Disks are plugged in while the guest runs, so a disk may appear some time after the order to mount it: the kernel's own
announcements (uevents, netlink(7)) say when.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from sfparallel.errors import GuestError

NETLINK_KOBJECT_UEVENT = 15
APPEAR_TIMEOUT_S = 60.0
_MS_RDONLY = 1
_MS_NODEV = 4


def _find(serial: str) -> str | None:
    """The device with a serial number."""
    for device in Path("/sys/block").iterdir():
        try:
            if (device / "serial").read_text().strip() == serial:
                return f"/dev/{device.name}"
        except OSError:  # a kind of device that has no serial number, or one that is just going
            continue
    return None


def _wait_for(serial: str, uevents: socket.socket) -> str:
    deadline = time.monotonic() + APPEAR_TIMEOUT_S
    while (device := _find(serial)) is None:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([uevents], [], [], left)[0]:
            raise GuestError(f"the data disk {serial} did not appear within {APPEAR_TIMEOUT_S:.0f} s",
                             hint="the host's QEMU could not attach it; see its log")  # fmt: skip
        uevents.recv(1 << 16)
    return device


def _mount(device: str, path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(device.encode(), os.fsencode(path), b"squashfs", _MS_RDONLY | _MS_NODEV, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def mount_data_disks(disks: Iterable[tuple[str, str]]) -> None:
    """Mount each disk, given by serial number, at a path.

    Raises:
        GuestError: a disk does not appear.
        OSError: it cannot be mounted.
    """
    wanted = list(disks)
    if not wanted:
        return
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT) as uevents:
        # Listen first, look then: a disk that comes in between is seen at least once.
        uevents.bind((0, 1))
        for serial, path in wanted:
            device = _wait_for(serial, uevents)
            os.makedirs(path, exist_ok=True)
            _mount(device, path)
