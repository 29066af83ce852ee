"""mpi4py's own tests under `sfrun --mpi4py`, in processes (`--local`) and in VMs.

They are not part of this project: the source distribution is fetched when they are needed, and kept in pytest's cache.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import BIN

VERSION = "4.1.2"

ACCEPTANCE = ["test_p2p_obj", "test_cco_obj", "test_p2p_buf", "test_cco_buf", "test_status", "test_request"]
"""What has to pass with one to four ranks."""

REST = [
    "test_address", "test_attributes", "test_buffer", "test_cco_buf_inter", "test_cco_nb_buf", "test_cco_nb_vec",
    "test_cco_ngh_buf", "test_cco_ngh_obj", "test_cco_obj_inter", "test_cco_pr_buf", "test_cco_pr_ngh_buf",
    "test_cco_pr_vec", "test_cco_vec", "test_cco_vec_inter", "test_comm", "test_comm_inter", "test_comm_topo",
    "test_environ", "test_errhandler", "test_errorcode", "test_exceptions", "test_grequest", "test_group",
    "test_handle", "test_info", "test_mpimem", "test_msgspec", "test_msgzero", "test_objmodel", "test_op",
    "test_p2p_buf_matched", "test_p2p_buf_part", "test_p2p_obj_matched", "test_pack", "test_pickle", "test_session",
    "test_subclass", "test_ulfm",
]

UTILITIES = ["test_util_dtlib", "test_util_pkl5"]
"""Of `mpi4py.util`. Left out: test_util_pool, which takes minutes, and passes; test_util_sync, which counts by windows."""

LEFT_OUT = {
    "TestUtilDTLib.testMissingNumPy": "numpy is always there",
    "TestUtilDTLib.testStruct": "thousands of combinations, which take minutes, and pass",
    "test_util_pkl5.*.testIrecv": "irecv works for objects of any size, where mpi4py's pkl5 refuses it",
    "TestOp.testCreateMany": "a limit of 32 operations, which only a C library needs",
    "*.TestErrhandler*.testCreate": "a limit of 32 error handlers, which only a C library needs",
    "TestMessageRMA": "windows are not offered",
    "TestObjModel.testConstants": "BOTTOM is no buffer: in Python 3.11 only types in C can be",
    "*.TestMessageSimple*GPUBuf*.testBuffer": "memory of other devices is not told apart",
    "TestMessageSimpleCAIBuf.testBuffer": "memory of other devices is not told apart",
}
"""Tests that cannot pass, and why."""

@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Path:
    """The folder of mpi4py's tests."""
    folder = Path(request.config.cache.mkdir("mpi4py"))  # type: ignore[union-attr]
    tests = folder / f"mpi4py-{VERSION}" / "test"
    if not tests.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", "mpi4py", "--no-deps", "--dest",
                   str(folder), f"mpi4py=={VERSION}"]  # fmt: skip
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        archives = list(folder.glob("mpi4py-*.tar.gz"))
        assert archives, f"mpi4py's source distribution cannot be fetched:\n{ended.stderr}"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
    return tests


DEMOS = [
    ("helloworld.py", 3), ("osu_barrier.py", 2), ("osu_alltoallv.py", 2), ("compute-pi/cpi-cco.py", 3),
    ("futures/run_primes.py", 3), ("futures/run_julia.py", 3), ("mandelbrot/mandelbrot.py", 3),
    ("nxtval/nxtval-threads.py", 5), ("profiling/cpi.py", 3), ("profiling/ring.py", 3), ("profiling/threads.py", 3),
    ("reductions/test_reductions.py -q", 5), ("sequential/test_seq.py", 5), ("threads/sendrecv.py", 1),
    *((f"init-fini/test_0.py {option}", 2) for option in (
        "threads=false", "thread_level=single", "fast_reduce=false", "recv_mprobe=false", "irecv_bufsz=0", "errors=default",
        "errors=exception", "errors=abort", "errors=fatal")),
    *((f"init-fini/test_{name}.py", 2) for name in ("1", "2", "3", "4", "5", "6", "mpi40")),
    *((f"mpi-ref-v1/ex-{name}.py", 4) for name in (
        "2.01", "2.08", "2.16", "2.29", "2.32", "2.34", "2.35", "3.01", "3.02", "3.03", "3.04", "3.05", "3.06", "3.07", "3.08",
        "3.09", "3.11", "3.12", "3.13")),
]  # fmt: skip
"""mpi4py's demos, and with how many ranks.

Left out: the other osu_....py, futures/run_mandelbrot.py and perf_primes.py, which take longer and pass; run_crawl.py, which
wants the internet; run_cpi.py and run_hello.py, whose workers want a communicator of their own; test_futures.py, which calls
mpi4py's private functions; those that compile C.
"""

NOT_OFFERED = {
    "compute-pi/cpi-rma.py": "Win.Create is not supported", "compute-pi/cpi-dpm.py": "Spawn is not supported",
    "nxtval/nxtval-dynproc.py": "Spawn is not supported", "nxtval/nxtval-mpi3.py": "Win.Allocate is not supported",
    "nxtval/nxtval-onesided.py": "Win.Create is not supported", "nxtval/nxtval-scalable.py": "Win.Create is not supported",
    "spawning/cpi-master.py": "Spawn is not supported",
}  # fmt: skip


