"""Imports point down: cli -> runtime | vmm -> net -> wire -> native -> config -> errors -> text
(ARCHITECTURE.md, "Modules").

The source is parsed, not imported: imports inside functions and under TYPE_CHECKING count as well, and so do imports by name as
a string (`importlib.import_module("...")`).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sfparallel"

BELOW = {
    "text": frozenset[str](),
    "errors": frozenset({"text"}),
    "config": frozenset({"errors", "text"}),
    "native": frozenset({"_native", "config", "errors", "text"}),
    # The guest has `wire`, and no native library.
    "wire": frozenset({"config", "errors", "text"}),
    # Both sides of how the program's interpreter is started; its `sitecustomize` goes on in `runtime`.
    "bootstrap": frozenset({"runtime"}),
    "net": frozenset({"wire", "native", "config", "errors", "text"}),
    "vmm": frozenset({"bootstrap", "net", "wire", "native", "config", "errors", "text"}),
    # The guest's half: it must work where the host's packages are not installed.
    "runtime": frozenset({"bootstrap", "wire", "config", "errors", "text"}),
    "cli": frozenset({"runtime", "vmm", "net", "wire", "native", "config", "errors", "text"}),
    # `import sfparallel`: what users import, and nothing of the host's half.
    "": frozenset({"MPI", "runtime", "errors"}),
    "MPI": frozenset({"runtime"}),
    # Packages that stand in for others, for programs that import those.
    "shims": frozenset({"MPI", "runtime", "errors"}),
    # Run by setuptools alone.
    "_native_build": frozenset[str](),
}
"""For each part of the package, the parts that it may import. Every part may import its own modules."""

LIBVIRT_MODULE = "vmm/libvirt_domain.py"
NATIVE_MODULE = "native.py"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import.

    Attributes:
        target: dotted name of what is imported; for `from a import b` it is "a.b", whether b is a module or not.
        line: where.
        bare: it is a plain `import a.b`.
    """

    target: str
    line: int
    bare: bool = False

    @property
    def part(self) -> str | None:
        """The part of this package that is meant; None for another package."""
        names = self.target.split(".")
        if names[0] != "sfparallel":
            return None
        return names[1] if len(names) > 1 and _is_part(names[1]) else ""

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


def _is_part(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() or name == "_native"


def _part_of(source: str) -> str:
    return source.partition("/")[0].removesuffix(".py").removesuffix("__init__")


def _is_importer(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    return name in ("import_module", "__import__", "find_spec")


def _imported(tree: ast.Module, package: str) -> Iterator[Import]:
    """Everything that a module imports.

    Args:
        package: dotted name of the package that the module is in, for relative imports.
    """
    nodes = list(ast.walk(tree))
    imports_by_name = any(isinstance(node, ast.Call) and _is_importer(node) for node in nodes)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, bare=True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_importer(node):
            yield from (Import(argument.value, node.lineno) for argument in node.args[:1]
                        if isinstance(argument, ast.Constant) and isinstance(argument.value, str))
        elif (imports_by_name and isinstance(node, ast.Constant) and isinstance(node.value, str)
              and re.fullmatch(r"sfparallel(\.\w+)+", node.value)):
            # A constant or a table of names, from which an import by name may take its argument.
            yield Import(node.value, node.lineno)


def imports_of(source: str) -> list[Import]:
    path = PACKAGE / source
    package = ".".join(("sfparallel", *Path(source).parent.parts))
    return list(_imported(ast.parse(path.read_text(encoding="utf-8"), source), package))


def test_every_part_of_the_package_has_its_place() -> None:
    assert {_part_of(source) for source in SOURCES} == BELOW.keys()


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_down(source: str) -> None:
    part = _part_of(source)
    wrong = []
    for found in imports_of(source):
        if found.part is None or found.part == part:
            continue
        # A plain `import sfparallel` runs nothing but the table of names: it is used to find the package's files.
        if found.part == "" and found.bare:
            continue
        if found.part not in BELOW[part]:
            wrong.append(f"{source}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [source for source in SOURCES if source != LIBVIRT_MODULE])
def test_one_module_alone_imports_libvirt(source: str) -> None:
    wrong = [f"{source}:{found.line} imports {found.target}" for found in imports_of(source) if found.package == "libvirt"]
    assert not wrong, "\n".join(wrong) + f"\n{LIBVIRT_MODULE} is the one that may"


@pytest.mark.parametrize("source", [source for source in SOURCES if source != NATIVE_MODULE])
def test_one_module_alone_binds_the_native_library(source: str) -> None:
    wrong = [f"{source}:{found.line} imports {found.target}" for found in imports_of(source) if found.part == "_native"]
    assert not wrong, "\n".join(wrong) + f"\n{NATIVE_MODULE} is the one that may"


def test_the_table_of_public_names_leads_to_the_guests_half_only() -> None:
    """`sfparallel/__init__.py` imports by names that it puts together, which the parser above cannot see."""
    import sfparallel

    homes = {home.partition(".")[0] for home in sfparallel._HOMES}
    assert homes <= BELOW[""]


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("import libvirt", ["libvirt"]),
        ("def f():\n    from libvirt import open as o", ["libvirt.open"]),
        ("import importlib\nimportlib.import_module('libvirt')", ["importlib", "libvirt"]),
        ("__import__('libvirt')", ["libvirt"]),
        ("from importlib import import_module\nNAME = 'sfparallel.vmm.job'\nimport_module(NAME)",
         ["importlib.import_module", "sfparallel.vmm.job"]),
        ("from ..net import network", ["sfparallel.net.network"]),
        ("from sfparallel import wire", ["sfparallel.wire"]),
        ("if TYPE_CHECKING:\n    import sfparallel.vmm.vm", ["sfparallel.vmm.vm"]),
        ("log = getLogger('sfparallel.vmm')", []),
    ],
)  # fmt: skip
def test_the_parser_finds_every_kind_of_import(text: str, targets: list[str]) -> None:
    assert [found.target for found in _imported(ast.parse(text), "sfparallel.runtime")] == targets
