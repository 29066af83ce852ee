"""The documents say what the code does: options, names, settings and exit codes are documented, examples parse, links lead on."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

import sfparallel
from sfparallel import cli, config, errors

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CHANGELOG", "SECURITY")),
                    *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])  # fmt: skip
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def section(text: str, title: str) -> str:
    """What stands under the heading that contains `title`, up to the next one of its level or above."""
    headings = [(match.start(), len(match[1]), match[2]) for match in _HEADING.finditer(_without_blocks(text))]
    for i, (start, level, name) in enumerate(headings):
        if title in name:
            end = next((at for at, other, _ in headings[i + 1:] if other <= level), len(text))
            return text[start:end]
    raise AssertionError(f"no heading contains {title!r}")


def _without_blocks(text: str) -> str:
    """The text with fenced blocks blanked out, at unchanged positions: a comment in a program is no heading."""
    return _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def _code(text: str) -> str:
    """What is marked as code: spans and blocks."""
    return "\n".join([*(match[2] for match in _FENCE.finditer(text)), *re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every command of a parser, by its full name, with each of its own arguments."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _commands(child)
        elif action.help != argparse.SUPPRESS:
            yield parser.prog, action


OPTIONS = [(prog, option) for parser in (cli._sfrun_parser(), cli._sf_parser())
           for prog, action in _commands(parser) for option in action.option_strings]  # fmt: skip


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_is_in_the_reference(command: str, option: str) -> None:
    # -h stands once for all commands.
    place = section(REFERENCE, "Commands") if option in ("-h", "--help") else section(REFERENCE, f"`{command}`")
    assert option in set(_OPTION.findall(_code(place))), f"{command} {option} is not documented"


def test_the_reference_has_no_option_that_is_not_there() -> None:
    known = {option for _, option in OPTIONS} | {"-m", "-c"}
    assert set(_OPTION.findall(_code(section(REFERENCE, "Commands")))) <= known


def _manpages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manpages", ROOT / "tools" / "manpages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_manual_pages_are_those_of_the_parsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make man` writes them."""
    monkeypatch.setenv("COLUMNS", "200")
    _manpages().main(tmp_path)
    for name in ("sf.1", "sfrun.1"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "man" / name).read_text()


def test_a_manual_page_needs_a_text_for_each_option_and_command() -> None:
    parser = argparse.ArgumentParser(prog="sf")
    below = parser.add_subparsers()
    below.add_parser("one", help="told").add_argument("--all", help="told")
    page = _manpages().page(parser)
    assert ".SS sf one\ntold\n.TP\n.B \\-\\-all ALL\ntold\n" in page
    below.add_parser("two")
    with pytest.raises(SystemExit, match="sf two has no help="):
        _manpages().page(parser)
    parser = argparse.ArgumentParser(prog="sfrun")
    parser.add_argument("-n")
    with pytest.raises(SystemExit, match="sfrun -n N has no help="):
        _manpages().page(parser)


def test_every_command_of_sf_is_in_the_reference() -> None:
    commands = {prog for prog, _ in _commands(cli._sf_parser())}
    missing = [name for name in commands - {"sf", "sf image"} if f"### `{name}`" not in REFERENCE]
    assert not missing


