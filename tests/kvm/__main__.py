"""Boots the outer VM and runs a shell script in it: `python -m tests.kvm FOLDER`, where FOLDER/job is the script.

FOLDER is /share there; the project is in /project, the cache in /cache. Its console and dmesg are in FOLDER afterwards.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sfparallel.config import cache_folder
from sfparallel.vmm import image, locks
from tests.kvm import outer_root, outer_vm

LIMIT_S = 3600.0


def main() -> int:
    share, folder, began = Path(sys.argv[1]).absolute(), cache_folder() / "test-kvm", time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {what}", file=sys.stderr, flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    with locks.locked(folder / ".lock", lambda: say("waiting for another run")):
        built = outer_root.ensure_root(folder, say)
        project = folder / "project.sqfs"
        outer_vm.project_disk(built / "root", project, say)
        cache = outer_vm.cache_disk(folder, image.find("default"), say)
        say("booting the outer VM")
        code = outer_vm.run(built, project, cache, share, LIMIT_S)
    say("it did not come to its end; see its console" if code is None else f"exit code {code}")
    return 1 if code is None else code


if __name__ == "__main__":
    sys.exit(main())
