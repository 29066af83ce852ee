"""The cut before a save: what the guest's programs are doing just then delays a fork, and never stops it for good."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess

import pytest

from tests.conftest import HANG_S, Sfrun, command_of, descendants

pytestmark = pytest.mark.needs("qemu", "image", "root")


def test_forks_while_others_read_host_files(sfrun: Sfrun) -> None:
    """A process and a thread always have a file request under way; each gets all of its file, in the parent and in clones."""
    data = os.urandom(8 << 20)
    (sfrun.folder / "big.bin").write_bytes(data)
    ended = sfrun(
        """
        import hashlib, subprocess, threading
        import sfparallel as sf

        def digest():
            with open("big.bin", "rb", buffering=0) as file:
                digest = hashlib.sha256()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := file.read(100_000):
                    digest.update(piece)
            return digest.hexdigest()

        import os
        sums, stop = set(), False

        def read():
            while not stop:
                sums.add(digest())

        command = "while dd if=big.bin bs=64k iflag=nocache status=none | sha256sum >> sums; do :; done"
        reader = subprocess.Popen(["sh", "-c", command])
        thread = threading.Thread(target=read)
        thread.start()
        for generation in range(6):
            assert sf.parallel(lambda: sf.comm().rank, n=2)() == [0, 1]
        # In a clone the thread goes on reading where it was.
        assert sf.parallel(digest, n=2)() == [digest()] * 2
        stop = True
        thread.join()
        reader.kill()
        with open("sums") as file:
            whole = [line.split()[0] for line in file.read().splitlines() if line.endswith("-")]
        print(*(sums | set(whole)))
        os.remove("sums")
        """
    ).ok()
    assert ended.out.split() == [hashlib.sha256(data).hexdigest()]


STUCK = """
import ctypes, os, subprocess
import sfparallel as sf
from sfparallel.errors import VMError

