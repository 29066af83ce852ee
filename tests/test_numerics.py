"""numpy, pandas and scikit-learn of PyPI compute right in a guest: wheels choose their code by the guest's processor."""

from __future__ import annotations

import pytest

from tests.conftest import Sfrun

pytestmark = pytest.mark.needs("qemu", "ml", "root", "net", "fuse")


def test_sorts_give_sorted_permutations_for_every_type_and_length(sfrun: Sfrun) -> None:
    sfrun(
        """
        import numpy as np

        rng = np.random.default_rng(1)
        TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
                 "longdouble", "complex64", "complex128", "bool", "U3", "S3", "datetime64[s]")

        def values(kind, n):
            numbers = rng.integers(-1000, 1000, n) if n % 2 else rng.standard_normal(n) * 1000
            if kind[0] in "US":
                return numbers.astype("int64").astype(kind)
            if kind.startswith(("uint", "datetime")):
                return np.abs(numbers).astype("int64").astype(kind)
            return numbers.astype(kind)

        def check(kind, n, sort):
            array = values(kind, n)
            truth = sorted(array.tolist(), key=lambda x: (x.real, x.imag) if isinstance(x, complex) else x)
            order = array.argsort(kind=sort)
            assert sorted(order.tolist()) == list(range(n)), "no permutation"
            assert array[order].tolist() == truth, "argsort: not in order"
            assert np.sort(array, kind=sort).tolist() == truth, "sort: not in order"
            if n > 1 and sort == "quicksort":
                k = n // 3
                split = np.argpartition(array, k)
                assert sorted(split.tolist()) == list(range(n)) and array[split][k] == truth[k], "argpartition"
                assert np.partition(array, k)[k] == truth[k], "partition"
                assert np.searchsorted(np.sort(array), array[0]) == truth.index(array[0]), "searchsorted"

        wrong = {}
        for kind in TYPES:
            for n in [*range(70), *range(70, 300, 23), 1000, 1001]:
                for sort in ("quicksort", "stable", "heapsort"):
                    try:
                        check(kind, n, sort)
                    except AssertionError as error:
                        wrong.setdefault((kind, sort), []).append((n, str(error)))
        assert not wrong, {what: (len(found), found[:3]) for what, found in wrong.items()}
        print("sorted", len(TYPES))
        """,
        "--image", "ml",
    ).ok()  # fmt: skip


def test_what_is_built_on_sorting_is_right_too(sfrun: Sfrun) -> None:
    sfrun(
        """
        import numpy as np
        import pandas as pd
        from sklearn.neighbors import KDTree
        from sklearn.tree import DecisionTreeRegressor

        rng = np.random.default_rng(2)
        frame = pd.DataFrame({"key": rng.integers(0, 50, 2000), "value": rng.standard_normal(2000)})
        by_value = frame.sort_values("value")["value"].tolist()
        assert by_value == sorted(frame["value"].tolist())
        groups = {}
        for key, value in zip(frame["key"].tolist(), frame["value"].tolist()):
            groups.setdefault(key, []).append(value)
        medians = frame.groupby("key")["value"].median()
        assert all(medians[key] == np.median(found) for key, found in groups.items()) and len(medians) == len(groups)
        assert frame["value"].rank().tolist() == [sorted(by_value).index(x) + 1 for x in frame["value"].tolist()]
        assert np.unique(frame["key"]).tolist() == sorted(groups)

        points = rng.standard_normal((500, 3))
        distances, nearest = KDTree(points).query(points[:20], k=5)
        for i in range(20):
            truth = sorted(float(np.sqrt(((points[i] - other) ** 2).sum())) for other in points)[:5]
            assert np.allclose(distances[i], truth, rtol=1e-12), i
        x = rng.standard_normal((400, 4))
        tree = DecisionTreeRegressor(random_state=0).fit(x, x[:, 0])
        assert np.array_equal(tree.predict(x), x[:, 0]), "a full tree knows each of its samples"
        """,
        "--image", "ml",
    ).ok()  # fmt: skip


THREADS = """
import os
if SET:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy
import threadpoolctl

def threads():
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "openblas"]
"""


@pytest.mark.parametrize("option", [(), ("--env", "OPENBLAS_NUM_THREADS=1")], ids=["by the program", "by an option"])
def test_numpy_finds_the_number_of_threads_that_it_is_to_use(sfrun: Sfrun, option: tuple[str, ...]) -> None:
    """OpenBLAS reads it when it is loaded: that must be neither in the template nor before the program has set it."""
    ended = sfrun(
        f"""
SET = {not option}
{THREADS}
import subprocess
import sys
import sfparallel as sf

print(threads(), sf.parallel(threads, n=2)())
del os.environ["OPENBLAS_NUM_THREADS"]
subprocess.run([sys.executable, "-c", "SET = False" + {THREADS!r} + "print(threads())"])
        """,
        "--image", "ml", "--cpus", "2", *option,
    ).ok()  # fmt: skip
    assert ended.out == "[1] [[1], [1]]\n[2]\n"
