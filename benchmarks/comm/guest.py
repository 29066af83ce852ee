"""The program in the parent VM: in the same clones, first sfparallel's messages, then mpi4py on MPICH.

MPICH's ranks need no ssh: `mpiexec -launcher manual` prints the command of each host's proxy, and a rank of the region runs it.

Usage: sfrun --image NAME -m benchmarks.comm.guest SPECIFICATION
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import sfparallel as sf
from benchmarks import mpich
from benchmarks.comm import measure

HERE = Path(__file__).parent
LIMIT_S, GRACE_S = 300, 15
"""With 16 clones on two emulated processors, MPICH's ranks have been seen to wait for each other for ever."""


def with_mpich(comm: Any, specification: dict[str, Any]) -> dict[str, Any] | None:
    """Measure mpi4py in the clones of this region: the result at rank 0; None there if it does not finish within the limit."""
    os.environ.update(mpich.environment(), UCX_TLS="tcp,self", UCX_NET_DEVICES="eth0")
    addresses = comm.allgather(socket.gethostbyname(socket.gethostname()))
    starter, commands = None, None
    if comm.rank == 0:
        words = ["mpiexec.hydra", "-launcher", "manual", "-localhost", addresses[0], "-iface", "eth0", "-hosts",
                 ",".join(f"{address}:1" for address in addresses), "-n", str(comm.size), sys.executable,
                 str(HERE / "measure.py"), json.dumps(specification)]  # fmt: skip
        starter = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert starter.stdout is not None
        commands = []
        while (line := starter.stdout.readline()) and not line.startswith("HYDRA_LAUNCH_END"):
            commands.append(line.partition(":")[2].strip())
        assert len(commands) == comm.size, f"mpiexec wants {commands}"
    proxy = subprocess.Popen(shlex.split(comm.scatter(commands, 0)))
    result = None
    try:
        if starter is not None:
            out, _ = starter.communicate(timeout=LIMIT_S)
            assert starter.returncode == 0, f"mpiexec ended with {starter.returncode}"
            result = json.loads(out)
        assert proxy.wait(LIMIT_S + GRACE_S) == 0
    except subprocess.TimeoutExpired:
        # The clones, and with them all ranks of MPICH, end when this function returns.
        if comm.rank == 0:
            print(f"{comm.size} clones: MPICH has not finished within {LIMIT_S} s", file=sys.stderr, flush=True)
    return result


@sf.parallel
def in_clones(specification: dict[str, Any]) -> dict[str, Any]:
    comm = sf.comm()
    rows = measure.measure(comm, specification)
    if comm.rank == 0:
        print(f"{comm.size} clones: sfparallel is measured, MPICH follows", file=sys.stderr, flush=True)
    theirs = with_mpich(comm, specification)
    return {"sfparallel": rows, "mpich": theirs["rows"] if theirs else [], "library": theirs["library"] if theirs else "",
            "mpich_limit_s": LIMIT_S}  # fmt: skip


def main() -> None:
    specification = json.loads(sys.argv[1])
    for n in specification["n"]:
        print(json.dumps({"n": n, **in_clones.options(n=n)(specification)[0]}), flush=True)


if __name__ == "__main__":
    main()
