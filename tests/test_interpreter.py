"""The program's interpreter: each variable has the effect that it has with python3, and nothing else is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BIN = Path(sys.prefix) / "bin"
BASE = {"PATH": os.environ["PATH"], "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
"""What a guest's program finds; for comparison."""

NEEDS = [pytest.mark.needs("qemu"), pytest.mark.needs("image")]
BOTH = [pytest.param("--local", id="local"), pytest.param("", id="vm", marks=NEEDS)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(argv: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env={**BASE, **environment}, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, errors="backslashreplace")  # fmt: skip


def sfrun(where: str, *words: str, host: dict[str, str] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run under `sfrun`, with these variables for the program."""
    options = [*([where] if where else []), *(word for name, value in variables.items() for word in ("--env", f"{name}={value}"))]
    cache = {name: value for name, value in os.environ.items() if name.startswith("SF_")}
    ended = run([str(BIN / "sfrun"), *options, *words], {"SF_LOG": "error", **cache, **(host or {})})
    ended.stderr = ended.stderr.removeprefix("booting the guest once to make a template\n")  # the first test may see that
    return ended


@dataclass(frozen=True)
class Case:
    """A variable, and a program that shows its effect."""

    name: str
    value: str
    program: str
    files: dict[str, str] = field(default_factory=dict)


MALLOC = """
import ctypes
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u f o d k".split()]
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
before = libc.mallinfo2().hblks
kept = [libc.malloc(10_000_000) for _ in range(3)]
print("by mmap:", libc.mallinfo2().hblks - before)
"""

LOCALE = "import sys, locale; print(sys.stdout.encoding, sys.stdout.errors, locale.setlocale(locale.LC_ALL, ''))"

TOGETHER = [
    Case("TZ", "Asia/Tokyo", """
        import datetime, subprocess, time
        print(datetime.datetime.fromtimestamp(0), time.tzname, time.localtime(0).tm_gmtoff)
        print(subprocess.getoutput("date -d @0 '+%H:%M %Z'"))
        """),
    Case("PYTHONPATH", "lib", """
        import os, sys, extra_module
        print(extra_module.VALUE, sys.path[1] == os.path.abspath("lib"), os.environ["PYTHONPATH"])
        """, files={"lib/extra_module.py": "VALUE = 5"}),
    Case("PYTHONHASHSEED", "0", "import sys; print(hash('a'), sys.flags.hash_randomization)"),
    Case("PYTHONFAULTHANDLER", "1", "import faulthandler; print(faulthandler.is_enabled())"),
    Case("PYTHONUTF8", "1", "import sys; print(sys.flags.utf8_mode, open(__file__).encoding)"),
    Case("PYTHONTRACEMALLOC", "3", "import tracemalloc; print(tracemalloc.is_tracing(), tracemalloc.get_traceback_limit())"),
    Case("PYTHONDONTWRITEBYTECODE", "1", "import sys, os, helper; print(sys.dont_write_bytecode, os.path.exists('__pycache__'))",
         files={"helper.py": ""}),
    Case("PYTHONPYCACHEPREFIX", "cache", "import helper; print(helper.__cached__[-60:] == '')", files={"helper.py": ""}),
    Case("PYTHONSTARTUP", "start.py", "print('program')", files={"start.py": "print('start')"}),
    Case("PYTHONUSERBASE", "/of/mine", "import site; print(site.getuserbase())"),
    Case("PYTHONNOUSERSITE", "1", "import sys, site; print(sys.flags.no_user_site, site.ENABLE_USER_SITE)"),
    Case("PYTHONBREAKPOINT", "os.getpid", "print(breakpoint() > 0)"),
    Case("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=30000000", MALLOC),
    Case("LC_ALL", "POSIX", LOCALE),
]  # fmt: skip
"""Variables that do not get into each other's way."""

CASES = [
    Case("TZ", "XYZ-5:30", "import time; print(time.tzname, time.localtime(0).tm_gmtoff)"),
    Case("PYTHONPATH", "lib", "print('program')", files={"lib/sitecustomize.py": "print('own sitecustomize', __file__[-20:])"}),
    Case("PYTHONPATH", "lib", "print('program')", files={"lib/sitecustomize.py": "raise ValueError('broken')"}),
    Case("PYTHONPATH", "", "import os; print(repr(os.environ['PYTHONPATH']))"),
    Case("PYTHONHASHSEED", "none", "print(hash('a'))"),
    Case("PYTHONOPTIMIZE", "2", "import sys; print(__debug__, sys.flags.optimize); assert False"),
    Case("PYTHONWARNINGS", "error", "import sys, warnings; print(sys.warnoptions); warnings.warn('told')"),
    Case("PYTHONIOENCODING", "latin-1:replace", "import sys; print(sys.stdin, sys.stdout, sys.stderr); print('\\xe9\\u0142')"),
    Case("PYTHONDEVMODE", "1", "import sys, socket; print(sys.flags.dev_mode, sys.warnoptions); socket.socket(); 1 + None"),
    Case("PYTHONMALLOC", "no such", "print('begun')"),
    Case("PYTHONMALLOC", "debug", "import sys; print(sys.getsizeof([]))"),
    Case("PYTHONSAFEPATH", "1", "import sys, os; print(sys.flags.safe_path, os.getcwd() in sys.path)"),
    Case("PYTHONUNBUFFERED", "1", "import sys, os; print(sys.stdout.write_through); sys.stdout.write('now '); os._exit(0)"),
    Case("PYTHONHOME", "/nowhere", "print('begun')"),
    Case("PYTHONINTMAXSTRDIGITS", "700", "import sys; print(sys.get_int_max_str_digits()); print(10 ** 800)"),
    Case("PYTHONNODEBUGRANGES", "1", "x = [1]\nprint(x[0] + x[1])"),
    Case("PYTHONWARNDEFAULTENCODING", "1", "import sys; print(sys.flags.warn_default_encoding)"),
    Case("LD_PRELOAD", "/no/such/library.so", "print('program')"),
    Case("MALLOC_MMAP_THRESHOLD_", "30000000", MALLOC),
    Case("LC_ALL", "C.UTF-8", LOCALE),
    Case("NOTHING", "special", "import sys; print(sys.stdin.errors, sys.stdout.errors, sys.stdout.encoding)\n1 / 0"),
]  # fmt: skip


def check(folder: Path, where: str, *cases: Case) -> None:
    """Compare with the host's Python, all cases in one program."""
    for case in cases:
        for name, content in case.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
    (folder / "program.py").write_text("\n".join(textwrap.dedent(case.program) for case in cases))
    variables = {case.name: case.value for case in cases}
    expected = run([sys.executable, "program.py"], variables)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    ended = sfrun(where, "program.py", **variables)
    assert (ended.returncode, ended.stdout) == (expected.returncode, expected.stdout), ended.stderr
    if cases[0].name == "PYTHONHOME":  # the message names folders of the build
        assert all("Fatal Python error: init_fs_encoding" in each.stderr for each in (ended, expected))
    else:
        assert ended.stderr == expected.stderr


@pytest.mark.parametrize("case", CASES + TOGETHER, ids=lambda case: f"{case.name}={case.value[:12]}")
def test_a_variable_has_the_effect_that_it_has_with_python(folder: Path, case: Case) -> None:
    check(folder, "--local", case)


@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}={case.value[:12]}")
def test_so_it_is_in_a_vm(folder: Path, case: Case) -> None:
    check(folder, "", case)


@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_many_variables_in_a_vm(folder: Path) -> None:
    check(folder, "", *TOGETHER)


@pytest.mark.parametrize("where", BOTH)
def test_import_times_are_shown(folder: Path, where: str) -> None:
    ended = sfrun(where, "-c", "import colorsys", PYTHONPROFILEIMPORTTIME="1")
    assert ended.returncode == 0 and ended.stderr.splitlines()[-1].split("|")[-1].strip() == "colorsys"
    assert "numpy" not in ended.stderr and "zmq" not in ended.stderr


@pytest.mark.parametrize("where", BOTH)
def test_library_path(folder: Path, where: str) -> None:
    shutil.copy("/lib/x86_64-linux-gnu/libutil.so.1", folder / "libofmine.so")
    ended = sfrun(where, "-c", "import ctypes; print(ctypes.CDLL('libofmine.so')._name)", LD_LIBRARY_PATH=str(folder))
    assert ended.stdout == "libofmine.so\n", ended.stderr


PROBE = """
import json, os, subprocess, sys, warnings
seen = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "flags": str(sys.flags), "path": sys.path, "executable": sys.executable,
    "warnoptions": sys.warnoptions, "filters": repr(warnings.filters), "xoptions": sys._xoptions, "name": __name__,
    "main": sorted((name, type(value).__name__) for name, value in vars(sys.modules["__main__"]).items()),
    "file": globals().get("__file__"), "spec": getattr(__spec__, "name", None), "package": __package__, "streams": [
        (stream.encoding, stream.errors, stream.write_through) for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "environment": {name: value for name, value in os.environ.items() if name != "PLAIN"}, "cwd": os.getcwd(),
    "modules": sorted(name for name in sys.modules if not name.startswith("sfparallel") and name != "__future__"),
    "importers": sorted(path for path in sys.path_importer_cache if path.endswith("bootstrap")), "meta": len(sys.meta_path),
}
if "PLAIN" in os.environ:
    print(json.dumps(seen))
else:
    ours = sorted(name for name in sys.modules if name.startswith("sfparallel"))
    assert ours == ["sfparallel", "sfparallel.bootstrap", "sfparallel.runtime", "sfparallel.runtime.after_fork",
                    "sfparallel.runtime.program"], ours
    plain = subprocess.run([sys.executable, *sys.orig_argv[1:]], env={**os.environ, "PLAIN": "1"}, stdout=subprocess.PIPE,
                           stdin=subprocess.DEVNULL, check=True)
    plain = json.loads(plain.stdout)
    for what, value in json.loads(json.dumps(seen)).items():
        assert value == plain[what], (what, value, plain[what])
    print("as with python")
"""

MODES = {
    "script": ["program.py", "a", "-m"],
    "a script with another path": ["./program.py"],
    "module": ["-m", "program", "a"],
    "package": ["-m", "package", "a"],
    "command": ["-c", PROBE, "a", ""],
    "folder": ["package", "a"],
    "archive": ["archive.zip", "a"],
    "a name like an option": ["--", "-program.py", "a"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", BOTH)
def test_all_that_a_program_sees_is_as_with_python(folder: Path, where: str, mode: str) -> None:
    (folder / "package").mkdir()
    for name in ("program.py", "-program.py", "package/__main__.py"):
        (folder / name).write_text(PROBE)
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    ended = sfrun(where, *MODES[mode], PYTHONPATH="lib", PYTHONWARNINGS="default")
    assert ended.stdout == "as with python\n", ended.stderr


@pytest.mark.parametrize("where", BOTH)
def test_hash_seeds_differ_from_job_to_job_and_clones_share_them(where: str) -> None:
    program = "import sfparallel as sf; print(hash('a'), *sf.parallel(n=2)(lambda: hash('a'))())"
    seeds = [sfrun(where, "-c", program).stdout.split() for _ in range(2)]
    assert [len(set(hashes)) for hashes in seeds] == [1, 1], seeds
    assert seeds[0] != seeds[1]


FEATURES = """
import os, sys, warnings
assert not {"numpy", "zmq", "msgpack", "cloudpickle"} & set(sys.modules), "imported before the program"
os.environ["NPY_DISABLE_CPU_FEATURES"] = "SSE X86_V2 NONE_SUCH"  # what numpy cannot do without, or does not know
warnings.simplefilter("error")
try:
    import numpy
except (ImportError, ImportWarning, RuntimeError):
    print("numpy has read it")
"""


@pytest.mark.parametrize("where", BOTH)
def test_numpy_is_not_imported_before_the_program_sets_its_variables(where: str) -> None:
    assert sfrun(where, "-c", FEATURES).stdout == "numpy has read it\n"


@pytest.mark.parametrize("where", BOTH)
def test_whole_programs_too(where: str) -> None:
    ended = sfrun(where, "--spmd", "-n", "2", "-c", FEATURES.replace('"zmq", "msgpack", ', ""))
    assert sorted(ended.stdout.splitlines()) == ["[0] numpy has read it", "[1] numpy has read it"], ended.stderr
    program = "import sys, sfparallel as sf; print(sf.comm().rank, len({*sf.comm().allgather(hash('a'))}), sys.flags.optimize)"
    ended = sfrun(where, "--spmd", "-n", "2", "-c", program, PYTHONOPTIMIZE="1")
    assert sorted(ended.stdout.splitlines()) == ["[0] 0 1 1", "[1] 1 1 1"], ended.stderr


@pytest.mark.parametrize("where", BOTH)
def test_a_region_under_strict_variables_says_nothing_more(where: str) -> None:
    """The runtime raises no warnings and leaves nothing open, in the parent as in clones."""
    program = "import sfparallel as sf; print(sf.parallel(n=2)(lambda: sf.comm().rank)())"
    ended = sfrun(where, "-c", program, PYTHONDEVMODE="1", PYTHONWARNINGS="error", PYTHONOPTIMIZE="2")
    assert (ended.stdout, ended.stderr, ended.returncode) == ("[0, 1]\n", "", 0)


@pytest.mark.parametrize("where", BOTH)
def test_a_variable_without_a_value_is_taken_over_as_it_is(where: str) -> None:
    program = "import os; print(os.environ.get('GIVEN'), os.environ.get('LACKING'), os.environ.get('LANG'))"
    host = {"GIVEN": "of the host", "LANG": "POSIX"}
    words = ("--env", "GIVEN", "--env", "LACKING", "--env", "LANG", "-c", program)
    assert sfrun(where, *words, host=host).stdout == "of the host None POSIX\n"
    del BASE["LANG"]
    try:
        assert sfrun(where, *words).stdout == "None None None\n"
    finally:
        BASE["LANG"] = "C.UTF-8"


ZONE = "import time, subprocess; print(time.tzname[0], time.localtime(0).tm_gmtoff, subprocess.getoutput('date -d @0 +%Z'))"


@pytest.mark.parametrize("where", BOTH)
def test_the_zone_of_the_host_is_passed_on(where: str) -> None:
    assert sfrun(where, "-c", ZONE, host={"TZ": "Asia/Kolkata"}).stdout == "IST 19800 IST\n"


@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_the_zone_of_etc_localtime_is_passed_on(folder: Path) -> None:
    target = os.path.realpath("/etc/localtime")
    script = f"mount --bind /usr/share/zoneinfo/Asia/Kolkata {target} && exec {BIN / 'sfrun'} -c \"$0\""
    ended = run(["unshare", "-m", "sh", "-c", script, "import os; assert 'TZ' not in os.environ\n" + ZONE], dict(os.environ))
    assert ended.stdout == "IST 19800 IST\n", ended.stderr


@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_a_zone_that_the_guest_lacks_comes_from_the_host() -> None:
    program = ("import os, subprocess, sys; print(os.path.getsize('/usr/share/zoneinfo/Asia/Kolkata') > 0)")
    assert sfrun("", "-c", program, TZ="Asia/Kolkata").stdout == "True\n"


@pytest.mark.parametrize("where", BOTH)
def test_children_of_multiprocessing_have_them_too(folder: Path, where: str) -> None:
    (folder / "program.py").write_text(textwrap.dedent("""
        import multiprocessing, os, sys, time

        def see(_):
            return sys.flags.optimize, hash("a"), time.tzname[0], os.environ["OF_MINE"], "PYTHONPATH" in os.environ

        if __name__ == "__main__":
            for method in ("fork", "spawn", "forkserver"):
                with multiprocessing.get_context(method).Pool(1) as pool:
                    print(method, pool.map(see, [0]) == [see(0)], see(0)[2:])
        """))
    ended = sfrun(where, "program.py", PYTHONOPTIMIZE="1", PYTHONHASHSEED="5", TZ="Asia/Tokyo", OF_MINE="x")
    lines = [f"{method} True ('JST', 'x', False)" for method in ("fork", "spawn", "forkserver")]
    assert ended.stdout.splitlines() == lines, ended.stderr
