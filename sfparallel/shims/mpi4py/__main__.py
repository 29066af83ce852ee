"""`python -m mpi4py`: what is here, or `mpi4py.run`."""

from __future__ import annotations

import sys

from mpi4py import __version__
from mpi4py.run import main

if sys.argv[1:2] == ["--version"]:
    print(f"mpi4py {__version__} (sfparallel)")
elif sys.argv[1:2] in (["--mpi-library"], ["--mpi-lib-version"]):
    from sfparallel.runtime.mpi.environment import Get_library_version

    print(Get_library_version())
elif sys.argv[1:2] == ["--mpi-std-version"]:
    from sfparallel.runtime.mpi.environment import Get_version

    print("MPI {}.{}".format(*Get_version()))
else:
    main()
