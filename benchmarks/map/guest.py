"""In the parent VM: times maps of small tasks with each contender, and prints a line of JSON for each.

All contenders have the same number of workers. Those of the other pools are processes of this VM, on its processors; ours are
clones.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

from benchmarks import mpich


def nothing(x: int) -> int:
    """The least that a task can be."""
    return x


def nap(x: int) -> int:
    """One millisecond that needs no processor."""
    time.sleep(0.001)
    return x


TASKS: dict[str, Callable[[int], int]] = {"empty": nothing, "sleep 1 ms": nap}
Map = Callable[[Callable[[int], int], int, int], Any]
"""Function, number of items, chunksize -> results."""


def of_executor(executor: Any) -> Map:
    return lambda fn, items, chunksize: list(executor.map(fn, range(items), chunksize=chunksize))


def of_pool(pool: Any) -> Map:
    return lambda fn, items, chunksize: pool.map(fn, range(items), chunksize)


def contenders(workers: int) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]], Callable[[Any], Map]]]:
    """Name, how to make its pool, and how to map with it."""
    import sfparallel as sf

    yield "sf.Executor", lambda: sf.Executor(workers), of_executor
    yield "ProcessPoolExecutor", lambda: concurrent.futures.ProcessPoolExecutor(workers), of_executor
    yield "multiprocessing.Pool", lambda: multiprocessing.Pool(workers), of_pool
    if find_spec("loky"):
        import loky
        yield "loky", lambda: loky.ProcessPoolExecutor(workers), of_executor
    if find_spec("distributed"):
        yield "dask.distributed", lambda: dask_client(workers), of_dask
    if find_spec("ray"):
        yield "ray.util.multiprocessing.Pool", lambda: ray_pool(workers), of_pool


@contextmanager
def dask_client(workers: int) -> Iterator[Any]:
    """A scheduler in this process, and workers with one thread each."""
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        yield client


def of_dask(client: Any) -> Map:
    """dask has no chunksize: a task of a chunk is the way that its users go."""
    def mapped(fn: Callable[[int], int], items: int, chunksize: int) -> list[int]:
        chunks = [range(start, min(start + chunksize, items)) for start in range(0, items, chunksize)]
        results = client.gather(client.map(lambda chunk: [fn(x) for x in chunk], chunks, pure=False))
        return [result for chunk in results for result in chunk]
    return mapped


@contextmanager
def ray_pool(workers: int) -> Iterator[Any]:
    import ray
    from ray.util.multiprocessing import Pool
    ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
    with Pool(workers) as pool:
        yield pool
    ray.shutdown()


def microseconds(mapped: Map, fn: Callable[[int], int], items: int, chunksize: int, repeat: int) -> list[float]:
    """Time per task, for each repetition."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        results = mapped(fn, items, chunksize)
        times.append((time.perf_counter() - started) / items * 1e6)
        assert list(results) == list(range(items))
    return times


def measure(name: str, mapped: Map, specification: dict[str, Any]) -> None:
    for task, fn in TASKS.items():
        for chunksize in specification["chunksizes"]:
            mapped(fn, 4 * chunksize, chunksize)  # the workers are awake, and have the function
            times = microseconds(mapped, fn, specification["items"], chunksize, specification["repeat"])
            row = {"pool": name, "task": task, "chunksize": chunksize, "us_per_task": times}
            print(json.dumps(row), flush=True)


def main() -> None:
    specification = json.loads(sys.argv[1])
    workers = specification["workers"]
    if specification.get("mpi"):
        from mpi4py.futures import MPIPoolExecutor
        with MPIPoolExecutor(workers) as executor:
            measure("mpi4py.futures", of_executor(executor), specification)
        return
    for name, make, use in contenders(workers):
        with make() as pool:
            measure(name, use(pool), specification)
    import sfparallel as sf

    def parallel_map(fn: Callable[[int], int], items: int, chunksize: int) -> list[int]:
        return sf.parallel_map(fn, range(items), n=workers, chunksize=chunksize)

    def parallel_imap(fn: Callable[[int], int], items: int, chunksize: int) -> list[int]:
        return list(sf.parallel_imap(fn, range(items), n=workers, chunksize=chunksize))

    # These make their clones anew for each map; the time for that is in it.
    measure("sf.parallel_map, with its fork", parallel_map, specification)
    measure("sf.parallel_imap, with its fork", parallel_imap, specification)
    if shutil.which("mpiexec"):
        command = ["mpiexec", "-n", str(workers + 1), sys.executable, "-m", "mpi4py.futures", "-m", "benchmarks.map.guest"]
        environment = {**os.environ, **mpich.environment(), "PYTHONPATH": os.getcwd(), "MPICH_INTERFACE_HOSTNAME": "localhost"}
        subprocess.run([*command, json.dumps(specification | {"mpi": True})], check=True, env=environment)


if __name__ == "__main__":
    main()
