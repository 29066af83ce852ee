"""The descriptors 0 to 2 of our commands: open in any case, and known as closed where they were (`sfrun script.py <&-`)."""

from __future__ import annotations

import io
import os
import sys

_MODES = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)


def open_closed() -> tuple[int, ...]:
    """Open /dev/null in the place of each standard stream that is closed.

    Else the next descriptors that anything opens (sockets of VMs, memory layers, the monitor) would get these numbers, and would
    be read as input, and written to as output. Call it before anything opens a descriptor that stays open.

    Returns:
        Those that were closed.
    """
    closed = tuple(number for number in range(3) if not _is_open(number))
    for number in closed:
        # open(2) takes the lowest number that is free, which is this one: those below are open by now. Python marks what it opens
        # as not inheritable, standard streams are inherited.
        opened = os.open(os.devnull, _MODES[number])
        assert opened == number, f"descriptor {number} was free, but {opened} was opened"
        os.set_inheritable(number, True)
    # Python has None in their place, and print(file=None) prints to standard output.
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace"))
    return closed


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
