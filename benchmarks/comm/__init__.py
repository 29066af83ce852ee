"""Messages among clones, next to mpi4py on MPICH in the same clones: `python -m benchmarks.comm`."""
