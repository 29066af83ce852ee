"""The joblib backend "sf": `joblib.Parallel`, and with it scikit-learn's `n_jobs`, in clones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from joblib.parallel import AutoBatchingMixin, ParallelBackendBase

from sfparallel.runtime.executor import Executor, TaskFuture
from sfparallel.runtime.here import HERE


class CloneBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """One Executor for each call of a `Parallel`, or for each `with` block of one.

    Options of `joblib.parallel_config("sf", ...)` beyond joblib's own go to the Executor: `retries`, `idle_timeout`, `collect`,
    `seed`.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, nesting_level: int | None = None, inner_max_num_threads: int | None = None, **options: Any) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._options = options
        self._executor: Executor | None = None
        self._workers: int | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Number of clones: `n_jobs`, where -1 stands for `sfrun -n`, or the number of CPUs."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        return max(1, (HERE.require_vm().default_n or os.cpu_count() or 1) + 1 + n_jobs)

    def configure(self, n_jobs: int | None = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **_: Any) -> int:
        self.parallel = parallel
        self._workers = self.effective_n_jobs(n_jobs)
        self._open()
        return self._workers

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None] | None = None) -> TaskFuture[Any]:
        assert self._executor is not None, "configured before"
        future = self._executor.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: TaskFuture[Any]) -> Any:
        return out.result()

    def terminate(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        if self._executor is not None:
            self._executor.kill()
            self._executor = None
        if ensure_ready:
            self._open()

    def _open(self) -> None:
        self._executor = Executor(self._workers, **self._options)
