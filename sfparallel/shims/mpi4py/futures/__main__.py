"""`-m mpi4py.futures program ...`: the first rank runs the program, and its executors' clones do the work; other ranks end."""

from __future__ import annotations

from mpi4py import futures
from mpi4py.run import main
from sfparallel.runtime.communicator import comm

if comm().rank == 0:
    futures.others_run = False
    main()
