"""VMs that stand still while their job is stopped (Ctrl-Z)."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterable
from typing import Any

from sfparallel.vmm.vm import Vm, VmState
from sfparallel.wire import FrameType

_PAUSE_LIMIT_S = 2.0

_RUNS = (VmState.RUNNING, VmState.FREEZING, VmState.FROZEN)
"""States in which the processors of a VM run. It may go from one to the next while a pause begins."""


async def pause(vms: Iterable[Vm]) -> list[Vm]:
    """Stop the processors of VMs that run: the clocks of their guests stand still, so that no time limit of a program runs out.

    Returns:
        Those for `go_on`. VMs that are being saved or loaded are not among them: who saves or loads them will run them.
    """
    running = [vm for vm in vms if vm.state in _RUNS]
    answers = [vm.qmp.send("stop") for vm in running]
    if answers:
        await asyncio.wait(answers, timeout=_PAUSE_LIMIT_S)
    for answer in answers:
        answer.add_done_callback(_forget)
    return running


def go_on(vms: Iterable[Vm]) -> None:
    """Run them again, and set the clocks of their guests."""
    now = struct.pack("<q", time.time_ns())
    for vm in vms:
        if vm.state in _RUNS:
            vm.qmp.send("cont").add_done_callback(_forget)
            vm.send(FrameType.CLOCK, now)


def _forget(answer: asyncio.Future[Any]) -> None:
    """Of a VM that is gone: who watches it knows."""
    if not answer.cancelled():
        answer.exception()
