"""Standard streams that are closed (`sfrun script.py <&-`), and text of others in messages of ours."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sfparallel.errors import SfError
from sfparallel.text import in_one_line, printable
from sfparallel.vmm.exits import EXIT_PARENT_LOST
from tests.conftest import BIN, HANG_S, Sfrun

REPORT = """
    import json, os, sys
    import sfparallel as sf

    def look():
        streams = [getattr(sys, name) is None for name in ("stdin", "stdout", "stderr")]
        return streams, [os.readlink(f"/proc/self/fd/{number}") for number in range(3)], os.read(0, 1).decode()

    print("out")
    if sys.stderr:  # else print takes stdout
        print("err", file=sys.stderr)
    mine = look()
    clones = sf.parallel(n=2)(look)()
    open("report.json", "w").write(json.dumps([mine, *clones]))
    """
CLOSED = [numbers for size in (1, 2, 3) for numbers in itertools.combinations(range(3), size)]
CASES = [pytest.param(closed, ("--local",), id=f"local-{''.join(map(str, closed))}") for closed in CLOSED]
# One stream, and all: what the guest makes of them is the same code.
CASES += [pytest.param(closed, (), id=f"vm-{''.join(map(str, closed))}", marks=pytest.mark.needs("qemu", "image", "root"))
          for closed in ((0,), (0, 1, 2))]  # fmt: skip


def _run_closed(sfrun: Sfrun, closed: tuple[int, ...], *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command by a shell that closes these descriptors first."""
    redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    with open(sfrun.folder / "streams", "wb") as streams:
        return subprocess.run(["bash", "-c", f'exec "$@" {redirections}', "-", *words], cwd=sfrun.folder, timeout=HANG_S,
                              check=False, stdin=subprocess.DEVNULL, stdout=streams, stderr=streams)  # fmt: skip


@pytest.mark.parametrize(("closed", "options"), CASES)
def test_a_program_finds_closed_streams_as_under_python(sfrun: Sfrun, closed: tuple[int, ...], options: tuple[str, ...]) -> None:
    ended = _run_closed(sfrun, closed, str(BIN / "sfrun"), *options, str(sfrun.write(REPORT)))
    shown = (sfrun.folder / "streams").read_text()
    assert ended.returncode == 0, shown
    mine, *clones = json.loads((sfrun.folder / "report.json").read_text())
    for streams, descriptors, read in (mine, *clones):
        assert streams == [number in closed for number in range(3)]
        assert read == ""
        # No socket, memory or device of the job's: output and input would go there.
        assert all(name.startswith(("pipe:", "/dev/null", str(sfrun.folder))) for name in descriptors), descriptors
    assert ("out\n" in shown, "err\n" in shown) == (1 not in closed, 2 not in closed)


def test_a_program_without_input_is_told_so(sfrun: Sfrun) -> None:
    ended = _run_closed(sfrun, (0,), str(BIN / "sfrun"), "--local", "-c", "input()")
    assert ended.returncode == 1
    assert "RuntimeError: input(): lost sys.stdin" in (sfrun.folder / "streams").read_text()


@pytest.mark.parametrize("closed", [(0, 1, 2), (1, 2)], ids=["012", "12"])
def test_messages_of_ours_go_nowhere_where_all_is_closed(sfrun: Sfrun, closed: tuple[int, ...]) -> None:
    assert _run_closed(sfrun, closed, str(BIN / "sfrun"), "--local", "--timeout", "1", "-c", "while True: pass").returncode == 124
    assert _run_closed(sfrun, closed, str(BIN / "sfrun"), "--no-such-option", "x.py").returncode == 2
    assert _run_closed(sfrun, closed, str(BIN / "sfrun"), "no such script.py").returncode == 2
    assert _run_closed(sfrun, closed, str(BIN / "sf"), "ps").returncode == 0
    assert (sfrun.folder / "streams").read_bytes() == b""


def test_our_imports_leave_no_descriptor_open_in_the_place_of_a_stream(sfrun: Sfrun) -> None:
    code = "import sfparallel.cli, os; open('left', 'w').write(' '.join(os.listdir('/proc/self/fd')))"
    _run_closed(sfrun, (0, 1, 2), sys.executable, "-c", code).check_returncode()
    # The file itself, and the folder that is being listed.
    assert sorted((sfrun.folder / "left").read_text().split()) == ["0", "1"]


# -- text of others ----------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;title\x07\x1b[2J\rfake\x9b31m\u202etxt\x7f\u2066\u061c\u2028"


def test_what_a_terminal_obeys_is_escaped() -> None:
    assert printable(HOSTILE) == (
        r"\x1b]0;title\x07\x1b[2J\rfake\x9b31m\u202etxt\x7f\u2066\u061c\u2028"
    )
    assert printable("two\nlines\tand näöß 漢字 👩‍🔬\u00a0.") == "two\nlines\tand näöß 漢字 👩‍🔬\u00a0."
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert printable("\ud800") == r"\ud800"
    assert in_one_line("a\nb\tc\r") == r"a\nb\tc\r"


