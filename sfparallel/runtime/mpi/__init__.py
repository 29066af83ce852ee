"""MPI among the ranks of a region: mpi4py's names and meaning, in Python (see `sfparallel.MPI`)."""
