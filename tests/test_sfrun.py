"""The command `sfrun`: files, streams, options and exit codes as a user of `python` expects them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import BIN, HANG_S, Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")


def test_files_are_seen_and_written_at_the_same_paths(sfrun: Sfrun) -> None:
    (sfrun.folder / "in").mkdir()
    (sfrun.folder / "in" / "data.txt").write_text("from the host")
    (sfrun.folder / "old.txt").write_text("to be deleted")
    (sfrun.folder / "helper.py").write_text("VALUE = 42")
    ended = sfrun(
        f"""
        import os, pathlib, sys
        import helper
        import sfparallel as sf

        assert os.getcwd() == {str(sfrun.folder)!r} and sys.argv == [__file__, "an", "argument"]
        assert pathlib.Path("in/data.txt").read_text() == "from the host"
        os.remove("old.txt")
        os.makedirs("out/deep")

        @sf.parallel(n=2, collect="out/*.txt")
        def write():
            rank = sf.comm().rank
            assert pathlib.Path("in/data.txt").read_text() == "from the host"
            pathlib.Path(f"out/{{rank}}.txt").write_text(f"rank {{rank}}")
            pathlib.Path(f"private-{{rank}}").write_text("is discarded with the clone")

        write()
        pathlib.Path("out/deep/parent.txt").write_text("parent")
        print(helper.VALUE, sorted(os.listdir("out")))
        """,
        args=("an", "argument"),
    ).ok()
    assert ended.out.strip() == "42 ['0.txt', '1.txt', 'deep']"
    assert (sfrun.folder / "out" / "0.txt").read_text() == "rank 0"
    assert (sfrun.folder / "out" / "1.txt").read_text() == "rank 1"
    assert (sfrun.folder / "out" / "deep" / "parent.txt").read_text() == "parent"
    assert not (sfrun.folder / "old.txt").exists()
    assert not list(sfrun.folder.glob("private-*"))


def test_two_ranks_that_write_the_same_collected_file(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        @sf.parallel(n=2, collect="*.out")
        def write():
            open("same.out", "w").write(str(sf.comm().rank))

        try:
            write()
        except sf.CollectConflict as error:
            print(error.path, sorted(error.ranks))
        """
    ).ok()
    assert ended.out.strip() == "same.out [0, 1]"
    assert not (sfrun.folder / "same.out").exists()


def test_output_of_ranks_is_labelled_line_by_line(sfrun: Sfrun) -> None:
    program = """
        import sys
        import sfparallel as sf

        print("before", end=" the fork\\n")

        @sf.parallel(n=3)
        def say():
            for i in range(50):
                print("line", i)
            print("to stderr", file=sys.stderr)
            print("no newline at the end", end="")

        say()
        print("after")
        """
    ended = sfrun(program).ok()
    lines = ended.out.splitlines()
    assert lines[0] == "before the fork" and lines[-1] == "after"
    for rank in range(3):
        own = [line.removeprefix(f"[{rank}] ") for line in lines if line.startswith(f"[{rank}] ")]
        assert own == [f"line {i}" for i in range(50)] + ["no newline at the end"]
        assert f"[{rank}] to stderr" in ended.err.splitlines()
    assert len(lines) == 2 + 3 * 51
    assert "[0]" not in sfrun(program, "--no-label").ok().out


def test_streams_and_exit_codes(sfrun: Sfrun) -> None:
    ended = sfrun("import sys; print(sys.stdin.read().upper()); sys.exit(3)", stdin="from the host\n" * 10_000)
    assert ended.code == 3
    assert ended.out == "FROM THE HOST\n" * 10_000 + "\n"
    assert sfrun("import os; os.kill(os.getpid(), 9)").code == 128 + 9
    ended = sfrun("raise ValueError('why')")
    assert ended.code == 1 and "ValueError: why" in ended.err


def test_module_and_command(sfrun: Sfrun) -> None:
    sfrun.write("import sys; print('module', sys.argv[1:], __name__)", "mod.py")
    for words, expected in (
        (["-m", "mod", "-x", "1"], "module ['-x', '1'] __main__"),
        (["--env", "A=b", "-c", "import os, sys; print(os.environ['A'], sys.argv)", "-n"], "b ['-c', '-n']"),
    ):
        ended = subprocess.run([str(BIN / "sfrun"), *words], cwd=sfrun.folder, capture_output=True, text=True, timeout=HANG_S)
        assert (ended.returncode, ended.stdout.strip()) == (0, expected), ended.stderr


