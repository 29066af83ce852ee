"""`sf.comm()`: the communicator of the region."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfparallel.errors import StateError
from sfparallel.runtime.here import HERE

if TYPE_CHECKING:
    from sfparallel.runtime.mpi.comm import Intracomm


def comm() -> Intracomm:
    """The communicator of the region that this rank belongs to; in the parent, outside a region, it is rank 0 of 1.

    Returns:
        `sfparallel.MPI.COMM_WORLD`.

    Raises:
        OutsideVMError: this is not a VM of sfparallel.
        StateError: this is a clone created with `sf.clone`, which belongs to no region.
    """
    if HERE.membership is None:
        if HERE.rank:
            raise StateError("a clone made with sf.clone() belongs to no region and has no communicator", hint="use sf.parallel")
        HERE.require_vm()
    from sfparallel.runtime.mpi.comm import COMM_WORLD
    return COMM_WORLD