libc = ctypes.CDLL(None, use_errno=True)
os.mkdir("/tmp/mnt")
# A file system whose server never answers: who asks for something there waits, and cannot be frozen (fs/fuse/dev.c).
server = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
assert libc.mount(b"stuck", b"/tmp/mnt", b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
stuck = subprocess.Popen(["ls", "/tmp/mnt"])
while "fuse" not in open(f"/proc/{stuck.pid}/stack").read():
    pass
"""


def test_a_guest_that_does_not_come_to_rest_is_an_error_and_goes_on(sfrun: Sfrun) -> None:
    ended = sfrun(
        STUCK + """
try:
    sf.parallel(lambda: None, n=2)()
except VMError as error:
    print("not forked:", error)
try:
    sf.checkpoint_parent()
except VMError as error:
    print("not kept:", error)
stuck.kill()
os.close(server)
stuck.wait()
print(sf.parallel(lambda: sf.comm().rank, n=2)())
"""
    ).ok()  # fmt: skip
    lines = [line for line in ended.out.splitlines() if not line.startswith("  hint:")]
    assert [line.split(":")[0] for line in lines] == ["not forked", "not kept", "[0, 1]"]
    assert all("did not freeze" in line for line in lines[:2])



def test_a_guest_that_does_not_come_to_rest_holds_no_other_vm(sfrun: Sfrun) -> None:
    """A clone whose fork waits for its programs: its siblings fork meanwhile."""
    (sfrun.folder / "stuck.py").write_text(STUCK + "sf.parallel(lambda: None, n=1)()")
    ended = sfrun(
        """
        import time
        import sfparallel as sf
        from sfparallel.errors import VMError

        def clone():
            if sf.comm().rank == 0:
                try:
                    stick()
                except VMError:
                    return "stuck", time.time()
            time.sleep(1)
            return sf.parallel(lambda: sf.comm().rank, n=1)(), time.time()

        def stick():
            exec(compile(STUCK, "stuck", "exec"), {})

        with open("stuck.py") as file:
            STUCK = file.read()
        (stuck, late), (forked, early) = sf.parallel(clone, n=2)()
        print(stuck, forked, early < late)
        """
    ).ok()
    assert ended.out.split() == ["stuck", "[0]", "True"]


@pytest.mark.parametrize("ask", ["sf.clone(sf.request_ticket(2))", "sf.parallel(lambda: None, n=2)()"])
def test_a_process_that_dies_while_it_waits_for_clones_gets_none(sfrun: Sfrun, ask: str) -> None:
    """Nobody would end such clones, and the program's other process would go on in each of them to its end."""
    process = sfrun.start(
        f"""
        import os, signal, sys, time
        import sfparallel as sf

        sf.parallel(lambda: None, n=1)()
        go, begin = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(go, 1)
            {ask}
            os._exit(0)
        print("ready", flush=True)
        sys.stdin.readline()
        os.write(begin, b"x")
        waits = 0
        while waits < 30:      # it waits in its first request only for a moment
            time.sleep(0.02)
            with open(f"/proc/{{child}}/stack") as file:
                waits = waits + 1 if "skb_wait_for_more" in file.read() else 0
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
        sys.stdin.readline()
        time.sleep(4)
        print("end", flush=True)
        time.sleep(2)
        """,
        "--pool", "0", stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    (launcher,) = (pid for pid in descendants(process.pid) if command_of(pid).startswith("sf-launcher"))
    os.kill(launcher, signal.SIGSTOP)
    process.stdin.write("ask\n")
    process.stdin.flush()
    assert process.stdout.readline() == "killed\n"
    os.kill(launcher, signal.SIGCONT)
    out, err = process.communicate("go on\n", timeout=HANG_S)
    assert (process.returncode, out) == (0, "end\n"), err


def test_forks_beside_a_process_that_prints_without_end(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import subprocess
        import sfparallel as sf

        yes = subprocess.Popen(["yes"])
        for _ in range(3):
            assert sf.parallel(lambda: sf.comm().rank, n=2)() == [0, 1]
        yes.kill()
        yes.wait()
        print("end")
        """
    ).ok()  # fmt: skip
    assert set(ended.out.splitlines()) <= {"y", "[0] y", "[1] y", "[0] ", "[1] ", "end"}
    assert ended.out.endswith("end\n")


def test_a_time_limit_holds_while_the_fork_waits_for_qemu(sfrun: Sfrun) -> None:
    """The launcher of shells stands still: the region ends in its time, and no clone of it comes later."""
    process = sfrun.start(
        """
        import sys, time
        import sfparallel as sf

        def number():
            return sf.comm().rank

        assert sf.parallel(number, n=1)() == [0]
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            sf.parallel(number, n=2, timeout=2)()
        except sf.RegionTimeout as error:
            print("missing", error.missing, flush=True)
        try:
            sf.parallel_imap(abs, [-1, -2], n=2, timeout=2)
        except sf.RegionTimeout as error:
            print(str(error).splitlines()[0], flush=True)
        sys.stdin.readline()
        print(sf.parallel(number, n=2)(), *sf.parallel_imap(abs, [-5, -6], n=2))
        """,
        "--pool", "0", stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    (launcher,) = (pid for pid in descendants(process.pid) if command_of(pid).startswith("sf-launcher"))
    os.kill(launcher, signal.SIGSTOP)
    process.stdin.write("fork\n")
    process.stdin.flush()
    assert process.stdout.readline() == "missing [0, 1]\n"
    # Not when the supervisor gives the launcher up (launcher.LIMIT_S), which is another error.
    assert process.stdout.readline() == "parallel_imap took longer than 2 s; no clone was made\n"
    os.kill(launcher, signal.SIGCONT)
    out, err = process.communicate("go on\n", timeout=HANG_S)
    assert (process.returncode, out) == (0, "[0, 1] 5 6\n"), err


def test_a_time_limit_holds_while_the_guest_comes_to_rest(sfrun: Sfrun) -> None:
    ended = sfrun(
        STUCK + """
try:
    sf.parallel(lambda: None, n=2, timeout=3)()
except sf.RegionTimeout as error:
    print("missing", error.missing)
stuck.kill()
os.close(server)
stuck.wait()
print(sf.parallel(lambda: sf.comm().rank, n=2)())
"""
    ).ok()  # fmt: skip
    assert ended.out.splitlines() == ["missing [0, 1]", "[0, 1]"]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("held", ["ticket", "checkpoint"])
def test_a_process_between_two_requests_waits_in_the_clones_of_another(sfrun: Sfrun, held: str, order: str) -> None:
    """An error there would have it run on in the clone, up to ending the process that the clone was made for."""
    (sfrun.folder / "bystander.py").write_text("""
import os, signal, time
import sfparallel as sf

def run(held, program, began):
    parent = os.uname().nodename
    sf.parallel(lambda: None, n=1)()  # a first fork takes a while to prepare
    if held == "ticket":
        ticket = sf.request_ticket(1)
        ask = lambda: sf.clone(ticket)
    else:
        executor = sf.Executor(1)
        executor.submit(int).result()
        ask = executor.shutdown
    os.write(began, b".")
    while os.uname().nodename == parent:
        time.sleep(0.01)
    open("/tmp/asked", "w").close()
    try:
        ask()
    finally:
        os.kill(program, signal.SIGKILL)
""")
    ended = sfrun(
        f"""
        import os, signal, time
        import sfparallel as sf
        import bystander

        def rank():
            while not os.path.exists("/tmp/asked"):
                time.sleep(0.01)
            time.sleep(2)
            return os.uname().nodename != parent

        parent = os.uname().nodename
        begun, began = os.pipe()
        mine = sf.request_ticket(1) if {order == "after"} else None
        if not os.fork():
            bystander.run({held!r}, os.getppid(), began)
        os.read(begun, 1)
        if mine is None:
            print(sf.parallel(rank, n=1)(), flush=True)
        elif sf.clone(mine):
            sf.exit(7 if rank() else 1)
        else:
            print(sf.join(mine), flush=True)
        os.killpg(0, signal.SIGKILL)
        """
    )
    assert ended.out == ("[True]\n" if order == "before" else "{1: 7}\n"), ended.err
