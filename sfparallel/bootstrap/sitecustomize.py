"""Imported by `site` in the program's interpreter, before the program; see the package. Runs once and leaves no module behind."""

from __future__ import annotations

import os
import sys


def _import_runtime() -> None:
    """From where this file is, whatever the program's path holds; later imports of submodules go there too."""
    folder = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(folder))
    sys.path[:] = [root, *(entry for entry in sys.path if entry != folder)]
    sys.path_importer_cache.pop(folder, None)
    try:
        import sfparallel.bootstrap
        import sfparallel.runtime.program
    finally:
        sys.path.remove(root)
    sfparallel.bootstrap.take_orders()
    sfparallel.runtime.program.set_up()


_import_runtime()
# The program's own, or what the distribution has. Without one, the ImportError tells `site` that there is none.
del sys.modules[__name__]
import sitecustomize  # type: ignore[import-not-found]  # noqa: E402, F401