def test_timeout_option(sfrun: Sfrun) -> None:
    ended = sfrun("import time; time.sleep(1000)", "--timeout", "5")
    assert ended.code == 124
    assert "--timeout" in ended.err


def test_data_folder_is_mounted_read_only_in_parent_and_clones(sfrun: Sfrun, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = tmp_path_factory.mktemp("data")
    (data / "numbers.bin").write_bytes(bytes(range(256)) * 4096)
    ended = sfrun(
        f"""
        import hashlib, pathlib
        import sfparallel as sf

        data = pathlib.Path({str(data)!r})

        @sf.parallel(n=2)
        def digest():
            return hashlib.sha256((data / "numbers.bin").read_bytes()).hexdigest()

        here = hashlib.sha256((data / "numbers.bin").read_bytes()).hexdigest()
        assert digest() == [here, here]
        try:
            (data / "new").write_text("x")
        except OSError as error:
            print(error.errno)
        """,
        "--data", str(data),
    ).ok()  # fmt: skip
    assert ended.out.strip() == "30"  # EROFS


def test_two_virtual_cpus(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import os
        import sfparallel as sf
        print(os.cpu_count(), sf.parallel(n=2)(lambda: os.cpu_count())())
        """,
        "--cpus", "2",
    ).ok()  # fmt: skip
    assert ended.out.strip() == "2 [2, 2]"


def test_forwarded_port_reaches_the_parent(sfrun: Sfrun) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = sfrun.start(
        """
        import http.server
        server = http.server.HTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler)
        print("serving", flush=True)
        server.handle_request()
        """,
        "--forward", f"{port}:8000",
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "serving\n"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/program.py", timeout=HANG_S) as answer:
        assert b"handle_request" in answer.read()
    process.communicate(timeout=HANG_S)
    assert process.returncode == 0


def test_statistics(sfrun: Sfrun) -> None:
    ended = sfrun("import sfparallel as sf; sf.parallel(n=2)(lambda: 1)()", "--stats").ok()
    for words in ("fork 1: n=2", "parent paused", "committed", "load", "answers", "private memory"):
        assert words in ended.err


@pytest.mark.parametrize("options", [(), ("--local",)], ids=["vm", "local"])
def test_names_of_any_bytes(tmp_path: Path, options: tuple[str, ...]) -> None:
    odd = os.fsdecode(b"a folder \n with \xc3\xbc and \xff")
    folder = tmp_path / odd
    folder.mkdir()
    (folder / odd).write_text(
        "import os, sys\n"
        "print(ascii([os.path.basename(os.getcwd()), os.path.basename(__file__), *sys.argv[1:], os.environ['A']]))\n"
        "open(sys.argv[1], 'w').write('written')\n"
    )
    command = [str(BIN / "sfrun"), *options, "--env", f"A={odd}", odd, f"new {odd}"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANG_S)
    assert (ended.returncode, ended.stdout.strip()) == (0, ascii([odd, odd, f"new {odd}", odd])), ended.stderr
    assert (folder / f"new {odd}").read_text() == "written"


def test_a_current_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    command = f'rmdir "$PWD"; exec "{BIN / "sfrun"}" -c "print(1)"'
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 2 and "hint" in ended.stderr and "Traceback" not in ended.stderr


def test_a_current_folder_of_the_system_is_refused() -> None:
    ended = subprocess.run([str(BIN / "sfrun"), "-c", "print(1)"], cwd="/", capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 2 and "project" in ended.stderr


def test_jobs_are_listed_while_they_run(sfrun: Sfrun) -> None:
    process = sfrun.start("print('up', flush=True); input()", stdin=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "up\n"
    listed = subprocess.run([str(BIN / "sf"), "ps"], capture_output=True, text=True, timeout=HANG_S).stdout
    assert str(process.pid) in listed and "program.py" in listed
    process.communicate("\n", timeout=HANG_S)
    deadline = time.monotonic() + HANG_S
    while str(process.pid) in subprocess.run([str(BIN / "sf"), "ps"], capture_output=True, text=True, timeout=HANG_S).stdout:
        assert time.monotonic() < deadline
