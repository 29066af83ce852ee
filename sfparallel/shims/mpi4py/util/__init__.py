"""What is here of mpi4py's extras: `dtlib`, `pkl5`, `pool`, and of `sync` what needs no windows."""
