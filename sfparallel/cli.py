"""The commands `sfrun` (run a program whose workers are clones) and `sf` (images, diagnosis, jobs)."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sfparallel
from sfparallel.config import LOG, SETTINGS, cache_folder, log_level, parse_size
from sfparallel.errors import UsageError
from sfparallel.text import nearest, printable
from sfparallel.vmm import project_file, standard_streams
from sfparallel.vmm.command_errors import EXIT_USAGE, errors_told, say
from sfparallel.vmm.confinement import Places, confine
from sfparallel.vmm.exports import SHARED_DATA, is_system_folder
from sfparallel.vmm.options import JobOptions, Program, RunIn, libvirt_uri

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from sfparallel.vmm.image import Recipe

log = logging.getLogger("sfparallel")

LEAST_MEMORY_BYTES = 256 << 20
"""Below this a guest does not get through its boot."""
MOST_CPUS = 64

def _tell(line: str) -> None:
    """An answer, on standard output; names in it are those of files, and of other users' programs."""
    print(printable(line))


class _Parser(argparse.ArgumentParser):
    """Options are not abbreviated: the next option could make an abbreviation mean something else. Unknown ones are named with
    what was probably meant. Messages quote arguments, which may be names of files (`sfrun *`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """As `parse_args`; what is unknown is told in our words."""
        options, rest = self.parse_known_args(arguments)
        if rest:
            self.error(", ".join(_unknown(word, self.option_names(options)) for word in rest))
        return options

    def option_names(self, options: argparse.Namespace) -> Iterator[str]:
        """Its options, or those of the command that was chosen."""
        for action in self._actions:
            if not isinstance(action, argparse._SubParsersAction):
                yield from action.option_strings
            elif isinstance(command := action.choices.get(str(getattr(options, action.dest, None))), _Parser):
                yield from command.option_names(options)

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Each command by its full name, with its subcommands and options."""
        words: list[str] = []
        below: list[_Parser] = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                words += action.choices
                below += action.choices.values()
            elif action.help != argparse.SUPPRESS:
                words += action.option_strings
        yield self.prog, words
        for parser in below:
            yield from parser.commands()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = nearest(str(value), action.choices)
            meant = f"did you mean {near}?" if near else f"choose from {', '.join(action.choices)}"
            raise argparse.ArgumentError(action, f"there is no {value!r}; {meant}")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        super()._print_message(printable(message), file)


def _unknown(word: str, known: Iterable[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word}"
    near = nearest(word.partition("=")[0], known)
    return f"there is no option {word}" + (f"; did you mean {near}?" if near else "")


class _Formatter(logging.Formatter):
    """The log quotes what guests, QEMU and libvirt say. Steps (INFO) have the time since the start."""

    def format(self, record: logging.LogRecord) -> str:
        step = record.levelno == logging.INFO
        level = f"{record.relativeCreated / 1e3:7.2f} s" if step else record.levelname
        return printable(f"sfrun: {level}: {super().format(record)}")


def _sfrun_parser() -> _Parser:
    parser = _Parser(
        prog="sfrun",
        usage="sfrun [options] script.py [args…]  |  sfrun [options] -m module [args…]  |  sfrun [options] -c command [args…]",
        description="Run a Python program in a VM whose clones are its workers.",
        epilog="settings from the environment: " + "; ".join(f"{s.variable}: {s.help}" for s in SETTINGS),
    )
    add = parser.add_argument
    add("--version", action="version", version=f"sfparallel {sfparallel.__version__}")
    add("-n", type=int, metavar="N", help="number of clones of each parallel call that has no n=")
    add("--local", action="store_true", help="for development: clones are processes of this host (os.fork), not VMs")
    whole = parser.add_mutually_exclusive_group()
    whole.add_argument("--spmd", action="store_const", dest="run_in", const=RunIn.CLONES, default=RunIn.PARENT,
                       help="run the whole program in each of N clones, as the ranks of sf.comm()")  # fmt: skip
    whole.add_argument("--mpi4py", action="store_const", dest="run_in", const=RunIn.CLONES_MPI4PY,
                       help="like --spmd, and `from mpi4py import MPI` imports sf.MPI")  # fmt: skip
    add("--memory", default="1G", metavar="SIZE", help="RAM of the parent, and of each clone (copy-on-write); default 1G")
    add("--cpus", type=int, default=1, metavar="K", help="virtual CPUs of parent and clones; default 1")
    add("--image", default="default", metavar="NAME", help="guest image (see `sf image list`)")
    add("--label", action=argparse.BooleanOptionalAction, default=True, help="put the rank before each line that a clone prints")
    add("--timeout", type=float, metavar="S", help="stop the job after S seconds (exit code 124)")
    add("--env", action="append", default=[], metavar="K[=V]",
        help="set an environment variable of the program; without =V, copy yours")
    add("--data", action="append", default=[], metavar="DIR", help="show a folder read-only at the same path (block image)")
    add("--venv", metavar="PATH", help="make the packages of this virtual environment of the host available in VMs")
    add("--forward", action="append", default=[], metavar="HOST:GUEST", help="forward a TCP port of 127.0.0.1 to the parent")
    add("--seed", type=int, metavar="S", help="seed of sf.rng() in calls that have no seed=; default: fresh entropy")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="count", default=0, help="print each step of the job; -vv: all log messages")
    loudness.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    add("--stats", action="store_true", help="print the time and memory of each fork")
    add("--trace", type=Path, metavar="FILE", help="write every phase of every fork to FILE (Chrome's trace format)")
    add("--pool", type=int, metavar="N", help=argparse.SUPPRESS)
    add("--connect", metavar="URI", help="start the parent as a libvirt domain at URI; `embed`: in the job itself")
    return parser


