"""Tests that others have written for executors: CPython's, on clones made by `sfrun --local`, and joblib's, in VMs.

They are not part of this project: Debian's package of CPython's, for the Python that runs this test, is fetched when it is needed
and kept in pytest's cache; joblib brings its own into the guest image.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BIN, Sfrun

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGE = f"lib{PYTHON}-testsuite"
"""Debian's name for CPython's tests: each release has those of its own Python only."""

LEFT_OUT = {
    # They start Python anew, with the standard library's executors; test_executor.py has the like.
    "test_interpreter_shutdown": "starts a program of its own",
    "test_submit_after_interpreter_shutdown": "starts a program of its own",
    "test_hang_gh83386": "starts a program of its own",
    "test_max_tasks_per_child": "not offered",
    "test_max_tasks_early_shutdown": "not offered",
    "test_max_tasks_per_child_defaults_to_spawn_context": "not offered",
    "test_processes_terminate": "looks at processes of ProcessPoolExecutor",
    "test_context_manager_shutdown": "is about ProcessPoolExecutor, whatever is tested",
    "test_del_shutdown": "is about ProcessPoolExecutor, whatever is tested",
    "test_shutdown_no_wait": "is about ProcessPoolExecutor, whatever is tested",
    "test_saturation": "looks at processes of ProcessPoolExecutor",
    "test_idle_process_reuse_one": "looks at processes of ProcessPoolExecutor",
    "test_idle_process_reuse_multiple": "looks at processes of ProcessPoolExecutor",
    "test_killed_child": "wants all futures to fail when a process dies; only that of its own task does",
    "test_traceback": "wants the remote traceback as a cause; it is a note",
    "test_ressources_gced_in_workers": "asks multiprocessing for the executor's context",
    "test_shutdown_deadlock_pickle": "looks at the thread of ProcessPoolExecutor",
    "test_python_finalization_error": "makes the second thread of ProcessPoolExecutor fail",
}
"""Tests that do not fit, and why."""

PROGRAM = """
import importlib, multiprocessing, pkgutil, sys, test, types, unittest
from concurrent import futures
import sfparallel as sf

folder, *left_out = sys.argv[1:]
test.__path__.insert(0, folder)
whole = importlib.import_module("test.test_concurrent_futures")
# One module up to Python 3.11, a package since.
below = [f"{whole.__name__}.{part.name}" for part in pkgutil.iter_modules(getattr(whole, "__path__", []))]
parts = [whole, *map(importlib.import_module, below)]
suite = types.SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})

class Executor(sf.Executor):
    def __init__(self, max_workers=None, mp_context=None, **options):
        super().__init__(max_workers, **options)

    @property
    def _broken(self):
        return self.broken is not None

class Mixin(suite.ExecutorMixin):
    executor_type = Executor

    def get_context(self):
        return None

    def create_event(self):  # later versions of Python 3.13 ask for one that works in other processes
        manager = multiprocessing.Manager()
        self.addCleanup(manager.shutdown)
        return manager.Event()

class FailingInitializer(suite.FailingInitializerMixin):
    executor_type = Executor

    def _assert_logged(self, message):
        return suite.contextlib.nullcontext()

class Deadlock(suite.ExecutorDeadlockTest):
    # A clone that dies costs its own task only.
    def _check_crash(self, error, func, *args, ignore_stderr=False):
        self.executor.shutdown(wait=True)
        error = {suite.BrokenProcessPool: (sf.CloneLost, sf.ResultNotPicklable, sf.RankExit),
                 SystemExit: (sf.RankExit, sf.ResultNotPicklable, SystemExit),
                 suite.PicklingError: sf.ResultNotPicklable}.get(error, error)
        with Executor(2) as executor, self.assertRaises(error):
            executor.submit(func, *args).result(timeout=self.TIMEOUT)

    def test_shutdown_deadlock(self):
        with Executor(2) as executor:
            future = executor.submit(suite._crash, delay=.1)
            executor.shutdown(wait=True)
            with self.assertRaises(sf.CloneLost):
                future.result()

    def test_crash_big_data(self):
        crash = suite._crash
        with Executor(2) as executor, self.assertRaises(sf.CloneLost):
            list(executor.map(lambda data: crash(), ["a" * suite.support.PIPE_MAX_SIZE] * 10))

