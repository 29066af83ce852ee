"""Runs in the outer VM: forks one clone again and again.

Writes KVM's trace of fork N to /share/trace.N, and that of `sfrun --trace` to /share/phases.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
SHARE = Path("/share")
PROGRAM = """
import sys
import sfparallel as sf
rank = sf.parallel(n=1)(lambda: sf.comm().rank)
for _ in sys.stdin:
    rank()
    print("answered", flush=True)
"""
SETTINGS = {"buffer_size_kb": "65536", "trace_clock": "x86-tsc", "tracing_on": "0",
            **{f"events/kvm/{event}/enable": "1" for event in ("kvm_entry", "kvm_exit")}}  # fmt: skip
WARM_UP = 2
"""Forks before the first that counts: the program imports, the pool fills, QEMU's files come into the page cache."""


def main() -> None:
    for name, value in SETTINGS.items():
        (TRACING / name).write_text(value)
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    (SHARE / "machine").write_text(json.dumps({"kernel": os.uname().release, "qemu": version.split()[3]}))
    program = Path("program.py")
    program.write_text(PROGRAM)
    job = subprocess.Popen(["sfrun", "-n", "1", "--trace", SHARE / "phases.json", program], text=True, bufsize=1,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert job.stdin and job.stdout
    for number in range(WARM_UP + int(sys.argv[1])):
        (TRACING / "trace").write_text("")
        (TRACING / "tracing_on").write_text("1")
        job.stdin.write("\n")
        if job.stdout.readline() != "answered\n":
            raise SystemExit("the program has ended")
        (TRACING / "tracing_on").write_text("0")
        if number >= WARM_UP:  # sfrun counts from 1
            (SHARE / f"trace.{number + 1}").write_bytes((TRACING / "trace").read_bytes())
        print(f"fork {number}", flush=True)
    job.stdin.close()
    job.wait()


if __name__ == "__main__":
    main()
