"""What a region is to do: decided before the fork, and therefore known in every clone."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sfparallel.runtime.collect import Collector
from sfparallel.runtime.payload import Buffer
from sfparallel.runtime.rng import Streams
from sfparallel.runtime.schedule import Schedule


class OnError(enum.StrEnum):
    """What a failing rank (or item) means for the region."""

    RAISE = "raise"
    """Its exception is raised at once and the other clones are killed."""
    RETURN = "return"
    """The list has its exception in place of its result."""
    GATHER = "gather"
    """All others are waited for; then RankError is raised, with `.errors` and `.results`."""


@dataclass(frozen=True)
class Work:
    """What a region is to do.

    Attributes:
        name: of the function, for people.
        call: key -> result; runs in the clones.
        plan: number of ranks -> who does what.
        per_item: keys are items of a map, not ranks.
        ranks: how many clones.
        all_ranks: whether fewer will not do.
        streams: random streams, one per key.
        on_error: what a failing key means.
        timeout_s: limit for the whole region.
        progress: whether to show it; None for what the environment says.
        collector: takes files back, if any are to be collected.
        prepare: called in each clone before it asks for work, where work comes as a stream.
        inputs_come: whether clones are sent what their keys stand for, as a stream.
        inputs: in a clone, what came with its keys.
    """

    name: str
    call: Callable[[int], Any]
    plan: Callable[[int], Schedule]
    per_item: bool
    ranks: int
    all_ranks: bool
    streams: Streams
    on_error: OnError = OnError.RAISE
    timeout_s: float | None = None
    progress: bool | None = None
    collector: Collector | None = None
    prepare: Callable[[], object] | None = None
    inputs_come: bool = False
    inputs: dict[int, list[Buffer]] = field(default_factory=dict)
