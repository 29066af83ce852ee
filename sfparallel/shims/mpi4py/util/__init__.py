"""What is here of mpi4py's extras: `pkl5`."""
