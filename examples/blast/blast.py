"""Protein search with NCBI BLAST+ in clones of a running VM: `sfrun --image blast -n 4 examples/blast/blast.py`.

The parent builds a database once (a later run finds it in the output folder). Clones of it search the queries in batches; each
finds the database, and blastp, in its own memory. Then the parent searches all queries by itself, for reference: the clones'
merged table must be the same, byte by byte.

Data: the example proteins of MMseqs2 (Steinegger & Söding, https://doi.org/10.1038/nbt.3988; Debian: mmseqs2-examples).
BLAST+: Camacho et al., https://doi.org/10.1186/1471-2105-10-421 (Debian: ncbi-blast+).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gzip
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sfparallel as sf

EXAMPLE_DATA = Path("/usr/share/doc/mmseqs2/example-data")

# blastp reports its use to NCBI otherwise; a clone has no way out, and would wait.
ENVIRONMENT = {**os.environ, "BLAST_USAGE_REPORT": "false"}


def read_fasta(path: Path, limit: int) -> list[str]:
    """The first `limit` records of a FASTA file (gzip), each with its header line."""
    with gzip.open(path, "rt", encoding="ascii") as file:
        return list(itertools.islice(records(file), limit))


def records(lines: Iterable[str]) -> Iterator[str]:
    """Records of FASTA lines; lines before the first header are dropped."""
    record: list[str] = []
    for line in lines:
        if line.startswith(">"):
            if record:
                yield "".join(record)
            record = [line]
        elif record:
            record.append(line)
    if record:
        yield "".join(record)


def split(queries: Sequence[str], size: int) -> list[str]:
    """Batches of `size` records, in order, each as one FASTA text."""
    return ["".join(queries[start:start + size]) for start in range(0, len(queries), size)]


def merge(tables: Iterable[bytes]) -> bytes:
    """The table of all batches: BLAST lists hits query by query, so batches follow each other as their queries do."""
    return b"".join(tables)


def build_database(sequences: Sequence[str], folder: Path) -> Path:
    """A BLAST database of the sequences; returns the path that blastp's -db takes."""
    database = folder / "proteins"
    run(["makeblastdb", "-in", "-", "-dbtype", "prot", "-title", "proteins", "-out", str(database)], "".join(sequences))
    return database


def provide_database(data: Path, sequences: int, folder: Path) -> Path:
    """The database of the first `sequences` proteins: what an earlier run left in `folder`, else a new one."""
    place = folder / f"database-{sequences}"
    if not place.exists():
        work = tempfile.mkdtemp(dir=folder)
        try:
            build_database(read_fasta(data / "DB.fasta.gz", sequences), Path(work))
            os.rename(work, place)  # only a whole one gets the name
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return place / "proteins"


def search(database: Path, queries: str) -> bytes:
    """Hits of FASTA queries as BLAST's tabular format 6."""
    return run(["blastp", "-db", str(database), "-num_threads", "1", "-outfmt", "6", "-evalue", "1e-3"], queries)


def run(argv: list[str], text: str) -> bytes:
    done = subprocess.run(argv, input=text.encode("ascii"), capture_output=True, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"{argv[0]} ended with status {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def difference(expected: bytes, actual: bytes, lines: int = 20) -> str:
    """The first lines of a diff of two tables; empty when they are the same."""
    if expected == actual:
        return ""
    found = difflib.unified_diff(expected.decode(errors="replace").splitlines(), actual.decode(errors="replace").splitlines(),
                                 "serial", "clones", lineterm="", n=1)
    # Bytes may differ where no line does (a line's end).
    return "\n".join(itertools.islice(found, lines)) or "the tables differ in line ends only"


def summary(queries: int, hits: int, clones: int, seconds: dict[str, float]) -> str:
    """The table that is printed at the end."""
    rows = [("queries", f"{queries}"), ("hits", f"{hits}"), ("clones", f"{clones}")]
    rows += [(phase, f"{value:.1f} s") for phase, value in seconds.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>8}" for name, value in rows)


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the wall-clock time of a phase."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="BLAST protein queries in clones of this VM and compare with a serial run.")
    parser.add_argument("--queries", type=positive, default=200, metavar="K", help="queries to search (%(default)s; up to 500)")
    parser.add_argument("--database-sequences", type=positive, default=4000, metavar="M",
                        help="proteins in the database (%(default)s; up to 20000)")
    parser.add_argument("--batch", type=positive, default=25, metavar="B", help="queries per search in a clone (%(default)s)")
    parser.add_argument("--no-check", action="store_true", help="skip the serial run and the comparison")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for hits.tsv and the database (%(default)s)")
    parser.add_argument("--data", type=Path, default=EXAMPLE_DATA, help="folder of DB.fasta.gz and QUERY.fasta.gz")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def missing(data: Path) -> str | None:
    """What the guest image lacks for this example, with the remedy."""
    lacking = [name for name in ("makeblastdb", "blastp") if shutil.which(name) is None]
    lacking += [str(data / name) for name in ("DB.fasta.gz", "QUERY.fasta.gz") if not (data / name).exists()]
    if not lacking:
        return None
    return (f"not in this guest: {', '.join(lacking)}\n  hint: sf image build blast --package ncbi-blast+ --package "
            "mmseqs2-examples, then sfrun --image blast")


def main() -> int:
    options = arguments()
    problem = missing(options.data)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    queries = read_fasta(options.data / "QUERY.fasta.gz", options.queries)
    batches = split(queries, options.batch)
    seconds: dict[str, float] = {}

    options.output.mkdir(parents=True, exist_ok=True)
    with timed(seconds, "database"):
        database = provide_database(options.data, options.database_sequences, options.output)
    with timed(seconds, "in clones"):
        # Every clone has a name of its own: how many there are in the answers is how many took part.
        found = sf.parallel_map(lambda batch: (search(database, batch), socket.gethostname()), batches)
    table = merge(part for part, _ in found)
    (options.output / "hits.tsv").write_bytes(table)
    expected = None
    if not options.no_check:
        with timed(seconds, "serial"):
            expected = search(database, "".join(queries))
    print(summary(len(queries), table.count(b"\n"), len({name for _, name in found}), seconds))
    if expected is None:
        return 0
    if table != expected:
        print(f"The clones' table is not the serial run's:\n{difference(expected, table)}", file=sys.stderr)
        return 1
    print("The clones' table is byte-identical to the serial run's.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
