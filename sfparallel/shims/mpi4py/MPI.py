"""`mpi4py.MPI` is `sfparallel.MPI`, the very same module."""

import sys

from sfparallel import MPI

sys.modules[__name__] = MPI
