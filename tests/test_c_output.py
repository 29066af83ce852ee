"""What clones print by C, or through streams of the program's own, is seen, and once: on real VMs, and with --local."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter

import pytest

from sfparallel.runtime.c_output import COutput
from tests.conftest import Sfrun

vms = pytest.mark.needs("qemu", "image", "root")
BOTH = [pytest.param((), id="vms", marks=vms), pytest.param(("--local",), id="local")]

PROGRAM = """
    import ctypes, os, sys
    import sfparallel as sf

    libc = ctypes.CDLL(None)       # as an extension that prints
    libc.printf(b"C, before the first fork\\n")

    def printf(text):
        libc.printf(text.encode() + b"\\n")

    def item(where, i):
        print("Python", where, i)
        printf(f"C, {where} {i}")

    sf.parallel_map(lambda i: item("map", i), range(4), n=2)
    libc.printf(b"C, begun in the parent, ")
    sf.parallel(lambda: item("region", sf.comm().rank), n=2)()
    libc.printf(b"and ended there\\n")
    list(sf.parallel_imap(lambda i: item("imap", i), range(4), n=2))
    with sf.Executor(2, initializer=lambda: printf("C, initializer")) as executor:
        list(executor.map(item, ["task"] * 4, range(4)))
    try:
        sf.parallel(lambda: (printf("C, fails"), 1 / 0), n=1)()
    except ZeroDivisionError:
        pass
    try:
        sf.parallel(lambda: (printf("C, leaves"), sf.exit(3)), n=1)()
    except sf.RankExit:
        pass
    ticket = sf.request_ticket(2)
    libc.printf(b"C, before the low-level clone\\n")
    if rank := sf.clone(ticket):
        printf(f"C, low level {rank}")
        sf.exit(0)
    sf.join(ticket)
    libc.printf(b"C, before the checkpoint\\n")
    checkpoint = sf.checkpoint_parent()
    if checkpoint.rank:
        printf(f"C, checkpoint {checkpoint.rank}")
        sf.exit(0)
    ticket = sf.request_ticket(2)
    sf.create_clones(checkpoint, ticket)
    sf.join(ticket)
    printf("C, parent")
