"""Checkpoints that programs asked for (`sf.checkpoint_parent`): kept in memory until they are closed, or their VM ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sfparallel.errors import StateError
from sfparallel.vmm.checkpoint import Checkpoint
from sfparallel.vmm.vm import Vm


@dataclass(eq=False)
class Saved:
    """One checkpoint of a VM.

    Attributes:
        number: by which programs name it.
        owner: the VM that it is a state of, and that alone may use it.
        channel: of the program that made it; there the answer is awaited in every clone.
        request: id of the request that is to be answered.
        batches: how often clones were made from it.
        lock: held while clones are being made from it.
    """

    number: int
    owner: Vm
    channel: int
    request: int
    checkpoint: Checkpoint
    batches: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SavedStates:
    """All checkpoints of a job's programs."""

    def __init__(self) -> None:
        self._saved: dict[int, Saved] = {}

    def add(self, number: int, owner: Vm, channel: int, request: int, checkpoint: Checkpoint) -> Saved:
        """Keep a checkpoint; it belongs to this object from here on."""
        saved = Saved(number, owner, channel, request, checkpoint)
        self._saved[saved.number] = saved
        return saved

    def find(self, owner: Vm, number: int) -> Saved:
        """A checkpoint of a VM.

        Raises:
            StateError: there is none of that number, or it is not this VM's.
        """
        saved = self._saved.get(number)
        if saved is None or saved.owner is not owner:
            raise StateError(f"there is no checkpoint {number} here", hint="make one with checkpoint_parent")
        return saved

    def count(self, owner: Vm) -> int:
        """How many a VM has."""
        return sum(1 for saved in self._saved.values() if saved.owner is owner)

    def drop(self, saved: Saved) -> None:
        """Forget one."""
        if self._saved.pop(saved.number, None):
            saved.checkpoint.close()

    def drop_all(self, owner: Vm | None = None) -> None:
        """Forget those of a VM that has ended, or all."""
        for saved in [saved for saved in self._saved.values() if owner is None or saved.owner is owner]:
            self.drop(saved)
