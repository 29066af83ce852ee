"""Defaults of a project: [tool.sfparallel] of the pyproject.toml in the script's folder or above."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfparallel import cli
from sfparallel.errors import UsageError
from sfparallel.vmm import project_file
from sfparallel.vmm.options import RunIn
from tests.conftest import BIN


def options(folder: Path, text: str, *own: str) -> Any:
    """What `sfrun` takes its options to be."""
    (folder / "pyproject.toml").write_text(text)
    found = project_file.find(folder)
    assert found
    return cli._with_defaults(own, cli._sfrun_parser().parse(own), *found)


ALL = """
[tool.sfparallel]
n = 3
memory = "2G"
cpus = 2
image = "sci"
label = false
timeout = 60
seed = 7
stats = true
mpi4py = true
venv = ".venv"
env = { A = "1", B = "x=y" }
"""


def test_every_key(tmp_path: Path) -> None:
    taken = options(tmp_path, ALL)
    assert set(re.findall(r"^(\w+) =", ALL, re.MULTILINE)) == set(project_file.KEYS) - {"spmd"}
    assert (taken.n, taken.memory, taken.cpus, taken.image, taken.label, taken.timeout, taken.seed, taken.stats) == (
        3, "2G", 2, "sci", False, 60.0, 7, True)  # fmt: skip
    assert (taken.run_in, taken.venv, taken.env) == (RunIn.CLONES_MPI4PY, str(tmp_path / ".venv"), ["A=1", "B=x=y"])
    assert options(tmp_path, "[tool.sfparallel]\nspmd = true").run_in is RunIn.CLONES
    assert options(tmp_path, "[tool.sfparallel]\nspmd = false\nmemory = 512").memory == "512"


def test_the_command_line_wins(tmp_path: Path) -> None:
    taken = options(tmp_path, ALL, "-n", "5", "--label", "--env", "B=z", "--spmd", "--image", "other")
    assert (taken.n, taken.label, taken.run_in, taken.image, taken.memory) == (5, True, RunIn.CLONES, "other", "2G")
    assert cli._environment(taken.env) == {"A": "1", "B": "z"}
    local = options(tmp_path, ALL, "--local")
    assert (local.n, local.venv, local.stats) == (3, None, False), "what VMs have does not forbid --local"


@pytest.mark.parametrize(("line", "said"), [
    ("memroy = 1", "tool.sfparallel has no key 'memroy'; did you mean memory?"),
    ("zzz = 1", "tool.sfparallel has no key 'zzz'"),
    ("n = '3'", "n in tool.sfparallel must be a whole number, not '3'"),
    ("n = true", "n in tool.sfparallel must be a whole number, not True"),
    ("label = 1", "label in tool.sfparallel must be true or false, not 1"),
    ("timeout = 'x'", "timeout in tool.sfparallel must be a number of seconds"),
    ("env = ['HOME']", "env in tool.sfparallel must be a table of strings"),
    ("spmd = true\nmpi4py = true", "tool.sfparallel has both spmd and mpi4py"),
    ("venv = '/elsewhere/venv'", "venv in tool.sfparallel must be in the folder of that file"),
    ("venv = '../venv'", "venv in tool.sfparallel must be in the folder of that file"),
    ("data = ['/elsewhere']", "tool.sfparallel cannot set 'data'"),
    ("local = true", "tool.sfparallel cannot set 'local'"),
    ("trace = 'x'", "tool.sfparallel cannot set 'trace'"),
    ("n = = 1", "is not valid"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        options(tmp_path, f"[tool.sfparallel]\n{line}\n")
    assert caught.value.message.startswith(str(tmp_path / "pyproject.toml"))


def test_the_nearest_file_with_the_table_counts(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert project_file.find(below) is None
    (tmp_path / "pyproject.toml").write_text("[tool.sfparallel]\nn = 1\n")
    (tmp_path / "a" / "pyproject.toml").write_text("this is [ not valid")  # and none of ours
    assert project_file.find(below) == (tmp_path / "pyproject.toml", {"n": 1})
    (below / "pyproject.toml").write_text("[project]\nname = 'sfparallel-example'\n[tool.other]\n")
    assert project_file.find(below) == (tmp_path / "pyproject.toml", {"n": 1})
    (tmp_path / "a" / "pyproject.toml").write_text("[tool]\nsfparallel = {}\n")
    assert project_file.find(below) == (tmp_path / "a" / "pyproject.toml", {})


@pytest.fixture(name="run")
def run_fixture(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / "sfrun", *words], cwd=cwd, capture_output=True, text=True, timeout=300)

    return run


def test_jobs_take_the_defaults_of_their_script(tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The script's folder counts, and for a command the current one."""
    project, elsewhere = tmp_path / "project" / "src", tmp_path / "elsewhere"
    project.mkdir(parents=True)
    elsewhere.mkdir()
    (tmp_path / "project" / "pyproject.toml").write_text('[tool.sfparallel]\nn = 3\nenv = { GREETING = "hello" }\n')
    program = "import os, sfparallel as sf; print(os.environ.get('GREETING'), sf.parallel(lambda: sf.comm().rank)())"
    (project / "script.py").write_text(program)
    done = run("--local", "-v", "../project/src/script.py", cwd=elsewhere)
    assert (done.returncode, done.stdout) == (0, "hello [0, 1, 2]\n")
    assert f"defaults of {tmp_path}/project/pyproject.toml: n = 3, env = {{'GREETING': 'hello'}}" in done.stderr
    assert run("--local", "-q", "-n", "2", "-c", program, cwd=project).stdout == "hello [0, 1]\n"
    done = run("--local", "-q", "-n", "1", "-c", program, cwd=elsewhere)
    assert (done.stdout, done.stderr) == ("None [0]\n", "")


def test_values_out_of_range_name_the_file(tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.sfparallel]\ncpus = 0\n")
    done = run("--local", "-c", "1")
    assert done.returncode == 2
    assert "--cpus must be at least 1, not 0" in done.stderr and f"defaults of {tmp_path}/pyproject.toml: cpus = 0" in done.stderr
