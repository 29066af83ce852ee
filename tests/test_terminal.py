"""The program's standard streams are a terminal where the host's are: its size, its modes, its input and its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import BIN, Sfrun
from tests.screen import Screen

LOCAL = pytest.param(("--local",), id="local")
VM = pytest.param((), id="vm", marks=pytest.mark.needs("qemu", "image", "root"))
BOTH = pytest.mark.parametrize("options", [LOCAL, VM])
ONLY_VM = pytest.mark.needs("qemu", "image", "root")

Start = Callable[..., Screen]


@pytest.fixture
def start(sfrun: Sfrun) -> Iterator[Start]:
    """`sfrun` with a program, on a terminal of its own."""
    screens: list[Screen] = []

    def run(program: str, *options: str, **terminal: object) -> Screen:
        words = [str(BIN / "sfrun"), *options, str(sfrun.write(program))]
        screens.append(Screen(words, sfrun.folder, **terminal))  # type: ignore[arg-type]
        return screens[-1]

    yield run
    for screen in screens:
        screen.close()


LOOK = """
    import os, sys
    print([stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)], file=open("look", "a"))
    for number in range(3):
        if os.isatty(number):
            print(*os.get_terminal_size(number), os.environ["TERM"], os.environ.get("COLUMNS"), file=open("look", "a"))
    """


@BOTH
def test_a_program_finds_the_terminal_of_the_host(start: Start, sfrun: Sfrun, options: tuple[str, ...]) -> None:
    assert start(LOOK, *options).wait() == 0
    expected = "[True, True, True]\n" + "101 37 xterm None\n" * 3
    assert (sfrun.folder / "look").read_text() == expected


@ONLY_VM
@pytest.mark.parametrize("number", range(3))
def test_a_stream_that_is_a_file_is_no_terminal(start: Start, sfrun: Sfrun, number: int) -> None:
    assert start(LOOK, redirected={number: "file"}).wait() == 0
    expected = [each != number for each in range(3)]
    assert (sfrun.folder / "look").read_text() == f"{expected}\n" + "101 37 xterm None\n" * 2


@ONLY_VM
def test_output_keeps_its_order_and_its_bytes(start: Start) -> None:
    screen = start(
        """
        import os, sys
        for number in range(300):
            os.write(1 + number % 2, b"%d " % number)
        print()
        os.write(1, bytes(range(256)) + b"\\r\\n")
        os.write(2, b"%04999d\\n" % 1 * 40)
        """
    )
    assert screen.wait() == 0
    expected = " ".join(map(str, range(300))).encode() + b" \n" + bytes(range(256)) + b"\r\n" + b"%04999d\n" % 1 * 40
    # The host's terminal puts a carriage return before each line feed, here as after any program.
    assert screen.shown.endswith(expected.replace(b"\n", b"\r\n"))


@ONLY_VM
def test_input_with_a_prompt_readline_getpass_and_end_of_file(start: Start) -> None:
    screen = start(
        """
        import getpass
        print("hello", input("name? "))
        print("got", getpass.getpass("secret? "))
        try:
            input("nothing? ")
        except EOFError:
            print("ended")
        print("again", input("more? "))
        import readline
        print("edited", input("edit> "))
        """
    )
    screen.until("name? ")
    screen.type("bob\n")
    assert "bob" in screen.until("hello bob")
    screen.until("secret? ")
    assert not screen.echoes() and screen.edits_lines()
    screen.type("hidden\n")
    assert screen.until("got hidden").count("hidden") == 1
    screen.until("nothing? ")
    assert screen.echoes()
    screen.type("\x04")
    screen.until("ended")
    screen.until("more? ")
    screen.type("yes\n")
    screen.until("again yes")
    screen.until("edit> ")
    assert not screen.edits_lines()
    screen.type("abX\x7fc\n")  # the key that readline, and not the terminal, takes
    screen.until("edited abc")
    assert screen.wait() == 0
    assert screen.echoes() and screen.edits_lines()


@ONLY_VM
def test_type_ahead_with_an_end_of_file_is_read_in_order(start: Start) -> None:
    screen = start(
        """
        import sys, time
        print("ready")
        while not __import__("select").select([0], [], [], 0)[0]:
            time.sleep(0.01)
        time.sleep(1)  # what follows is typed meanwhile, or later: both must do
        print([len(line) for line in sys.stdin])
        """
    )
    screen.until("ready")
    for _ in range(8):  # more than the guest's terminal holds
        screen.type("x" * 999 + "\n")
    screen.type("last\n\x04")
    screen.until(str([1000] * 8 + [5]))
    assert screen.wait() == 0


@ONLY_VM
def test_the_debugger_works(start: Start) -> None:
    screen = start("answer = 42\nbreakpoint()\nprint('went on')")
    screen.until("(Pdb) ")
    screen.type("p answer + 1\n")
    screen.until("43")
    screen.until("(Pdb) ")
    screen.type("c\n")
    screen.until("went on")
    assert screen.wait() == 0


@ONLY_VM
def test_keys_that_need_no_return(start: Start) -> None:
    screen = start(
        """
        import sys, tty, termios
        before = termios.tcgetattr(0)
        tty.setraw(0)
        print("press")
        key = sys.stdin.buffer.raw.read(1)
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        print("pressed", key)
        """
    )
    screen.until("press")
    screen.type("\x03")  # in raw mode no signal, as anywhere
    screen.until("pressed b'\\x03'")
    assert screen.wait() == 0


@ONLY_VM
def test_a_program_that_is_killed_leaves_the_terminal_as_it_was(start: Start) -> None:
    screen = start("import tty, time; tty.setraw(0); print('raw', flush=True)\nwhile True: time.sleep(1)")
    screen.until("raw")
    assert not screen.edits_lines()
    os.kill(screen.pid, signal.SIGTERM)
    assert screen.wait() == 128 + signal.SIGTERM
    assert screen.edits_lines() and screen.echoes()


@BOTH
def test_interrupt_from_the_keyboard(start: Start, options: tuple[str, ...]) -> None:
    screen = start(
        """
        import time
        try:
            print("ready")
            while True:  # a signal right before the system call does not end a sleep
                time.sleep(0.05)
        except KeyboardInterrupt:
            print("caught")
        """,
        *options,
    )
    screen.until("ready")
    screen.type("\x03")
    screen.until("caught")
    assert screen.wait() == 0


@ONLY_VM
def test_the_window_changes_its_size(start: Start) -> None:
    screen = start(
        """
        import os, signal, time
        sizes = []
        signal.signal(signal.SIGWINCH, lambda *_: sizes.append(os.get_terminal_size()))
        print("ready")
        while not sizes:        # not input(): a signal right before it blocks is handled when it returns
            time.sleep(0.05)
        print("now", *sizes[0])
        input()
        """
    )
    screen.until("ready")
    screen.resize(50, 20)
    screen.until("now 50 20")
    screen.type("\n")
    assert screen.wait() == 0


@BOTH
def test_a_clone_prints_no_output_of_its_parent_and_reads_no_input(start: Start, options: tuple[str, ...]) -> None:
    screen = start(
        """
        import os, sys
        import sfparallel as sf

        def work():
            print("stdin", sys.stdin.isatty())
            try:
                return input()
            except EOFError:
                return "end"

        input("go? ")
        for number in range(3):
            os.write(1, b"only once %d;" % number)
            print(sf.parallel(n=2)(work)())
        print("then", input())
        """,
        *options,
    )
    screen.until("go? ")
    screen.type("yes\nfor the parent\n")
    screen.until("then for the parent")
    assert screen.wait() == 0
    text = screen.shown.decode()
    for number in range(3):
        assert text.count(f"only once {number};") == 1
    assert text.count("['end', 'end']") == 3
    assert text.count("[0] stdin False\r\n") == text.count("[1] stdin False\r\n") == 3


@ONLY_VM
def test_the_first_rank_of_a_whole_program_has_the_keyboard(start: Start) -> None:
    screen = start(
        """
        import sys
        import sfparallel as sf
        rank = sf.comm().rank
        try:
            line = input()
        except EOFError:
            line = "end"
        for turn in range(2):
            sf.comm().barrier()
            if turn == rank:
                print("read", line)
        """,
        "--spmd", "-n", "2",
    )  # fmt: skip
    screen.type("typed\n")
    screen.until("[0] read typed")
    screen.until("[1] read end")
    assert screen.wait() == 0


@BOTH
def test_a_progress_bar_on_the_terminal(start: Start, options: tuple[str, ...]) -> None:
    screen = start(
        """
        import sfparallel as sf
        print(sf.parallel_map(abs, range(4), n=2, progress=True))
        """,
        *options,
    )
    assert screen.wait() == 0
    text = screen.shown.decode()
    if options:
        assert "4/4" in text and "━━━" in text and "\x1b[" in text  # rich draws it
    else:
        assert "abs: 4/4" in text  # rich is not in the default image
    assert "[0, 1, 2, 3]\r\n" in text