def test_every_error_is_printable() -> None:
    error = SfError(f"the guest said {HOSTILE}", hint=f"look at {HOSTILE}")
    assert str(error) == printable(f"the guest said {HOSTILE}\n  hint: look at {HOSTILE}")
    assert error.message.endswith(HOSTILE)


def _obeyed(text: bytes) -> list[str]:
    return [char for char in text.decode() if char not in "\n\t" and not char.isprintable()]


def test_names_of_files_and_arguments_are_escaped(sfrun: Sfrun) -> None:
    for words in (["--data", f"x{HOSTILE}", "x.py"], [f"no{HOSTILE}.py"], [f"--{HOSTILE}", "x.py"], ["-m"]):
        ended = subprocess.run([str(BIN / "sfrun"), *words], cwd=sfrun.folder, capture_output=True, check=False)
        assert ended.returncode == 2
        assert _obeyed(ended.stderr) == []


def test_a_remote_traceback_is_escaped_and_output_is_not(sfrun: Sfrun) -> None:
    path = sfrun.write(
        f"""
        import sfparallel as sf

        class Odd(Exception):
            def __init__(self, one, two):
                super().__init__({HOSTILE!r})

        @sf.parallel(n=1)
        def fail():
            print("\\x1b[31mred\\x1b[0m")
            raise Odd(1, 2)

        fail()
        """
    )
    ended = subprocess.run([BIN / "sfrun", "--local", path], cwd=sfrun.folder, capture_output=True, timeout=HANG_S, check=False)
    assert ended.returncode == 1
    assert _obeyed(ended.stderr) == []
    assert rb"\x1b[2J\rfake" in ended.stderr
    assert ended.stdout == b"[0] \x1b[31mred\x1b[0m\n"


@pytest.mark.needs("qemu", "image", "root")
def test_a_console_is_escaped(sfrun: Sfrun) -> None:
    path = sfrun.write(
        """
        import os
        with open("/dev/ttyS0", "wb", buffering=0) as console:
            console.write(b"\\x1b[2J\\x1b]0;owned\\x07on the console\\n")
        with open("/proc/sysrq-trigger", "w") as trigger:
            trigger.write("c")
        """
    )
    ended = subprocess.run([str(BIN / "sfrun"), str(path)], cwd=sfrun.folder, capture_output=True, timeout=HANG_S, check=False)
    assert ended.returncode == EXIT_PARENT_LOST
    assert b"on the console" in ended.stderr
    assert _obeyed(ended.stderr) == []


def test_a_program_s_name_is_escaped_in_the_list_of_jobs(tmp_path: Path) -> None:
    # Whoever is on this machine may say that it is a job: the name is not to be believed.
    server = textwrap.dedent(f"""
        import asyncio, os
        from sfparallel.wire import pack
        async def answer(reader, writer):
            writer.write(pack({{"pid": 1, "program": "bad" + {HOSTILE!r}, "clones": 0, "forks": 0, "seconds": 1.0}}))
            writer.close()
        async def main():
            server = await asyncio.start_unix_server(answer, path=f"\\0sfparallel/job/{{os.getpid()}}")
            print("up", flush=True)
            await server.serve_forever()
        asyncio.run(main())
        """)
    with subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"up\n"
            ended = subprocess.run([str(BIN / "sf"), "ps"], capture_output=True, check=True, timeout=HANG_S)
        finally:
            process.kill()
    assert rb"bad\x1b]0;title" in ended.stdout
    assert _obeyed(ended.stdout) == []


@pytest.mark.parametrize("words", [["sfrun", "no_such.py"], ["sf", "image", "rm", "no such"], ["sfrun", "--no-such"]])
def test_an_error_does_not_go_to_standard_output_where_standard_error_is_closed(sfrun: Sfrun, words: list[str]) -> None:
    ended = subprocess.run(["bash", "-c", 'exec "$@" 2>&-', "-", BIN / words[0], *words[1:]], stdout=subprocess.PIPE,
                           cwd=sfrun.folder, timeout=HANG_S, check=False)  # fmt: skip
    assert ended.returncode in (2, 70) and ended.stdout == b""


@pytest.mark.needs("qemu", "image", "root")
def test_streams_that_do_not_block(sfrun: Sfrun) -> None:
    """A pipe is so for all who have it, when one of them (node, say) has set O_NONBLOCK."""
    (our_input, theirs), (output, their_output) = (os.pipe()[::-1], os.pipe())
    program = sfrun.write("print('ready', flush=True); print(input()); print('x' * 400_000)")
    for descriptor in (theirs, their_output):
        os.set_blocking(descriptor, False)
    with subprocess.Popen([BIN / "sfrun", program], cwd=sfrun.folder, stdin=theirs, stdout=their_output) as process:
        os.close(theirs)
        os.close(their_output)
        with open(our_input, "wb") as keys, open(output, "rb") as shown:
            assert shown.readline() == b"ready\n"
            keys.write(b"typed late\n")
            keys.flush()
            process.poll()
            assert shown.readline() == b"typed late\n"
            select.select([], [], [], 1.0)  # until the pipe is full
            assert shown.read() == b"x" * 400_000 + b"\n"
    assert process.returncode == 0
