"""`sfrun --spmd` and `--mpi4py`: a whole program in every clone, in processes and in VMs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm.rank_files import RankFiles
from tests.conftest import BIN, HANG_S, Ended, Sfrun, machines_of

in_vms = pytest.mark.needs("qemu", "image", "root")

Spmd = Callable[..., Ended]


@pytest.fixture
def local(sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch) -> Spmd:
    """`sfrun --local --spmd`."""
    monkeypatch.setenv("SF_LOG", "error")

    def run(program: str, *options: str, args: tuple[str, ...] = (), stdin: str | None = None) -> Ended:
        return sfrun(program, "--local", "--spmd", *options, args=args, stdin=stdin)

    return run


def test_each_rank_runs_the_whole_program(local: Spmd) -> None:
    ended = local(
        """
        import random, sys
        import numpy as np
        import sfparallel as sf

        me = sf.comm()
        assert sf.in_clone() and __name__ == "__main__" and sf.comm() is me
        print(me.rank, me.size, sys.argv[1:], repr(sys.stdin.read()))
        draws = me.allgather((random.random(), np.random.random(), sf.rng().random()))
        assert len({number for each in draws for number in each}) == 9
        print("sum", me.allreduce(me.rank))
        """,
        "-n", "3", args=("-x", "y"), stdin="for the first",
    ).ok()  # fmt: skip
    heard = ["'for the first'", "''", "''"]
    assert sorted(ended.out.splitlines()) == [
        line for rank in range(3) for line in (f"[{rank}] {rank} 3 ['-x', 'y'] {heard[rank]}", f"[{rank}] sum 3")]  # fmt: skip


def test_seeds_and_regions_inside_a_rank(local: Spmd) -> None:
    program = """
        import sfparallel as sf
        rank = sf.comm().rank
        print(sf.rng().integers(10**6), sf.parallel(lambda: (rank, sf.comm().rank, sf.comm().allreduce(1)), n=2)())
        sf.comm().barrier()
    """
    first, second = (local(program, "-n", "2", "--seed", "3").ok() for _ in range(2))
    assert sorted(first.out.splitlines()) == sorted(second.out.splitlines())
    assert sorted(re.findall(r"\[\(.*\)\]", first.out)) == ["[(0, 0, 2), (0, 1, 2)]", "[(1, 0, 2), (1, 1, 2)]"]


ENDS = {
    # how rank 1 ends: (exit code, last line on stderr)
    "pass": (0, ""),
    "raise ValueError('oops')": (1, "sfrun: rank 1 raised ValueError; the other ranks were ended"),
    "sys.exit(5)": (5, ""),
    "sys.exit('what went wrong')": (1, "[1] what went wrong"),
    "os._exit(6)":
        (6, "sfrun: rank 1 exited with status 6; the other ranks were ended"),
    "sf.comm().Abort(7)": (7, "sfrun: rank 1 called Abort(7); the other ranks were ended"),
    "threading.Thread(target=sf.comm().Abort, args=(8,)).start(); signal.pause()":
        (8, "sfrun: rank 1 called Abort(8); the other ranks were ended"),
    "os.kill(os.getpid(), 9)":
        (137, "sfrun: rank 1 was lost: its process was killed by signal 9 (Killed); the other ranks were ended"),
    "os._exit(0)": (0, ""),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_ends_of_a_rank_while_the_others_go_on(local: Spmd, end: str) -> None:
    """The others work until rank 1's end is known; where it ends the job, they work for ever."""
    code, last = ENDS[end]
    ends_the_job = "other ranks were ended" in last
    ended = local(
        f"""
        import atexit, os, signal, sys, threading
        import sfparallel as sf

        if sf.comm().rank == 1:
            {end}
        elif {ends_the_job}:
            signal.pause()
        else:
            atexit.register(print, "to the end")
        """,
        "-n", "3",
    )  # fmt: skip
    assert (ended.code, ended.err.splitlines()[-1] if ended.err else "") == (code, last), ended.err
    assert sorted(ended.out.splitlines()) == ([] if ends_the_job else ["[0] to the end", "[2] to the end"])
    if end.startswith("raise"):
        trace = r"^\[1\] Traceback .*\n\[1\]   File \"\S*program.py\", line 6, in <module>\n.*\n\[1\] ValueError: oops\n"
        assert re.search(trace, ended.err, re.MULTILINE), "the traceback is that of the program"


def test_a_rank_that_exits_is_an_error_for_those_that_wait_for_it(local: Spmd) -> None:
    ended = local(
        """
        import sys
        import sfparallel as sf
        if sf.comm().rank == 1:
            sys.exit(3)
        sf.comm().barrier()
        """,
        "-n", "3",
    )  # fmt: skip
    assert ended.code == 3
    assert "rank 1 has ended, so this call cannot complete" in ended.err


