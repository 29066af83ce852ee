"""`sf completion`: completion of commands and options in bash, generated from the parsers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SCRIPT = """\
_sfparallel() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[0]##*/}} word words=
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command $word" in
            {deeper}) command+=" $word" ;;
        esac
    done
    case $command in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _sfparallel {programs}
"""


def script(words: Mapping[str, Sequence[str]]) -> str:
    """A script for bash.

    Args:
        words: for each command, such as "sf image build", its subcommands and options.
    """
    deeper = "|".join(f"'{command}'" for command in words if " " in command)
    cases = "\n".join(f"        '{command}') words='{' '.join(sorted(found))}' ;;" for command, found in words.items())
    programs = " ".join(command for command in words if " " not in command)
    return _SCRIPT.format(deeper=deeper, cases=cases, programs=programs)
