"""What people meet who do not know the options and calls yet: slips are named alone, with what was probably meant."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sfparallel as sf
from sfparallel import cli
from sfparallel.config import LOG
from sfparallel.errors import UsageError
from sfparallel.runtime.api import Options
from sfparallel.text import nearest
from sfparallel.vmm import command_errors
from tests.conftest import BIN, HANG_S, Sfrun


def refused(command: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line of what a command says which does not take these words."""
    with pytest.raises(SystemExit) as ended:
        command([*words])
    assert ended.value.code == command_errors.EXIT_USAGE
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("words", "said"), [
    (("--mem", "2G", "x.py"), "sfrun: error: there is no option --mem; did you mean --memory?"),
    (("--memroy=2G", "x.py"), "sfrun: error: there is no option --memroy=2G; did you mean --memory?"),
    (("--zzz", "x.py"), "sfrun: error: there is no option --zzz"),
])  # fmt: skip
def test_unknown_options_of_sfrun(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert refused(cli.sfrun, capsys, *words) == said


@pytest.mark.parametrize(("words", "said"), [
    (("docter",), "sf: error: argument COMMAND: there is no 'docter'; did you mean doctor?"),
    (("image", "biuld"), "sf image: error: argument ACTION: there is no 'biuld'; did you mean build?"),
    (("image", "build", "--packge", "gcc"), "sf: error: there is no option --packge; did you mean --package?"),
    (("image", "build", "--pipe"), "sf: error: there is no option --pipe; did you mean --pip?"),
    (("clean", "--pip"), "sf: error: there is no option --pip"),
    (("image", "build", "one", "two"), "sf: error: unexpected argument two"),
])  # fmt: skip
def test_unknown_words_of_sf(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert refused(cli.sf, capsys, *words) == said


def test_sf_alone_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.sf([])
    told = capsys.readouterr()
    assert ended.value.code == command_errors.EXIT_USAGE and told.out == ""
    assert all(command in told.err for command in cli._COMMANDS)


@pytest.mark.parametrize(("line", "found"), [
    ("sf im", "image"), ("sf image bu", "build"), ("sf image build --pi", "--pip"),
    ("sf image build x --re", "--release --requirements"),
    ("sfrun --mem", "--memory"), ("sfrun -n 4 --sp", "--spmd"), ("/usr/bin/sf clean --a", "--all"), ("sfrun scr", ""),
])  # fmt: skip
def test_bash_completes_what_the_parsers_take(line: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.sf(["completion"])
    words = line.split()
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _sfparallel; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{capsys.readouterr().out}\n{ask}"], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (found, "")


def test_no_images_are_told(sf: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("SF_CACHE", str(tmp_path))
    done = sf("image", "list")
    assert (done.returncode, done.stdout) == (0, "") and "sf image build" in done.stderr


def test_a_command_may_follow_its_option_at_once() -> None:
    """As in `python -c'print(1)'`."""
    assert cli._split_program(["-n", "2", "-cprint(1)", "-n"]) == (["-n", "2"], "command", ["print(1)", "-n"])
    assert cli._split_program(["-mtimeit", "-h"]) == ([], "module", ["timeit", "-h"])
    assert cli._split_program(["--seed", "-mx", "y.py"]) == (["--seed", "-mx"], "script", ["y.py"])


def function(item: int = 0) -> int:
    return item


def executor(**options: object) -> object:
    return sf.Executor(**options)  # type: ignore[arg-type]


def mapped(**options: object) -> object:
    return sf.parallel_map(function, [1], **options)  # type: ignore[call-overload]


def stream(**options: object) -> Iterator[object]:
    return sf.parallel_imap(function, [1], **options)  # type: ignore[call-overload, no-any-return]


CALLS = {"parallel": sf.parallel, "parallel_map": mapped, "parallel_imap": stream, "Executor": executor}


@pytest.mark.parametrize("name", CALLS)
def test_unknown_keywords_are_named_alone(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        CALLS[name](seed=1, ssed=2)
    assert caught.value.message == f"sf.{name} has no option ssed= (did you mean seed=?)"
    with pytest.raises(UsageError) as caught:
        CALLS[name](qqq=1)
    assert caught.value.message == f"sf.{name} has no option qqq=" and "seed=" in str(caught.value.hint)


def test_unknown_keywords_of_options() -> None:
    with pytest.raises(UsageError, match=r"no option timout= \(did you mean timeout=\?\)"):
        sf.parallel(function).options(n=2, timout=3)


@pytest.mark.parametrize("options", [
    {"timeout": "5"}, {"timeout": True}, {"timeout": [1]}, {"timeout": float("nan")}, {"n": "3"}, {"seed": "x"}, {"collect": 5},
    {"on_error": 3}, {"merge": 3},
])  # fmt: skip
def test_a_wrong_value_is_told_as_such(options: dict[str, object]) -> None:
    """`timeout="5"` used to be told as "no such option: timeout"."""
    (name, value), = options.items()
    with pytest.raises(UsageError) as caught:
        sf.parallel(**options)  # type: ignore[call-overload]
    assert name in caught.value.message and repr(value) in caught.value.message and "no option" not in caught.value.message


def test_a_program_outside_a_vm_says_one_thing(tmp_path: Path) -> None:
    """Everyone's first slip: `python script.py`. It used to be three tracebacks."""
    program = "import sfparallel as sf\nsf.parallel(lambda: 1)()\n"
    environment = {name: value for name, value in os.environ.items() if name != "SF_AGENT_SOCKET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert "OutsideVMError" in done.stderr and "sfrun" in done.stderr.splitlines()[-1]


def test_nearest() -> None:
    known = ["memory", "mpi4py", "label", *(field for field in Options.__dataclass_fields__)]
    assert [nearest(word, known) for word in ("mem", "memroy", "labels", "xyz", "timout")] == [
        "memory", "memory", "label", None, "timeout"]  # fmt: skip



def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`sf doctor | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen([BIN / "sf", "settings"], stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        assert process.stderr and process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE



@pytest.mark.needs("root")
@pytest.mark.needs("image")
def test_a_qemu_that_a_setting_names_is_not_to_be_installed(sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_QEMU", "/nope")
    ended = sfrun("")
    assert ended.code == command_errors.EXIT_FAILED and "/nope" in ended.err and "SF_QEMU" in ended.err and "apt" not in ended.err


# -- what is told ------------------------------------------------------------------------------------------------------

FORKS = """
import pathlib
import sfparallel as sf

sf.parallel(n=2)(lambda: 1)()
pathlib.Path("new").write_text("x")
"""


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_each_step_is_told_on_demand(sfrun: Sfrun) -> None:
    """In an ordinary job SF_LOG=info used to say nothing at all."""
    told = sfrun(FORKS, "-v").ok().err.splitlines()
    steps = ("guest image 'default': ", "template: ", "the parent VM is ready (1024 MiB", "fork 1: n=2, parent paused",
             "copying changed files to the host", "the program ended with exit code 0; forks: 1")  # fmt: skip
    lines = [next(i for i, line in enumerate(told) if step in line) for step in steps]
    assert lines == sorted(lines), told
    assert all(re.match(r"sfrun: +\d+\.\d\d s: ", told[i]) for i in lines), told


def told(tmp_path: Path, *words: str, level: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != LOG.variable}
    if level:
        environment[LOG.variable] = level
    return subprocess.run([BIN / "sfrun", "--local", *words, "-c", "import os; print(os.environ.get('SF_LOG'))"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=HANG_S)


def test_quiet_and_levels(tmp_path: Path) -> None:
    assert "nothing is isolated" in told(tmp_path).stderr
    for done in (told(tmp_path, "-q"), told(tmp_path, level="error"), told(tmp_path, level="ERROR")):
        assert (done.returncode, done.stderr) == (0, ""), done
    assert told(tmp_path, "-v").stdout == "info\n" and told(tmp_path, "-vv").stdout == "debug\n"
    assert "selector" not in told(tmp_path, "-vv").stderr
    done = told(tmp_path, level="foo")
    assert done.returncode == command_errors.EXIT_USAGE and "Traceback" not in done.stderr
    assert "SF_LOG must be error, warning, info or debug, not 'foo'" in done.stderr
    assert "not allowed with" in told(tmp_path, "-v", "-q").stderr
