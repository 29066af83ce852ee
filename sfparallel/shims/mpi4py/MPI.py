"""`mpi4py.MPI` is `sfparallel.MPI`, the very same module, after a look at the options that a program has set before."""

import sys

from mpi4py import options
from sfparallel import MPI

options.apply()
sys.modules[__name__] = MPI
