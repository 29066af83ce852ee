"""Exit codes of a job that are not its program's own."""

from __future__ import annotations

import os

EXIT_TIMEOUT = 124
"""After `--timeout`, as timeout(1) has it."""
EXIT_PARENT_LOST = 70
"""The parent VM died (EX_SOFTWARE of sysexits.h)."""
EXIT_OUTPUT_LOST = 74
"""What programs print cannot be written (EX_IOERR)."""


def exit_code(status: int) -> int:
    """A raw wait status as a shell's exit code."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