"""

EXPECTED = ["C, before the first fork", "and ended there", "C, initializer", "C, fails", "C, leaves",
            "C, before the low-level clone", "C, before the checkpoint", "C, parent",
            *(f"{who}, {where} {i}".replace("Python,", "Python") for who in ("C", "Python")
              for where, n in (("map", 4), ("region", 2), ("imap", 4), ("task", 4)) for i in range(n)),
            *(f"C, {where} {i}" for where in ("low level", "checkpoint") for i in (1, 2))]  # fmt: skip


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this variable, which CI systems set, Python has C buffer nothing."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def lines_of(out: str) -> list[str]:
    """Without labels."""
    return [line.split("] ", 1)[-1] for line in out.splitlines()]


@pytest.mark.parametrize("how", BOTH)
def test_every_line_of_c_is_seen_once(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    out = sfrun(PROGRAM, *how).ok().out
    assert out.count("C, begun in the parent, ") == 1
    lines = lines_of(out)
    if lines.count("C, initializer") > 1:  # the second clone may come too late for any task
        lines.remove("C, initializer")
    assert Counter(lines) == Counter(EXPECTED)
    for i in range(4):  # as at an interpreter's exit
        assert lines.index(f"Python map {i}") < lines.index(f"C, map {i}")


@pytest.mark.needs("qemu", "ml", "root")
def test_what_cpp_and_fortran_print_is_seen_once(sfrun: Sfrun) -> None:
    """By the calls that their compilers make of `std::cout << text` and `print *, text`."""
    out = sfrun(
        """
        import ctypes
        import struct
        import sfparallel as sf

        cpp, fortran = ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL("libgfortran.so.5")
        kept = ctypes.create_string_buffer(16)
        cpp["_ZNSt8ios_base4InitC1Ev"](kept)
        cout = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(cpp, "_ZSt4cout")))
        insert = cpp["_ZSt16__ostream_insertIcSt11char_traitsIcEERSt13basic_ostreamIT_T0_ES6_PKS3_l"]

        def print_by_cpp(text):
            insert(cout, text, ctypes.c_long(len(text)))

        def print_by_fortran(text):
            place = ctypes.create_string_buffer(b"program.f90")
            call = ctypes.create_string_buffer(4096)
            struct.pack_into("=iiQi", call, 0, 128, 6, ctypes.addressof(place), 1)   # list-directed, to unit 6
            fortran._gfortran_st_write(call)
            fortran._gfortran_transfer_character_write(call, text, ctypes.c_long(len(text)))
            fortran._gfortran_st_write_done(call)

        def both(where):
            print_by_fortran(f"Fortran {where}".encode())        # this one flushes what C has buffered before
            print_by_cpp(f"C++ {where}\\n".encode())

        both("before")
        sf.parallel_map(lambda i: both(f"item {i}"), range(4), n=2)
        ticket = sf.request_ticket(2)
        if rank := sf.clone(ticket):
            both(f"clone {rank}")
            sf.exit(0)
        sf.join(ticket)
        both("after")
        """, "--image", "ml",
    ).ok().out  # fmt: skip
    places = ["before", *(f"item {i}" for i in range(4)), "clone 1", "clone 2", "after"]
    expected = [f"{language} {place}" for language in ("C++", "Fortran") for place in places]
    assert sorted(line.strip() for line in lines_of(out)) == sorted(expected)


@pytest.mark.parametrize("how", BOTH)
def test_another_thread_that_reads_c_stdin_holds_up_no_fork(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    """It has the lock of that stream as long as nobody types."""
    program = """
        import ctypes, threading, time
        import sfparallel as sf

        libc = ctypes.CDLL(None)
        stdin = ctypes.c_void_p.in_dll(libc, "stdin")
        threading.Thread(target=libc.getc, args=(stdin,), daemon=True).start()
        while libc.ftrylockfile(stdin) == 0:            # until the thread is in there
            libc.funlockfile(stdin)
            time.sleep(0.01)
        sf.parallel(lambda: libc.printf(b"seen\\n") and None, n=2)()
        print("forked", flush=True)
        import os; os._exit(0)                          # an orderly exit would wait for it
    """
    process = sfrun.start(program, *how, stdin=subprocess.PIPE)
    assert process.wait(300) == 0 and process.stdout is not None
    assert sorted(lines_of(process.stdout.read())) == ["forked", "seen", "seen"]


@pytest.mark.parametrize("how", BOTH)
def test_streams_of_the_programs_own(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    """As logs that copy what is printed; print() itself needs nothing but `write`."""
    ended = sfrun(
        """
        import sys
        import sfparallel as sf

        class Copy:
            def __init__(self, stream):
                self.write = stream.write

        class Broken(Copy):
            def flush(self):
                raise OSError("full")

        def rank(name):
            print(name, sf.comm().rank)
            sys.__stdout__.write("to the original, ")

        print("begun, ", end="")
        sys.stdout = Copy(sys.stdout)
        sf.parallel(rank, n=2)("copy")
        sys.stderr = Broken(sys.stderr)
        sf.parallel(rank, n=2)("broken")
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__     # the interpreter complains at its exit
        """, *how,
    ).ok()  # fmt: skip
    assert ended.out.count("begun, ") == 1 and ended.out.count("to the original, ") == 4
    for line in ("copy 0", "copy 1", "broken 0", "broken 1"):
        assert ended.out.count(line) == 1


def test_wide_characters() -> None:
    """In a process of its own: a stream stays with the width that it was first used with."""
    program = """
        import ctypes, os
        from sfparallel.runtime.c_output import COutput

        ctypes.CDLL(None).wprintf("wide\\n")
        COutput().flush()
        ctypes.CDLL(None).wprintf("wider\\n")
        COutput().flush()
        os._exit(0)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True)
    assert ended.stdout == b"wide\nwider\n"


def test_the_libc_here_is_looked_at_and_not_called() -> None:
    """Or the cheap way would be the one that is never taken."""
    assert all(stream.words is not None for stream in COutput().streams)