def _split_program(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Split sfrun's own options from the program, as `python` does: what follows -m, -c or the script is the program's.

    Returns:
        Own options, mode ("script", "module" or "command"), and the program with its arguments.
    """
    takes_value = {name for action in _sfrun_parser()._actions if action.nargs != 0 for name in action.option_strings}
    own: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-m", "-c"):
            if not rest:
                raise UsageError(f"{word} needs a {'module' if word == '-m' else 'command'}")
            return own, "module" if word == "-m" else "command", rest
        if word[:2] in ("-m", "-c"):  # python takes `-ccode` as well
            return own, "module" if word[:2] == "-m" else "command", [word[2:], *rest]
        if word == "--":
            return own, "script", rest
        if not word.startswith("-") or word == "-":
            return own, "script", [word, *rest]
        own.append(word)
        if word in takes_value and rest:
            own.append(rest.pop(0))
    return own, "script", []


def _forward(text: str) -> tuple[int, int]:
    host, _, guest = text.partition(":")
    try:
        ports = int(host), int(guest or host)
    except ValueError:
        ports = 0, 0
    if not all(0 < port < 65536 for port in ports):
        raise UsageError(f"--forward takes two ports from 1 to 65535, not {text!r}", hint="write --forward 8888:8888")
    return ports


def _environment(pairs: Sequence[str]) -> dict[str, str | None]:
    """NAME=VALUE sets a variable; NAME takes the host's, and its absence too (None)."""
    result: dict[str, str | None] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key:
            raise UsageError(f"--env takes NAME=VALUE or NAME, not {pair!r}", hint="`--env NAME` copies your variable NAME")
        result[key] = value if equals else os.environ.get(key)
    return result


def sfrun(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `sfrun`."""
    closed = standard_streams.open_closed()
    with errors_told("sfrun"):
        sys.exit(_sfrun(sys.argv[1:] if arguments is None else arguments, closed))


def _sfrun(arguments: Sequence[str], closed_streams: tuple[int, ...]) -> int:
    own, mode, words = _split_program(arguments)
    parser = _sfrun_parser()
    options = parser.parse(own)
    project = _project(mode, words)
    if project:
        options = _with_defaults(own, options, *project)
    if options.verbose or options.quiet:
        # In the environment, because everything reads the level there.
        os.environ[LOG.variable] = "error" if options.quiet else "info" if options.verbose == 1 else "debug"
    if not words:
        parser.error("there is no program to run: give a script, -m MODULE or -c COMMAND")
    try:
        _check_ranges(options)
    except UsageError as error:
        if project:
            hints = filter(None, (error.hint, project_file.described(*project)))
            raise UsageError(error.message, hint="; ".join(hints)) from error
        raise
    _start_log()
    if project:
        log.info(project_file.described(*project))
    job_options = dataclasses.replace(_job_options(options, mode, words), closed_streams=closed_streams)
    if options.local:
        return _run_local(options, job_options)
    return confine(functools.partial(_run_job, job_options), public_folder=job_options.by_daemon)


def _project(mode: str, words: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The project's file and table, if the program belongs to a project that has one."""
    script = Path(os.path.realpath(words[0])) if mode == "script" and words else None
    try:
        return project_file.find(Path.cwd() if script is None else script if script.is_dir() else script.parent)
    except FileNotFoundError:
        return None  # the current folder does not exist any more, which is told later


def _with_defaults(own: Sequence[str], given: argparse.Namespace, path: Path, table: dict[str, Any]) -> argparse.Namespace:
    parser = _sfrun_parser()
    defaults = project_file.defaults(parser, path, table)
    if given.local:  # these are for VMs
        defaults = {name: value for name, value in defaults.items() if name not in ("venv", "stats")}
    parser.set_defaults(**defaults)
    return parser.parse(own)


def _check_ranges(options: argparse.Namespace) -> None:
    if options.n is not None and options.n < 1:
        raise UsageError(f"-n must be at least 1, not {options.n}")
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        raise UsageError(f"--timeout must be a number of seconds greater than 0, not {options.timeout}")
    if not LEAST_MEMORY_BYTES <= parse_size(options.memory) <= (total := host_memory_bytes()):
        raise UsageError(f"--memory must be between {LEAST_MEMORY_BYTES >> 20}M and {total >> 20}M, not {options.memory}",
                         hint="a bare number is MiB; the upper limit is the host's memory")  # fmt: skip
    if options.cpus > MOST_CPUS:
        raise UsageError(f"--cpus must be at most {MOST_CPUS}, not {options.cpus}")
    if options.seed is not None and options.seed < 0:
        raise UsageError(f"--seed must be at least 0, not {options.seed}")
    if options.cpus < 1:
        raise UsageError(f"--cpus must be at least 1, not {options.cpus}")


def _run_local(options: argparse.Namespace, job_options: JobOptions) -> int:
    if options.stats or options.trace:
        raise UsageError("--stats and --trace are not available with --local", hint="run the program without --local")
    if job_options.venv:
        raise UsageError("--venv is not available with --local: the program runs in the environment of sfrun",
                         hint="install sfparallel in that environment, and run its sfrun")  # fmt: skip
    for host, guest in job_options.forwards:
        if host != guest:
            raise UsageError(f"--forward {host}:{guest} is not available with --local: the program's ports are those of the host",
                             hint=f"let the program listen on 127.0.0.1:{host}, and omit --forward")  # fmt: skip
    from sfparallel.vmm.local_job import run

    return run(job_options, say)


def _run_job(options: JobOptions, places: Places, pid: int) -> int:
    """The job itself, in the process and the namespaces that are its own."""
    with errors_told("sfrun"):
        # Late: it imports numpy and more, which `sfrun --help` and usage errors need not wait for.
        from sfparallel.vmm.job import run

        return run(options, places, pid)


def _script(name: str, cwd: Path) -> tuple[Path, str]:
    """The folder of a script, and its name for the interpreter: the given one, unless that leads through a link in a folder that
    guests are not shown. A folder with a `__main__.py` is a script too, as for python."""
    if not os.path.isfile(name) and not os.path.isfile(os.path.join(name, "__main__.py")):
        raise UsageError(f"there is no script {name!r}", hint=f"the current folder is {cwd}")
    real = Path(os.path.realpath(name))
    folder = real if real.is_dir() else real.parent
    place = Path(os.path.abspath(cwd / name))
    shown = any(base == place or base in place.parents for base in (cwd, folder))
    direct = Path(os.path.realpath(place.parent)) == place.parent and Path(os.path.realpath(place)) == real
    return folder, name if shown and direct else str(real)


def _job_options(options: argparse.Namespace, mode: str, words: list[str]) -> JobOptions:
    try:
        cwd = Path(os.path.realpath(os.getcwd()))
    except FileNotFoundError:
        raise UsageError("the current folder no longer exists", hint="change to a folder that exists") from None
    folder = None
    if mode == "script":
        folder, name = _script(words[0], cwd)
        words = [name, *words[1:]]
    if mode == "command" and any("\ud800" <= char <= "\udfff" for char in words[0]):
        raise UsageError("the command after -c is not valid UTF-8", hint="put it into a script with a line `# coding: …`")
    data = tuple(Path(os.path.realpath(text)) for text in options.data)
    for path in data:
        if not path.is_dir():
            raise UsageError(f"--data {path} is not a folder")
        if is_system_folder(path) and not any(shared in path.parents for shared in SHARED_DATA):
            raise UsageError(f"--data {path} is a system folder, and the guest has its own",
                             hint="name the folder that holds the data")  # fmt: skip
    venv = None
    if options.venv:
        from sfparallel.vmm.venv import find

        venv = find(options.venv)
    program = Program(mode, tuple(words), cwd, folder, _environment(options.env))
    return JobOptions(
        program, run_in=options.run_in, n=options.n, memory_bytes=parse_size(options.memory), cpus=options.cpus,
        image=options.image, labels=options.label, timeout_s=options.timeout,
        data=(*data, venv.packages) if venv else data, venv=venv,
        forwards=tuple(_forward(text) for text in options.forward), statistics=options.stats,
        trace=options.trace.absolute() if options.trace else None,
        connect=libvirt_uri(options.connect) if options.connect else None, pool=options.pool, seed=options.seed,
    )  # fmt: skip


def host_memory_bytes() -> int:
    """RAM of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _start_log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=log_level().upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)  # below that, it logs only which selector it uses


# -- sf ----------------------------------------------------------------------------------------------------------------


def _sf_parser() -> _Parser:
    parser = _Parser(prog="sf", description="Guest images, diagnosis and jobs of sfparallel.")
    parser.add_argument("--version", action="version", version=f"sfparallel {sfparallel.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="check this machine, and say how to mend what does not work")
    image = commands.add_parser("image", help="guest images").add_subparsers(dest="action", required=True, metavar="ACTION")
    build = image.add_parser("build", help="build a guest image, unless it is built already")
    build.add_argument("name", nargs="?", default="default", metavar="NAME", help="name of the image; default: default")
    build.add_argument("--package", action="append", default=[], metavar="DEB", help="a Debian package to add (repeatable)")
    build.add_argument("--pip", action="append", default=[], metavar="SPEC", help="a Python package to add (repeatable)")
    build.add_argument("--requirements", action="append", default=[], type=Path, metavar="FILE",
                       help="a requirements file of pip, whose packages are added (repeatable)")  # fmt: skip
    build.add_argument("--from", dest="base", metavar="IMAGE", help="add to what this image has (it may be NAME itself)")
    build.add_argument("--release", metavar="RELEASE",
                       help="release of Debian or Ubuntu (default: that of this host, or of --from)")  # fmt: skip
    image.add_parser("list", help="list the images in the cache folder")
    image.add_parser("rm", help="remove an image").add_argument("name", metavar="NAME", help="name of the image")
    for name, purpose in (("ps", "list the running jobs"), ("df", "list the contents of the cache folder, with sizes")):
        commands.add_parser(name, help=purpose).add_argument("--json", action="store_true", help="print JSON")
    clean = commands.add_parser("clean", help="remove the remains of interrupted builds, and templates, unless a job uses them")
    clean.add_argument("names", nargs="*", metavar="NAME", help="remove this entry of `sf df`; with an image, its templates too")
    clean.add_argument("--all", action="store_true", help="remove images, data images and initramfs as well")
    commands.add_parser("completion", help="print a completion script for bash; use it with eval \"$(sf completion)\"")
    commands.add_parser("settings", help="print the settings and the variables that change them")
    return parser


def sf(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `sf`."""
    standard_streams.open_closed()
    with errors_told("sf"):
        parser = _sf_parser()
        if not (sys.argv[1:] if arguments is None else arguments):
            parser.print_help(sys.stderr)
            sys.exit(EXIT_USAGE)
        options = parser.parse(arguments)
        _start_log()
        code = _COMMANDS[options.command](options)
        print(end="", flush=True)  # standard output may be closed, and None
        sys.exit(code)


def _doctor(options: argparse.Namespace) -> int:
    from sfparallel.vmm.doctor import diagnose, render

    findings = diagnose()
    _tell(render(findings))
    return 1 if any(finding.lacks for finding in findings) else 0


def _recipe(options: argparse.Namespace) -> Recipe:
    from sfparallel.vmm import image as images
    from sfparallel.vmm.releases import host_release
    from sfparallel.vmm.requirements import Requirements, check_spec

    for spec in options.pip:
        check_spec(spec)
    asked = Requirements()
    for path in options.requirements:
        asked.read(path)
    base = None if options.base is None else images.find(options.base).recipe
    release = options.release or (base.suite if base else host_release())
    recipe = images.Recipe(options.name, release, tuple(sorted(options.package)), tuple(sorted(options.pip)),
                           tuple(asked.lines), tuple(asked.constraints))  # fmt: skip
    return recipe.over(base) if base else recipe


def _image(options: argparse.Namespace) -> int:
    from sfparallel.vmm import image as images
    from sfparallel.vmm.progress import StageDisplay

    if options.action == "build":
        recipe = _recipe(options)
        if old := images.replaced_by(recipe):
            kept = "" if options.base == options.name else f"; use --from {options.name} to add to it"
            say(f"sf: this build replaces the image {options.name!r} ({old.describe()}){kept}")
        with StageDisplay(f"image {options.name}") as display:
            image = images.build(recipe, display)
        _tell(f"{image.name}  {image.key[:12]}  {image.root.stat().st_size >> 20} MiB")
    elif options.action == "list":
        there = images.list_images()
        if not there:
            say("sf: there are no guest images; `sf image build` builds one")
        for image in there:
            _tell(f"{image.name:20} {image.key[:12]}  {image.root.stat().st_size >> 20:6} MiB  {image.describe()}")
    else:
        images.remove(options.name)
    return 0


def _ps(options: argparse.Namespace) -> int:
    from sfparallel.vmm.registry import running_jobs, table

    jobs = asyncio.run(running_jobs())
    for line in [json.dumps([dataclasses.asdict(job) for job in jobs], indent=1)] if options.json else table(jobs):
        _tell(line)
    return 0


def _df(options: argparse.Namespace) -> int:
    from sfparallel.vmm.cache import measured, table

    rows = measured()
    for line in [json.dumps([row.to_json() for row in rows], indent=1)] if options.json else table(rows):
        _tell(line)
    return 0


def _clean(options: argparse.Namespace) -> int:
    from sfparallel.vmm.cache import choose, clean, described_removal

    if options.names and options.all:
        raise UsageError("--all cannot be combined with names", hint="to remove only these entries, omit --all")
    lines = map(described_removal, choose(options.names)) if options.names else clean(everything=options.all)
    for line in lines:
        _tell(line)
    return 0


def _settings(options: argparse.Namespace) -> int:
    for setting in SETTINGS:
        _tell(f"{setting.variable:16} {setting.get() or '-':24} {setting.help}")
    _tell(f"cache folder: {cache_folder()}")
    return 0


def _completion(options: argparse.Namespace) -> int:
    from sfparallel.vmm.completion import script

    print(script({**dict(_sfrun_parser().commands()), **dict(_sf_parser().commands())}), end="")
    return 0


_COMMANDS = {"doctor": _doctor, "image": _image, "ps": _ps, "df": _df, "clean": _clean, "completion": _completion,
             "settings": _settings}  # fmt: skip

__all__ = ["sf", "sfrun"]
