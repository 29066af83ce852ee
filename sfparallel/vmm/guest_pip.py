"""pip for a guest: `python -m sfparallel.vmm.guest_pip MARKERS install ...` runs this host's pip as if under the guest's Python.

pip evaluates environment markers for the Python that runs it, whatever --python-version says, and before pip 23.3 Requires-Python
too. Even Pythons of one minor version differ: redis needs async-timeout `; python_full_version < "3.11.3"`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any


def main(markers: dict[str, str], arguments: list[str]) -> int:
    """pip's main function with the markers of another Python; returns its exit status."""
    marker_module: Any = import_module("pip._vendor.packaging.markers")
    command = import_module("pip._internal.cli.req_command").RequirementCommand
    own, make = marker_module.default_environment, command.make_resolver
    version = tuple(map(int, markers["python_full_version"].split(".")))

    def make_resolver(**options: Any) -> object:
        return make(**{**options, "py_version_info": version})

    marker_module.default_environment = lambda: {**own(), **markers}
    command.make_resolver = staticmethod(make_resolver)
    return int(import_module("pip._internal.cli.main").main(arguments))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