class Shutdown(suite.ProcessPoolShutdownTest):
    def test_cancel_futures(self):
        # The original takes it for certain that a task has begun by the time that all are submitted.
        submitted = [self.executor.submit(suite.time.sleep, .1) for _ in range(50)]
        submitted[0].result()
        self.executor.shutdown(cancel_futures=True)
        self.assertTrue(all(future.done() for future in submitted))
        self.assertGreater(sum(future.cancelled() for future in submitted), 20)
        self.assertTrue(all(future.exception() is None for future in submitted if not future.cancelled()))

class Initializer(suite.InitializerMixin):
    executor_type = Executor

for tests in (Shutdown, suite.WaitTests, suite.AsCompletedTests, suite.ProcessPoolExecutorTest, Deadlock):
    name = f"Sf{tests.__name__}"
    globals()[name] = type(name, (tests, Mixin, suite.BaseTestCase), {"__module__": __name__})
for tests in (FailingInitializer, Initializer):
    name = f"Sf{tests.__name__}"
    globals()[name] = type(name, (tests, suite.BaseTestCase), {"__module__": __name__})
FutureTests = suite.FutureTests

def wanted(tests):
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            yield from wanted(test)
        elif test._testMethodName not in left_out:
            yield test

chosen = unittest.TestSuite(wanted(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])))
result = unittest.TextTestRunner(verbosity=2).run(chosen)
assert result.testsRun > 50, result
sys.exit(not result.wasSuccessful())
"""


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Path:
    """The folder of CPython's tests."""
    folder = Path(request.config.cache.mkdir("cpython"))  # type: ignore[union-attr]
    tests = folder / "usr" / "lib" / PYTHON / "test"
    if not tests.exists():
        ended = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=300)
        packages = list(folder.glob(f"{PACKAGE}_*.deb"))
        assert packages, f"CPython's tests cannot be fetched:\n{ended.stderr}"
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder)], check=True, timeout=300)
    return tests


def test_cpythons_own_tests(suite: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    ended = subprocess.run([str(BIN / "sfrun"), "--local", "-n", "2", "--timeout", "400", str(program), str(suite), *LEFT_OUT],
                           cwd=tmp_path, capture_output=True, text=True, timeout=450)  # fmt: skip
    assert ended.returncode == 0, f"{ended.stdout[-4000:]}\n{ended.stderr[-16000:]}"


JOBLIB_LEFT_OUT = {
    "test_nested_loop[loky-sf]": "the processes of loky do not know a backend that their program has registered",
    "test_nested_loop[back_compat_backend-sf]": "the same",
}
"""Tests that do not fit, and why."""

JOBLIB_PROGRAM = """
import os, sys
import joblib, pytest
import sfparallel as sf

left_out = sys.argv[1:]

def backends(item):
    return item.name.partition("[")[2].rstrip("]").split("-")

class Choice:
    @staticmethod
    def pytest_collection_modifyitems(items):
        # Those with the name of our backend among their parameters: joblib's tests ask joblib for all that there are.
        items[:] = [item for item in items if "sf" in backends(item) and item.name not in left_out]

sf.register_joblib()
tests = os.path.join(os.path.dirname(joblib.__file__), "test", "test_parallel.py")
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "--rootdir", "/tmp", tests], [Choice]))
"""


@pytest.mark.long
@pytest.mark.needs("qemu", "ml", "root")
def test_joblibs_own_tests(sfrun: Sfrun) -> None:
    ended = sfrun(JOBLIB_PROGRAM, "-n", "2", "--image", "ml", "--memory", "1G", "--timeout", "400", args=tuple(JOBLIB_LEFT_OUT),
                  timeout=450).ok()  # fmt: skip
    passed = re.search(r"(\d+) passed", ended.out)
    assert passed and int(passed[1]) >= 70, ended.out[-4000:]
