"""The program in the parent VM: reads orders, a JSON object a line, and answers each with one. The job runs its text."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import sfparallel as sf

WORDS = 512  # 8-byte words in a page
MIB = 1 << 20

memory = {"held": np.zeros(0, dtype=np.uint64), "buffer": np.zeros(0, dtype=np.uint64)}
kept: list[sf.Checkpoint] = []
passes = 0


def filled(mib: float) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Memory in which no page is zero, and no two pages are equal."""
    array = np.zeros(int(mib * MIB) // 8, dtype=np.uint64)
    array[::WORDS] = np.arange(1, len(array[::WORDS]) + 1, dtype=np.uint64)
    return array


def dirty(mib: float) -> None:
    """Change one word in each of so many MiB of pages: what a page costs does not depend on how much of it was written."""
    global passes
    passes += 1
    memory["buffer"][: int(mib * MIB) // 8 : WORDS] += np.uint64(passes << 32)


def rank() -> int:
    return int(sf.comm().rank)


def write(mib: float) -> int:
    dirty(mib)
    return int(sf.comm().rank)


def read(mib: float) -> int:
    memory["buffer"][: int(mib * MIB) // 8 : WORDS].sum()
    return int(sf.comm().rank)


def fork(n: int, dirty_mib: float = 0, touched_mib: float = 0, access: str = "") -> dict[str, Any]:
    """Fork n clones that answer with their ranks, after they have touched memory of the parent."""
    work = sf.parallel(n=n)({"": lambda mib: rank(), "write": write, "read": read}[access])
    dirty(dirty_mib)
    begun = time.perf_counter()
    ranks = work(touched_mib)
    seconds = time.perf_counter() - begun
    assert ranks == list(range(n)), ranks
    return {"call_ms": seconds * 1e3}


def os_fork(n: int) -> dict[str, Any]:
    """n processes by os.fork; each answers with its rank through a pipe of its own."""
    begun = time.perf_counter()
    pipes = []
    for me in range(n):
        ours, theirs = os.pipe()
        if os.fork() == 0:
            os.write(theirs, str(me).encode())
            os._exit(0)
        os.close(theirs)
        pipes.append(ours)
    ranks = [int(os.read(pipe, 16)) for pipe in pipes]
    seconds = time.perf_counter() - begun
    for pipe in pipes:
        os.close(pipe)
        os.wait()
    assert ranks == list(range(n)), ranks
    return {"answered_ms": seconds * 1e3}


def itself(me: int) -> int:
    return me


def pool(n: int) -> dict[str, Any]:
    """A multiprocessing.Pool of n forked processes, from its making to the last answer."""
    begun = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(n) as workers:
        ranks = workers.map(itself, range(n), chunksize=1)
        seconds = time.perf_counter() - begun
    assert ranks == list(range(n)), ranks
    return {"answered_ms": seconds * 1e3}


def hold(mib: float, name: str) -> dict[str, Any]:
    memory[name] = filled(mib)
    return {}


def keep() -> dict[str, Any]:
    """An earlier state that shares this VM's memory: what is stored next may not overwrite it."""
    kept.append(sf.checkpoint_parent())
    return {}


def drop() -> dict[str, Any]:
    kept.pop().close()
    return {}


ORDERS: dict[str, Callable[..., dict[str, Any]]] = {
   "fork": fork, "os.fork": os_fork, "multiprocessing": pool, "hold": hold, "keep": keep, "drop": drop,
}  # fmt: skip

if __name__ == "__main__":
    # Not `for line in sys.stdin`: that would wait for more than a line.
    while line := sys.stdin.readline():
        order = json.loads(line)
        print(json.dumps(ORDERS[order.pop("do")](**order)), flush=True)
