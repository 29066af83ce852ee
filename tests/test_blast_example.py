"""examples/blast: its parts, and the whole in real VMs."""

from __future__ import annotations

import gzip
import importlib.util
import random
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import BIN

EXAMPLE = Path(__file__).parents[1] / "examples/blast/blast.py"


@pytest.fixture(scope="module")
def blast() -> ModuleType:
    spec = importlib.util.spec_from_file_location("blast_example", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def proteins(count: int, seed: int = 1) -> list[str]:
    chance = random.Random(seed)
    return [f">protein{number}\n{''.join(chance.choices('ACDEFGHIKLMNPQRSTVWY', k=120))}\n" for number in range(count)]


def test_fasta_is_read_up_to_the_limit(blast: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.fasta.gz"
    path.write_bytes(gzip.compress(b"stray\n>a one\nMK\nLV\n>b\n\n>c\nAA"))
    assert blast.read_fasta(path, 10) == [">a one\nMK\nLV\n", ">b\n\n", ">c\nAA"]
    assert blast.read_fasta(path, 2) == [">a one\nMK\nLV\n", ">b\n\n"]


@pytest.mark.parametrize(("count", "size", "batches"), [(10, 3, 4), (9, 3, 3), (1, 5, 1), (0, 5, 0)])
def test_split_keeps_all_in_order(blast: ModuleType, count: int, size: int, batches: int) -> None:
    queries = proteins(count)
    parts = blast.split(queries, size)
    assert len(parts) == batches and "".join(parts) == "".join(queries)
    assert all(part.count(">") == size for part in parts[:-1])


def test_merge_and_difference(blast: ModuleType) -> None:
    assert blast.merge([b"a\t1\n", b"", b"b\t2\n"]) == b"a\t1\nb\t2\n"
    assert blast.difference(b"same", b"same") == ""
    assert "-b\t2" in blast.difference(b"a\t1\nb\t2\n", b"a\t1\n")
    assert len(blast.difference(b"", b"x\n" * 100).splitlines()) == 20
    assert blast.difference(b"a\n", b"a") != ""


def test_summary_and_arguments(blast: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert blast.summary(3, 44, 2, {"serial": 1.23}).splitlines() == [
        "queries         3", "hits           44", "clones          2", "serial      1.2 s"]
    assert blast.arguments(["--queries", "5"]).queries == 5
    with pytest.raises(SystemExit):
        blast.arguments(["--batch", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_missing_data_is_named(blast: ModuleType, tmp_path: Path) -> None:
    assert str(tmp_path / "DB.fasta.gz") in blast.missing(tmp_path)


@pytest.mark.needs("blast")
@pytest.mark.skipif(shutil.which("blastp") is None, reason="ncbi-blast+ is not installed on this host")
def test_batches_give_the_bytes_of_one_run(blast: ModuleType, tmp_path: Path) -> None:
    sequences = proteins(60)
    queries = [record.replace("protein", "query").replace("K", "R") for record in sequences[:20]]
    database = blast.build_database(sequences, tmp_path)
    expected = blast.search(database, "".join(queries))
    assert expected.count(b"\n") >= 20
    for size in (1, 7):
        assert blast.merge(blast.search(database, part) for part in blast.split(queries, size)) == expected
    with pytest.raises(RuntimeError, match="blastp ended with status"):
        blast.search(tmp_path / "no such database", queries[0])


@pytest.mark.needs("qemu", "root", "blast")
def test_clones_find_what_a_serial_run_finds(tmp_path: Path) -> None:
    """The example itself, small, in real VMs; and again, when the database is there already."""
    for _ in range(2):
        ended = subprocess.run(
            [str(BIN / "sfrun"), "-n", "2", "--image", "blast", str(EXAMPLE), "--queries", "12", "--database-sequences", "300",
             "--batch", "4"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert "byte-identical" in ended.stdout
        assert (tmp_path / "out" / "hits.tsv").read_text().count("\n") > 0