def run(suite: Path, ranks: int, words: list[str], *options: str, timeout_s: int = 450) -> None:
    """Run modules as a user would, in the folder of the tests."""
    excluded = [word for pattern in LEFT_OUT for word in ("-x", pattern)]
    ended = subprocess.run(
        [str(BIN / "sfrun"), *options, "-n", str(ranks), "--mpi4py", "--timeout", str(timeout_s), "main.py", "-q", *excluded,
         *words],
        cwd=suite, capture_output=True, text=True, timeout=timeout_s + 50,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, f"{ended.stdout[-4000:]}\n{ended.stderr[-16000:]}"
    done = re.findall(r"^\[(\d+)\] Ran (\d+) tests", ended.stderr, re.MULTILINE)
    assert sorted(int(rank) for rank, _ in done) == list(range(ranks)), ended.stderr[-4000:]
    assert all(int(count) for _, count in done)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_has_to_pass(suite: Path, ranks: int) -> None:
    run(suite, ranks, ACCEPTANCE, "--local")


@pytest.mark.long
def test_the_rest(suite: Path) -> None:
    run(suite, 3, REST, "--local")


def test_utilities(suite: Path) -> None:
    run(suite, 1, UTILITIES, "--local")


def test_ranks_in_turn(tmp_path: Path) -> None:
    (tmp_path / "turns.py").write_text(
        "from mpi4py import MPI\n"
        "from mpi4py.util.sync import Mutex, Sequential\n"
        "comm, path = MPI.COMM_WORLD, 'turns.txt'\n"
        "for turn in range(3):\n"
        "    with Sequential(comm):\n"
        "        with open(path, 'a') as file:\n"
        "            file.write(f'{comm.rank}')\n"
        "    comm.barrier()\n"
        "try:\n"
        "    Mutex(comm=comm)\n"
        "except NotImplementedError as error:\n"
        "    assert 'one rank grant turns' in str(error)\n"
        "else:\n"
        "    raise SystemExit('a mutex without windows')\n"
    )
    ended = subprocess.run([str(BIN / "sfrun"), "--local", "-n", "3", "--mpi4py", "turns.py"], cwd=tmp_path, capture_output=True,
                           text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "turns.txt").read_text() == "012" * 3


POOL = """
from mpi4py.util.pool import Pool, ThreadPool

def square(x):
    return x * x

def divide(x, y):
    return x / y

told = []
for kind in (Pool, ThreadPool):
    with kind(2) as pool:
        assert pool.apply(divide, (6, 3)) == pool.apply(divide, kwds={"x": 4, "y": 2}) == 2
        assert pool.map(square, range(7)) == [x * x for x in range(7)] == list(pool.imap(square, range(7), 2))
        assert sorted(pool.imap_unordered(square, range(7))) == [x * x for x in range(7)]
        assert pool.starmap(divide, [(6, 3), (9, 3)]) == list(pool.istarmap(divide, iter([(6, 3), (9, 3)]))) == [2, 3]
        good = pool.map_async(square, [1, 2, 3], chunksize=2, callback=told.append)
        bad = pool.starmap_async(divide, [(1, 1), (1, 0)], error_callback=told.append)
        assert good.get(60) == [1, 4, 9] and good.successful()
        bad.wait(60)
        assert bad.ready() and not bad.successful()
        try:
            bad.get()
        except ZeroDivisionError:
            pass
        assert pool.map_async(square, []).get(60) == []
    pool.join()
    try:
        pool.apply_async(square, (1,))
    except RuntimeError:
        print("closed")
print(*sorted(map(repr, told)))
"""


def test_a_pool(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    ended = subprocess.run([str(BIN / "sfrun"), "--local", "-n", "1", "--mpi4py", "pool.py"], cwd=tmp_path, capture_output=True,
                           text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = "ZeroDivisionError('division by zero') ZeroDivisionError('division by zero') [1, 4, 9] [1, 4, 9]"
    assert ended.stdout.replace("[0] ", "").split("\n") == ["closed", "closed", told, ""]


def demo(suite: Path, words: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """Run a demo in its own folder, as its makefile would."""
    program, *args = words.split()
    path = suite.parent / "demo" / program
    return subprocess.run([str(BIN / "sfrun"), "--local", "-n", str(ranks), "--mpi4py", path.name, *args], cwd=path.parent,
                          capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip


def test_demos(suite: Path) -> None:
    failed = {}
    for words, ranks in DEMOS:
        ended = demo(suite, words, ranks)
        if ended.returncode:
            failed[words] = ended.stdout[-1000:] + ended.stderr[-2000:]
    assert not failed


def test_demos_of_what_is_not_offered(suite: Path) -> None:
    for words, told in NOT_OFFERED.items():
        ended = demo(suite, words, 1)
        assert ended.returncode == 1 and told in ended.stderr, (words, ended.stderr[-2000:])


@pytest.mark.needs("qemu", "image", "root")
@pytest.mark.timeout(900)
def test_what_has_to_pass_in_vms(suite: Path) -> None:
    """All six with two ranks, which takes two minutes under emulation.

    For other numbers of ranks: `sfrun -n 3 --mpi4py main.py -q test_p2p_obj ...` in the folder of mpi4py's tests.
    """
    run(suite, 2, ACCEPTANCE, timeout_s=800)