@pytest.mark.parametrize("name", sfparallel.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert re.search(rf"\bsf\.{name}\b", _code(REFERENCE)), f"sf.{name} is not documented"


def test_the_reference_names_nothing_that_sfparallel_lacks() -> None:
    named = set(re.findall(r"\bsf\.([A-Za-z_]\w*)", _code(REFERENCE)))
    assert named <= set(sfparallel.__all__)


def _parameters(function: Callable[..., object]) -> list[str]:
    return [name for name, parameter in inspect.signature(function).parameters.items()
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD]  # fmt: skip


def test_every_argument_is_in_the_reference() -> None:
    from sfparallel.runtime.api import Options

    names = ("parallel", "parallel_map", "parallel_imap", "Executor", "TaskFuture",
             "on_clone", "request_ticket", "clone", "exit", "join", "kill", "create_clones")
    arguments = {name: _parameters(getattr(sfparallel, name)) for name in names}
    arguments["parallel"] += [field.name for field in dataclasses.fields(Options) if field.init]
    for method in ("barrier", "bcast"):
        arguments["comm"] = arguments.get("comm", []) + _parameters(getattr(sfparallel.MPI.Comm, method))
    missing = [f"sf.{name}({argument})" for name, wanted in arguments.items() for argument in wanted
               if not re.search(rf"\b{argument}\b", _code(section(REFERENCE, f"`sf.{name}`")))]  # fmt: skip
    assert not missing


def _error_classes() -> list[type[errors.SfError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.SfError)]


@pytest.mark.parametrize("error", _error_classes(), ids=lambda error: error.__name__)
def test_every_error_is_in_the_reference_and_in_its_place(error: type[errors.SfError]) -> None:
    tree = section(REFERENCE, "Errors")
    lines = [line for block in _FENCE.finditer(tree) for line in block[2].splitlines()]
    depth = {match[2]: len(match[1]) // 4 for line in lines if (match := re.match(r"([ │├└─]*)(\w+)", line))}
    assert error.__name__ in depth
    ancestors = [base for base in error.__mro__[1:] if isinstance(base, type) and issubclass(base, errors.SfError)]
    assert depth[error.__name__] == len(ancestors)


def test_every_setting_is_in_the_reference() -> None:
    place = section(REFERENCE, "Settings")
    for setting in config.SETTINGS:
        assert f"`{setting.variable}`" in place, setting.variable
        assert setting.default in place, f"the default of {setting.variable}"


def test_exit_codes_are_those_of_the_code() -> None:
    from sfparallel.vmm import command_errors, job

    codes = set(re.findall(r"^\| `?(\d+)", section(REFERENCE, "Exit codes"), re.MULTILINE))
    ours = (command_errors.EXIT_USAGE, command_errors.EXIT_FAILED, job.EXIT_TIMEOUT, job.EXIT_PARENT_LOST)
    assert {str(code) for code in ours} <= codes


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_examples_are_accepted(name: str) -> None:
    """Every line of a shell block that calls sfrun or sf goes through the parser of that command."""
    for match in _FENCE.finditer((ROOT / name).read_text(encoding="utf-8")):
        if match[1] != "sh":
            continue
        for line in match[2].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "sfrun":
                own, _mode, program = cli._split_program(words[1:])
                options = cli._sfrun_parser().parse_args(own)
                config.parse_size(options.memory)
                for forward in options.forward:
                    cli._forward(forward)
                assert program, line
            elif words and words[0] == "sf":
                cli._sf_parser().parse_args(words[1:])


@pytest.mark.parametrize("name", NAMES)
def test_python_in_examples_compiles_and_uses_what_is_there(name: str) -> None:
    for match in _FENCE.finditer((ROOT / name).read_text(encoding="utf-8")):
        if match[1] != "python":
            continue
        for node in ast.walk(ast.parse(match[2])):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sf":
                assert node.attr in sfparallel.__all__, f"sf.{node.attr}"


def _sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for suffix in ("py", "c", "h")
                     for path in (ROOT / "sfparallel").rglob(f"*.{suffix}"))  # fmt: skip


def test_the_architecture_names_files_and_functions_that_are_there() -> None:
    spans = set(re.findall(r"`([^`\n]+)`", _FENCE.sub("", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))))
    files = [span for span in spans if re.fullmatch(r"[\w/]+\.(py|c|h)", span)]
    there = [path.as_posix() for folder in ("sfparallel", "tests") for path in (ROOT / folder).rglob("*")]
    assert not [name for name in files if not any(path.endswith(f"/{name}") for path in there)]
    sources = _sources()
    # File names, the port's name, packages of others, and what the compiler makes are no names in the source.
    dotted = [span.rpartition(".")[2] for span in spans if re.fullmatch(r"[A-Za-z_]+(\.[A-Za-z_]+)+", span)]
    names = [name for name in dotted if name not in ("py", "c", "h", "so", "agent", "qmp", "_native")]
    assert not [name for name in names if not re.search(rf"(def|class) {name}\b|^\s*{name}\b.*[=:]", sources, re.MULTILINE)]


def _anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as the usual renderers make them."""
    text = _without_blocks(path.read_text(encoding="utf-8"))
    anchors: set[str] = set()
    for match in _HEADING.finditer(text):
        base = re.sub(r"[^\w\- ]", "", match[2].lower()).replace(" ", "-")
        anchor, number = base, 0
        while anchor in anchors:
            number += 1
            anchor = f"{base}-{number}"
        anchors.add(anchor)
    return anchors


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    broken = []
    for match in _LINK.finditer(_without_blocks(document.read_text(encoding="utf-8"))):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_tests_named_as_proof_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    assert not {name for name in named if f"def {name}(" not in tests}


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.svg")), ids=lambda path: path.name)
def test_pictures_are_well_formed_and_have_a_description(path: Path) -> None:
    picture = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert picture.tag == f"{space}svg"
    assert picture.findtext(f"{space}title")
    assert picture.findtext(f"{space}desc")


@pytest.mark.parametrize("name", NAMES)
def test_no_machine_of_ours_in_the_documents(name: str) -> None:
    """Paths and hosts of the machine that something was written on mean nothing to a reader."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"(?:/work|/tmp/w|/root|/home/\w+)/\S*", text)
