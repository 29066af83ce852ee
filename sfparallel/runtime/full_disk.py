"""What "no space left on device" means in a guest, where all files are in RAM."""

from __future__ import annotations

import errno

NOTE = (
    "all files that are written in a VM are in its RAM, those of the current folder too, and there is no room left for them.\n"
    "Give each VM more with `sfrun --memory`; delete what is not needed any more; let clones write less, and bring it back\n"
    "with collect= or as results; read big inputs in place, from the current folder or from `--data`, rather than to copy them"
)


def explain(error: BaseException) -> None:
    """Add NOTE (PEP 678) to each OSError of this kind in an exception: itself, its causes and contexts, and those in a group."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno == errno.ENOSPC and NOTE not in getattr(found, "__notes__", ()):
            found.add_note(NOTE)
        waiting += (found.__cause__, found.__context__)
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions
