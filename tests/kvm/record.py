"""What is known of the tests' last runs under KVM: last-run.json beside this module, and docs/kvm.md, which is drawn from it.

Each test has an entry of its own: how it ended, how long it took, when, at which revision, and with which code. `code` is a
digest of the files on which it depends whether KVM runs the guests right; the rest of the project is the same under emulation.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from benchmarks import documents, host
from tests.kvm.choice import IMAGES_MISSING, LEFT_OUT, SMOKE, is_one_of

FILE = Path(__file__).with_name("last-run.json")
DOCUMENT = host.ROOT / "docs" / "kvm.md"
OUTCOMES = ("passed", "failed", "skipped")
WEEK = timedelta(days=7)

DEPENDS = (
    "sfparallel/runtime/agent/*.[ch]", "sfparallel/runtime/cpu_check/*.[ch]", "sfparallel/vmm/native/*.[ch]",
    *(f"sfparallel/vmm/{name}.py" for name in (
        "checkpoint", "engine", "guest_root", "initramfs", "kvm", "launcher", "layers", "libvirt_domain", "machine", "manifest",
        "paging", "pausing", "plans", "pool", "qmp", "shells", "template", "vm",
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """How a test ended when it ran last."""

    test: str
    outcome: str
    seconds: float
    day: str
    revision: str
    code: str


def code() -> str:
    """A digest of DEPENDS as it is in this work tree."""
    digest = hashlib.sha256()
    for pattern in DEPENDS:
        files = sorted(host.ROOT.glob(pattern))
        assert files, f"DEPENDS names {pattern}, which is not there"
        for path in files:
            digest.update(f"{path.relative_to(host.ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def revision() -> str:
    """Of this work tree; with a plus when it has changes that are not committed."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=host.ROOT, capture_output=True, text=True).stdout.strip()

    # The record itself is written before it is committed.
    changed = [line for line in git("status", "--porcelain", "sfparallel", "tests").splitlines() if not line.endswith(FILE.name)]
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def now() -> str:
    """The day and the minute, as the record has them."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def read(*files: Path) -> list[Entry]:
    """The newest entry of each test in any of `files`, which may be missing."""
    found: dict[str, Entry] = {}
    for path in files:
        for line in json.loads(path.read_text(encoding="utf-8"))["tests"] if path.exists() else ():
            entry = Entry(**line)
            if entry.test not in found or entry.day >= found[entry.test].day:
                found[entry.test] = entry
    return [found[name] for name in sorted(found)]


def write(path: Path, entries: Iterable[Entry]) -> None:
    """One line for each test, so that changes of it can be read."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in sorted(entries, key=lambda entry: entry.test))
    path.write_text(f'{{"tests": [\n{lines}\n]}}\n', encoding="utf-8")


def entries_of(results: Path, revision: str, code: str) -> list[Entry]:
    """What the outer VM has written down (choice.Ends); its last line may be cut off."""
    lines = results.read_text(encoding="utf-8").split("\n")[:-1] if results.exists() else []
    return [Entry(**json.loads(line), day=now(), revision=revision, code=code) for line in lines]


def to_run(entries: Iterable[Entry], tests: Iterable[str], code: str) -> list[str]:
    """Those of `tests` that have not passed with this code."""
    done = {entry.test for entry in entries if entry.outcome != "failed" and entry.code == code}
    return [test for test in tests if test not in done]


def last(entries: Iterable[Entry]) -> str:
    """In a line: when the tests ran under KVM, at which revision, and how they ended."""
    entries = list(entries)
    if not entries:
        return "KVM: the tests have never run under it"
    ends = Counter(entry.outcome for entry in entries)
    runs = sorted({(entry.day, entry.revision) for entry in entries})
    span = f"on {runs[0][0]} at {runs[0][1]}" if len(runs) == 1 else \
        f"between {runs[0][0]} (at {runs[0][1]}) and {runs[-1][0]} (at {runs[-1][1]})"  # fmt: skip
    counted = ", ".join(f"{ends[outcome]} {outcome}" for outcome in OUTCOMES if ends[outcome])
    return f"KVM: the tests ran under it last {span}: {counted}"


def why_due(entries: Iterable[Entry], code: str, at: datetime) -> str:
    """Why the short run is due; empty when it is not."""
    short = [entry for entry in entries if is_one_of(entry.test, SMOKE)]
    if not short:
        return "they have never run"
    if any(entry.outcome == "failed" for entry in short):
        return "the last run failed"
    if any(entry.code != code for entry in short):
        return "what it depends on has changed"
    days = [datetime.strptime(entry.day, "%Y-%m-%d %H:%M").replace(tzinfo=UTC) for entry in short]
    return "the last run is more than a week old" if at - min(days) > WEEK else ""


def text(entries: Iterable[Entry]) -> str:
    """What docs/kvm.md has between its marks."""
    entries = list(entries)
    files: dict[str, list[Entry]] = {}
    for entry in entries:
        files.setdefault(entry.test.partition("::")[0], []).append(entry)
    rows = []
    for name, of_file in files.items():
        ends = Counter(entry.outcome for entry in of_file)
        counts = [str(ends[outcome]) for outcome in OUTCOMES]
        seconds = sum(entry.seconds for entry in of_file)
        revisions = ", ".join(f"`{each}`" for each in sorted({entry.revision for entry in of_file}))
        rows.append((f"`{name}`", *counts, f"{seconds:.0f}", max(entry.day for entry in of_file)[:10], revisions))
    lines = [f"{last(entries)}.", ""]
    lines += documents.table(("tests", *OUTCOMES, "seconds", "day", "revision"), rows)
    if failed := [entry for entry in entries if entry.outcome == "failed"]:
        lines += ["Failed:", "", *(f"* `{entry.test}`" for entry in failed), ""]
    images = ", ".join(sorted(IMAGES_MISSING))
    lines += ["Not run there:", "", *(f"* `{name}`: {why}" for name, why in LEFT_OUT.items()),
              f"* what needs one of the images {images}: about packages in a guest", ""]  # fmt: skip
    return "\n".join(lines)