def test_what_a_rank_sent_arrives_though_it_ended_at_once(local: Spmd) -> None:
    ended = local(
        """
        import time
        import numpy as np
        import sfparallel as sf
        me = sf.comm()
        if me.rank:
            for _ in range(100):
                me.send(np.full(100, me.rank), 0)
        else:
            time.sleep(0.5)
            print(sum(int(me.recv(source=rank).sum()) for rank in range(1, me.size) for _ in range(100)))
        """,
        "-n", "3",
    ).ok()  # fmt: skip
    assert ended.out == "[0] 30000\n"


def test_a_broken_exit_of_one_rank_does_not_keep_the_job(local: Spmd) -> None:
    """The failing rank may tidy up, but not for ever."""
    ended = local(
        """
        import atexit, signal
        import sfparallel as sf
        atexit.register(signal.pause)
        if sf.comm().rank == 1:
            raise ValueError
        """,
        "-n", "2",
    )  # fmt: skip
    assert ended.code == 1 and "sfrun: rank 1 raised ValueError" in ended.err


def test_ctrl_c_interrupts_every_rank(sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LOG", "error")
    process = sfrun.start(
        """
        import atexit, time
        import sfparallel as sf
        atexit.register(print, "tidied up")
        sf.comm().barrier()
        print("ready", flush=True)
        while True:  # not signal.pause(): a signal right before it does not end it
            time.sleep(0.05)
        """,
        "--local", "--spmd", "-n", "2",
    )  # fmt: skip
    assert process.stdout
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert sorted(out.splitlines()) == ["[0] tidied up", "[1] tidied up"]
    assert err.count("KeyboardInterrupt") == 1 and err.startswith("[0] Traceback"), "one traceback will do"


def test_mpi4py_is_ours_under_that_option_only(sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LOG", "error")
    (sfrun.folder / "helper.py").write_text("from mpi4py import MPI\nsize = MPI.COMM_WORLD.size")
    program = """
        import os, sys
        assert sys.path[0] == os.path.dirname(__file__)
        import mpi4py
        mpi4py.rc(initialize=True)
        from mpi4py import MPI
        import mpi4py.rc, helper, sfparallel
        assert MPI is sfparallel.MPI and MPI is sys.modules["mpi4py.MPI"]
        assert mpi4py.__version__ == "4.1.2" and isinstance(mpi4py.get_config(), dict)
        from mpi4py.util import pkl5
        print(helper.size, pkl5.Intracomm(MPI.COMM_WORLD).allreduce(MPI.COMM_WORLD.rank))
    """
    ended = sfrun(program, "--local", "--mpi4py", "-n", "2").ok()
    assert sorted(ended.out.splitlines()) == ["[0] 2 1", "[1] 2 1"]
    # As `python -m mpi4py.run program.py` would.
    words = [str(BIN / "sfrun"), "--local", "--mpi4py", "-n", "2", "-m", "mpi4py.run", str(sfrun.folder / "program.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == ["[0] 2 1", "[1] 2 1"], done.stderr
    assert "/shims" not in sfrun("import sys; print(sys.path)", "--local", "--spmd", "-n", "1").ok().out


def test_lines_of_ranks_do_not_mix_where_python_is_unbuffered(local: Spmd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    program = """
        import sys
        import sfparallel as sf

        rank = sf.comm().rank
        sf.comm().barrier()
        for i in range(300):
            print(rank, i, str(rank) * 40)
            print(rank, i, str(rank) * 40, file=sys.stderr)
    """
    ended = local(program, "--no-label", "-n", "4").ok()
    lines = sorted(f"{rank} {i} {str(rank) * 40}" for rank in range(4) for i in range(300))
    assert (sorted(ended.out.splitlines()), sorted(ended.err.splitlines())) == (lines, lines)


def test_ranks_and_roots_may_be_floats(sfrun: Sfrun) -> None:
    """As for mpi4py, where they become integers of C: programs compute `size / 2`."""
    program = """
        import numpy as np
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        other = 1.0 - world.rank
        assert world.sendrecv(world.rank, other, source=other) == other
        world.send("message", np.float32(other), tag=1)
        assert world.recv(source=np.float64(other), tag=1) == "message"
        assert world.bcast(world.rank, root=1.0) == world.allreduce(world.rank, MPI.MAX) == 1
        found = np.full(3, world.rank)
        world.Bcast(found, root=world.size / 2)
        assert list(found) == [1, 1, 1]
        for root in ("1", 2.0, -1.0):
            try:
                world.bcast(0, root=root)
            except MPI.Exception:
                print("no rank")
            except TypeError:
                print("no number")
    """
    ended = sfrun(program, "--local", "--mpi4py", "-n", "2").ok()
    names = ("no number", "no rank", "no rank")
    assert sorted(ended.out.splitlines()) == [f"[{rank}] {name}" for rank in range(2) for name in names]


def test_a_program_that_begins_mpi_itself(sfrun: Sfrun) -> None:
    program = """
        import os, sys, warnings
        os.environ.update(MPI4PY_RC_INITIALIZE="no", MPI4PY_RC_IRECV_BUFSZ="2048", MPI4PY_RC_FAST_REDUCE="perhaps",
                          MPI4PY_PICKLE_PROTOCOL="3", MPI4PY_PICKLE_THRESHOLD="many")
        from mpi4py import rc
        rc.errors = "shrug"
        with warnings.catch_warnings(record=True) as told:
            from mpi4py import MPI
        print([str(each.message) for each in told])
        assert not MPI.Is_initialized() and rc.initialize is False and rc.irecv_bufsz == 2048
        assert (MPI.pickle.PROTOCOL, MPI.pickle.THRESHOLD) == (3, 1 << 18)
        assert MPI.Init_thread() == MPI.Query_thread() == MPI.THREAD_MULTIPLE and MPI.Is_initialized()
        MPI.Finalize()
        assert MPI.Is_initialized() and MPI.Is_finalized()
    """
    ended = sfrun(program, "--local", "--mpi4py", "-n", "2", "--no-label").ok()
    told = [f"mpi4py.{name}: unexpected value {value!r}"
            for name, value in (("rc.fast_reduce", "perhaps"), ("rc.errors", "shrug"), ("pickle.THRESHOLD", "many"))]  # fmt: skip
    assert ended.out == f"{told}\n" * 2


# ---- files of ranks ----


class Folder:
    """Requests of ranks about one exported folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = RankFiles({1: path})

    def do(self, rank: int, kind: str, path: str, **fields: Any) -> dict[str, Any]:
        return self.files.handle(rank, {"op": "file", "id": 1, "tag": 1, "path": path.encode(), "kind": kind, **fields})

    def write(self, rank: int, path: str, content: str) -> dict[str, Any]:
        data = content.encode()
        self.do(rank, "begin", path)
        self.do(rank, "data", path, offset=0, data=data)
        return self.do(rank, "commit", path, size=len(data), mode=0o644, mtime_ns=0)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    folder = Folder(tmp_path)
    yield folder
    folder.files.close()
    assert not list(tmp_path.rglob("*.sf-part"))


def test_files_of_ranks_come_together(folder: Folder) -> None:
    for rank in (1, 0):
        assert folder.do(rank, "mkdir", "out", mode=0o755)["ok"]
        assert folder.write(rank, f"out/{rank}", f"mine {rank}")["ok"]
        assert folder.write(rank, "out/same", "equal")["ok"]
        assert folder.do(rank, "symlink", "link", data=b"out", mtime_ns=0)["ok"]
        assert folder.do(rank, "mkdir", "out", mode=0o755, mtime_ns=0)["ok"]
    assert {path.name: path.read_text() for path in (folder.path / "out").iterdir()} == {
        "0": "mine 0", "1": "mine 1", "same": "equal"}  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_different_content_is_a_conflict_and_the_lowest_rank_wins(folder: Folder, order: tuple[int, int]) -> None:
    answers = [folder.write(rank, "out.txt", f"of {rank}") for rank in order]
    assert "ok" in answers[0]
    assert answers[1]["error"] == "conflict"
    assert "ranks 0 and 1 both wrote" in answers[1]["message"] and str(folder.path / "out.txt") in answers[1]["message"]
    assert (folder.path / "out.txt").read_text() == "of 0"


def test_files_of_ranks_under_way_at_the_same_time(folder: Folder) -> None:
    for rank in (0, 1):
        folder.do(rank, "begin", "x")
    for rank in (0, 1):
        folder.do(rank, "data", "x", offset=0, data=b"ab")
        folder.do(rank, "data", "x", offset=4096, data=b"\0" * 10 if rank else b"\0\0")
    assert all(folder.do(rank, "commit", "x", size=5000, mode=0o600, mtime_ns=0).get("ok") for rank in (1, 0))
    assert (folder.path / "x").read_bytes() == b"ab" + bytes(4998)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_who_writes_wins_against_who_deletes(folder: Folder, order: tuple[int, int]) -> None:
    (folder.path / "old").write_text("old")
    for rank in order:
        assert (folder.write(1, "old", "new") if rank else folder.do(0, "delete", "old"))["ok"]
    assert (folder.path / "old").read_text() == "new"


def test_a_file_and_a_folder_of_one_name(folder: Folder) -> None:
    assert folder.write(1, "x", "a file")["ok"]
    assert folder.do(0, "mkdir", "x", mode=0o755)["error"] == "conflict"
    assert (folder.path / "x").read_text() == "a file"


@pytest.mark.parametrize(
    "request_", [{"kind": "commit", "path": b"x"}, {"kind": "data", "path": b"../x"}, {"path": 5}, {"path": b"x", "kind": 7}]
)
def test_malformed_requests_of_ranks_are_refused(folder: Folder, request_: dict[str, Any]) -> None:
    answer = folder.files.handle(0, {"op": "file", "id": 1, "tag": 1, **request_})
    assert "error" in answer
    assert not list(folder.path.iterdir())


# ---- in VMs ----


@in_vms
def test_a_program_in_vms(sfrun: Sfrun) -> None:
    (sfrun.folder / "old.txt").write_text("old")
    ended = sfrun(
        """
        import os, pathlib, sys
        from mpi4py import MPI
        import mpi4py
        comm = MPI.COMM_WORLD
        lines = sys.stdin.read()
        assert (lines == "a line\\n" * 50_000) if comm.rank == 0 else not lines
        assert pathlib.Path("old.txt").read_text() == "old"
        os.makedirs("out", exist_ok=True)
        pathlib.Path(f"out/{comm.rank}").write_text(f"rank {comm.rank}")
        pathlib.Path("out/same").write_text("same")
        if comm.rank == 0:
            os.remove("old.txt")
        print(comm.rank, comm.size, len(set(comm.allgather(MPI.Get_processor_name()))), comm.allreduce(comm.rank))
        """,
        "-n", "3", "--mpi4py", stdin="a line\n" * 50_000,
    ).ok()  # fmt: skip
    assert sorted(ended.out.splitlines()) == [f"[{rank}] {rank} 3 3 3" for rank in range(3)]
    assert {path.name: path.read_text() for path in (sfrun.folder / "out").iterdir()} == {
        "0": "rank 0", "1": "rank 1", "2": "rank 2", "same": "same"}  # fmt: skip
    assert not (sfrun.folder / "old.txt").exists()


@in_vms
@pytest.mark.parametrize(("end", "code"), [("raise ValueError('oops')", 1), ("sys.exit(5)", 5), ("comm.Abort(7)", 7)])
def test_ends_of_a_rank_in_vms(sfrun: Sfrun, end: str, code: int) -> None:
    """One rank's end is the job's; what ranks had written is on the host all the same."""
    ended = sfrun(
        f"""
        import pathlib, sys, time
        import sfparallel as sf
        comm = sf.comm()
        pathlib.Path(f"{{comm.rank}}.txt").write_text("written")
        comm.barrier()
        if comm.rank == 1:
            {end}
        if {code} != 5:
            time.sleep(1000)
        """,
        "-n", "2", "--spmd",
    )  # fmt: skip
    assert ended.code == code, ended.err
    if code == 1:
        assert "[1] ValueError: oops\n" in ended.err and "sfrun: rank 1 raised ValueError; the other ranks" in ended.err
    if code == 7:
        assert "sfrun: rank 1 called Abort(7); the other ranks were ended" in ended.err
    assert sorted(path.name for path in sfrun.folder.glob("*.txt")) == ["0.txt", "1.txt"]


@in_vms
def test_a_conflict_of_ranks_in_vms_is_told(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import pathlib
        import sfparallel as sf
        pathlib.Path("same.txt").write_text(f"rank {sf.comm().rank}")
        """,
        "-n", "2", "--spmd",
    )  # fmt: skip
    assert ended.code == 1
    assert "ranks 0 and 1 both wrote" in ended.err and "same.txt" in ended.err and "Traceback" not in ended.err
    assert (sfrun.folder / "same.txt").read_text() == "rank 0"


@in_vms
def test_kill_9_of_a_ranks_qemu_ends_the_job(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import time
        import sfparallel as sf
        sf.comm().barrier()
        print("alive", flush=True)
        time.sleep(1000)
        """,
        "-n", "2", "--spmd", "--pool", "0",
    )  # fmt: skip
    assert process.stdout
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] alive\n", "[1] alive\n"]
    os.kill(machines_of(process.pid)[1], signal.SIGKILL)  # after the parent come the clones; the pool has others by now
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 70
    assert re.search(r"sfrun: rank [01] was lost: .*SIGKILL.*; the other ranks were ended", err), err
